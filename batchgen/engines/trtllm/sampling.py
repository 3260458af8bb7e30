"""Our sampling in TensorRT-LLM's words, and their tokens and logprobs in ours. Pure; imports nothing of the vendor.

What its source says, 1.2 era, and what follows here:

- It decodes greedily unless told otherwise, and `max_tokens` is 32: temperature, top_p and max_tokens are always given.
- A stop string becomes token ids on its own and ends a sequence only where exactly these come; a text in which other
  tokens spell it is found by a scan of the detokenised text, in versions that have one. So `detokenize` is on for
  requests with stop strings, whose text the child scans itself, and off for all others, which nobody reads as text.
- Stop strings are only turned into ids for params without an `end_id`: it is never given, the vendor takes the
  tokenizer's.
- The scan cuts the text and leaves the token ids: `stops.cut_at_stop` cuts those.
- `logprobs=0` turns them off instead of giving the drawn token's alone: one is asked for, and the top dropped.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from batchgen.records import SamplingParams, TokenLogprob

OPTIONAL = ("min_p", "seed", "presence_penalty", "frequency_penalty", "repetition_penalty")


def make_sampling_kwargs(sampling: SamplingParams, *, has_perf_metrics: bool = False) -> dict[str, Any]:
    """Keyword arguments of the vendor's SamplingParams, but for `guided_decoding`: see `make_guided_kwargs`."""
    kwargs: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_tokens,
        "ignore_eos": False,
        # Our token ids hold their special tokens; a second beginning-of-text token costs accuracy.
        "add_special_tokens": False,
        "detokenize": bool(sampling.stop),
        # A stop string may be a special token's.
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "include_stop_str_in_output": False,
        "return_perf_metrics": has_perf_metrics,
    }
    kwargs |= {name: getattr(sampling, name) for name in OPTIONAL if getattr(sampling, name) is not None}
    if sampling.temperature == 0:
        kwargs["top_k"] = 1  # both of these mean greedy; a sampler that divides by the temperature heeds this one
    elif sampling.top_k:
        kwargs["top_k"] = sampling.top_k
    if sampling.stop:
        kwargs["stop"] = list(sampling.stop)
    if sampling.stop_token_ids:
        kwargs["stop_token_ids"] = list(sampling.stop_token_ids)
    if sampling.logprobs is not None:
        kwargs["logprobs"] = max(1, sampling.logprobs)
    return kwargs


def make_guided_kwargs(sampling: SamplingParams) -> dict[str, str] | None:
    """Keyword arguments of the vendor's GuidedDecodingParams; None: the answer is free."""
    guided = getattr(sampling, "guided", None)
    if guided is None:
        return None
    named = {"json": guided.json_schema, "regex": guided.regex, "grammar": guided.grammar}
    return {name: value for name, value in named.items() if value is not None}


def make_logprobs(
    token_ids: Sequence[int], given: Sequence[Any] | None, num_top: int | None
) -> tuple[TokenLogprob, ...] | None:
    """Those of `token_ids`, from the vendor's {token id: logprob and rank} a token, or bare numbers. None where they were
    not asked for, or the vendor gave none for some token: unknown, not zero."""
    if num_top is None or given is None or len(given) < len(token_ids):
        return None
    found = [make_logprob(token_id, each, num_top) for token_id, each in zip(token_ids, given, strict=False)]
    return tuple(each for each in found if each is not None) if None not in found else None


def make_logprob(token_id: int, given: Any, num_top: int) -> TokenLogprob | None:
    if not isinstance(given, Mapping):
        return TokenLogprob(token_id, float(given))
    if token_id not in given:
        return None
    ranked = sorted(((other, each.logprob) for other, each in given.items()), key=lambda pair: -pair[1])
    return TokenLogprob(token_id, given[token_id].logprob, tuple(ranked[:num_top]))


# ---- where an answer ends --------------------------------------------------------------------------------------------


def drop_end(token_ids: Sequence[int], end_ids: frozenset[int]) -> Sequence[int]:
    """Without the end-of-text or stop token that ended the answer. An answer of nothing else keeps it: that is how an
    empty answer is told from none at all."""
    return token_ids[:-1] if len(token_ids) > 1 and token_ids[-1] in end_ids else token_ids
