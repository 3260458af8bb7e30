"""What is found out about an engine that was just made, instead of assumed. `Started.facts` holds, as text:

- version            the vendor's
- hang_detector      yes | no: whether its module is there
- max_seq_len, max_num_tokens, max_batch_size   as the vendor resolved them; unknown where it doesn't say
- health_probe       yes | no: whether `_check_health` is there (without it `Beat.is_healthy` is always True)
- perf_metrics       off | yes | no: no means they were asked for and the first answer had none
- chat_probes        how many conversations both encodings rendered alike
- tool_probes        the same for those that call tools; a sentence where one differs
- bos                one | unknown: the begin tokens of a rendered conversation, encoded without special tokens
"""

import os
from typing import Any

from batchgen.engines.trtllm.keeper import list_descendants
from batchgen.engines.trtllm.vendor import Vendor
from batchgen.engines.trtllm.wire import Start, Started

UNKNOWN = "unknown"
MEND = "engine.extra.custom_tokenizer, model.path or this version of TensorRT-LLM"


class ProbeFailed(ValueError):
    """The engine is up and would answer wrongly. A person has to change something."""


def make_started(vendor: Vendor, llm: Any, start: Start, *, has_perf_metrics: bool) -> Started:
    """Raises ProbeFailed."""
    facts = {
        "version": vendor.version,
        "hang_detector": to_word(vendor.has_hang_detector),
        "health_probe": to_word(hasattr(llm, "_check_health")),
        "perf_metrics": to_word(has_perf_metrics) if start.has_perf_metrics else "off",
        **check_chat(llm, start),
        "bos": check_bos(llm, start),
    }
    limits = {name: read_limit(llm, name) for name in ("max_seq_len", "max_num_tokens", "max_batch_size")}
    facts |= {name: UNKNOWN if value is None else str(value) for name, value in limits.items()}
    return Started(vendor.version, limits["max_seq_len"], tuple(list_descendants(os.getpid())), facts)


def check_tokenizer(llm: Any) -> None:
    """Raises ProbeFailed for an engine without one: it ends no answer and knows no stop string."""
    if getattr(llm, "tokenizer", None) is None:
        raise ProbeFailed("the engine has no tokenizer; take skip_tokenizer_init out of engine.extra")


def read_limit(llm: Any, name: str) -> int | None:
    value = getattr(getattr(llm, "args", None), name, None)
    return value if isinstance(value, int) else None


def check_chat(llm: Any, start: Start) -> dict[str, str]:
    """Raises ProbeFailed at the first plain conversation that the engine's own tokenizer renders in another way than we
    did: every answer of the job would be to a prompt that the model was not made for. Calls of tools are in few jobs, and
    the vendors' copies of their encoding differ among themselves: there it is told."""
    faults = {number: compare(llm, start, number) for number in range(len(start.probes))}
    told = [fault for fault in faults.values() if fault is not None]
    for number, fault in faults.items():
        if fault is not None and not has_tools(start.probes[number][0]):
            raise ProbeFailed(f"{fault}; check {MEND}")
    num_plain = sum(not has_tools(messages) for messages, _, _ in start.probes)
    num_tools = len(start.probes) - num_plain
    return {"chat_probes": str(num_plain), "tool_probes": told[0] if told else str(num_tools)}


def has_tools(messages: tuple[dict[str, Any], ...]) -> bool:
    return any(message.get("role") in ("tool", "developer") or "tool_calls" in message for message in messages)


def compare(llm: Any, start: Start, number: int) -> str | None:
    """How the engine's rendering differs from ours; None: it does not."""
    messages, thinking, ours = start.probes[number]
    roles = ", ".join(str(message.get("role")) for message in messages)
    name = f"chat probe {number + 1} of {len(start.probes)} ({roles}; thinking {'on' if thinking else 'off'})"
    try:
        theirs = render(llm, messages, thinking=thinking)
    # The vendor's encoding is a program over the messages; whatever it raises, it can't render them.
    except Exception as error:  # noqa: BLE001
        return f"the engine's tokenizer can't render {name}: {type(error).__name__}"
    if theirs == ours:
        return None
    pairs = enumerate(zip(theirs, ours, strict=False))
    at = next((at for at, (a, b) in pairs if a != b), min(len(theirs), len(ours)))
    return (
        f"the engine's tokenizer renders {name} in another way than our encoding does, from character {at} on "
        f"({len(theirs)} characters against our {len(ours)})"
    )


def render(llm: Any, messages: tuple[dict[str, Any], ...], *, thinking: bool) -> str:
    # Its DeepSeek-V3.2 tokenizer ignores all of these but `thinking`; a Hugging Face one needs them.
    text: str = llm.tokenizer.apply_chat_template(
        [dict(message) for message in messages], tokenize=False, add_generation_prompt=True, thinking=thinking
    )
    return text


def check_bos(llm: Any, start: Start) -> str:
    """Raises ProbeFailed where a rendered conversation does not get exactly one begin token."""
    bos_id = read_bos_id(llm)
    if bos_id is None:
        return UNKNOWN
    for _, _, text in start.probes:
        num_bos = llm.tokenizer.encode(text, add_special_tokens=False).count(bos_id)
        if num_bos != 1:
            raise ProbeFailed(
                f"a rendered conversation has {num_bos} begin-of-text tokens instead of one; check {MEND}"
            )
    return "one" if start.probes else UNKNOWN


def read_bos_id(llm: Any) -> int | None:
    for each in list_tokenizers(llm):
        value = getattr(each, "bos_token_id", None)
        if isinstance(value, int):
            return value
    return None


def read_vocab_size(llm: Any) -> int | None:
    """Added tokens counted, which `vocab_size` leaves out."""
    return next((len(each) for each in list_tokenizers(llm) if hasattr(each, "__len__")), None)


def list_tokenizers(llm: Any) -> list[Any]:
    """The vendor's, and the one that it wraps: 1.2's wrapper does not pass every attribute on."""
    tokenizer = getattr(llm, "tokenizer", None)
    return [tokenizer, getattr(tokenizer, "tokenizer", None)]


def to_word(value: bool) -> str:
    return "yes" if value else "no"
