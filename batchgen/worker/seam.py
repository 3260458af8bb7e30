"""The parts of a continued answer put together as if it had come in one. Pure; `decode` turns token ids into text.

The engine knows each part alone; what looks at the whole answer is done here. Text is decoded from all tokens at once, so
that a character cut by a seam is whole again. A stop string may begin before a seam and end after it: the answer ends where
one shot would have ended it, and what the engine wrote beyond that is dropped. `completion_tokens` counts the tokens of the
answer, not those dropped; `prompt_tokens`, `cached_tokens`, `queued_s` and `ttft_s` are the first part's.
"""

from collections.abc import Sequence

from batchgen.records import Generation, Partial, Request, Usage
from batchgen.worker.stops import (
    CUT_CHARACTER,
    Decode,
    count_certain_bytes,
    cut_at_stop,
    cut_text,
    decode_tail,
    find_stop,
)

MAX_CHARACTER_BYTES = 4


def extend(before: Partial | None, part: Generation) -> Partial:
    """The answer so far, with a part that is not its last. Raises ValueError for one that does not name its tokens."""
    if not part.token_ids:
        raise ValueError("a part without token ids can't be continued")
    if before is None:
        return Partial(part.token_ids, part.logprobs, part.usage.cached_tokens, part.ttft_s, part.queued_s)
    return Partial(
        before.token_ids + part.token_ids,
        None if before.logprobs is None or part.logprobs is None else before.logprobs + part.logprobs,
        before.cached_tokens,
        before.ttft_s,
        before.queued_s,
    )


def find_seam_stop(before: Partial, part: Generation, stop: Sequence[str], decode: Decode) -> int | None:
    """How many tokens of the part complete a stop string that began before it; None: there is none. One that the part holds
    alone is the engine's to find. Looks as a decoder does, token by token, no further than such a string can reach."""
    if not stop:
        return None
    num_bytes = count_bytes(stop)
    token_ids = part.token_ids or ()
    for num in range(1, len(token_ids) + 1):
        whole = before.token_ids + token_ids[:num]
        is_met = find_stop(decode_tail(whole, num_bytes, decode), stop) is not None
        # Decoded from the middle, a text may begin with half a character: what seems to be there is looked for in all.
        if is_met and find_stop(decode(whole), stop) is not None:
            return num
        if count_certain_bytes(decode(token_ids[:num])) >= num_bytes:
            return None
    return None


def count_undecided(before: Partial, stop: Sequence[str], decode: Decode) -> int:
    """Tokens that may complete a stop string whose beginning is the answer's end so far; 0: no stop string has begun. A
    part of so many tokens first keeps the engine from writing thousands that would be dropped."""
    if not stop:
        return 0
    tail = decode_tail(before.token_ids, count_bytes(stop), decode)
    if tail.endswith(CUT_CHARACTER):
        return count_bytes(stop)
    rests = [text[size:] for text in stop for size in range(1, len(text)) if tail.endswith(text[:size])]
    return max((len(rest.encode()) for rest in rests), default=0)


def can_hide_stop(stop: Sequence[str], *, keeps_stop: bool) -> bool:
    """May a part end at one of these without a sign that, with what came before it, it was another that began earlier? So
    it is where one lies inside another, and the engine cuts what it found: such a row goes in one piece."""
    return not keeps_stop and any(outer.find(inner, 1) > 0 for outer in stop for inner in stop if inner != outer)


def count_bytes(stop: Sequence[str]) -> int:
    """Of the longest stop string, and a character that a seam cut before it."""
    return max(len(text.encode()) for text in stop) + MAX_CHARACTER_BYTES


def join(
    request: Request, before: Partial, part: Generation, decode: Decode, *, num_kept: int | None, keeps_stop: bool
) -> Generation:
    """The whole answer from all before the last part and that. `num_kept`: tokens of the part up to the end of a stop
    string across the seam (`find_seam_stop`). `keeps_stop`: see `EngineFacts`. Raises ValueError for a part that does not
    name its tokens."""
    if part.token_ids is None:
        raise ValueError("a part without token ids can't be joined")
    stop, last, num_last = request.sampling.stop, part.token_ids, part.usage.completion_tokens
    if num_kept is not None:
        last, num_last = last[:num_kept], num_kept
    elif not keeps_stop and len(last) == 1 and not decode(last):
        last = ()  # a bare end-of-text token, which such an engine gives where a part is nothing else
    whole = before.token_ids + last
    if not keeps_stop:
        whole = tuple(cut_at_stop(whole, stop, decode))
    logprobs = None if before.logprobs is None or part.logprobs is None else before.logprobs + part.logprobs
    num_tokens = None if num_last is None else len(before.token_ids) + num_last
    return Generation(
        text=cut_text(decode(whole), stop),
        token_ids=whole,
        finish_reason="stop" if num_kept is not None else part.finish_reason,
        usage=Usage(len(request.token_ids or ()), num_tokens, before.cached_tokens),
        ttft_s=before.ttft_s,
        queued_s=before.queued_s,
        logprobs=None if logprobs is None else logprobs[: len(whole)],
    )
