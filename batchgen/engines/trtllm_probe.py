"""What is found out about an engine that was just made, instead of assumed. `Started.facts` holds, as text:

- version            the vendor's
- hang_detector      yes | no: whether its module is there
- max_seq_len, max_num_tokens, max_batch_size   as the vendor resolved them; unknown where it doesn't say
- health_probe       yes | no: whether `_check_health` is there (without it `Beat.is_healthy` is always True)
- perf_metrics       off | yes | no: no means they were asked for and the first answer had none
- chat_probes        how many conversations both encodings rendered alike
- bos                one | unknown: the begin tokens of a rendered conversation, encoded without special tokens
"""

import os
from typing import Any

from batchgen.engines.trtllm_keeper import list_descendants
from batchgen.engines.trtllm_vendor import Vendor
from batchgen.engines.trtllm_wire import Start, Started

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
        "chat_probes": str(check_chat(llm, start)),
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


def check_chat(llm: Any, start: Start) -> int:
    """How many conversations were compared. Raises ProbeFailed at the first one that the engine's own tokenizer renders
    in another way than we did: every answer of the job would be to a prompt that the model was not made for."""
    for number, (messages, thinking, ours) in enumerate(start.probes, 1):
        roles = ", ".join(str(message.get("role")) for message in messages)
        name = f"chat probe {number} of {len(start.probes)} ({roles}; thinking {'on' if thinking else 'off'})"
        try:
            theirs = render(llm, messages, thinking=thinking)
        # The vendor's encoding is a program over the messages; whatever it raises, it can't render them.
        except Exception as error:  # noqa: BLE001
            raise ProbeFailed(
                f"the engine's tokenizer can't render {name}: {type(error).__name__}; check {MEND}"
            ) from None
        if theirs != ours:
            at = next(
                (at for at, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), min(len(theirs), len(ours))
            )
            raise ProbeFailed(
                f"the engine's tokenizer renders {name} in another way than our encoding does, from character {at} on "
                f"({len(theirs)} characters against our {len(ours)}); check {MEND}"
            )
    return len(start.probes)


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
