"""Where an answer ends by a stop string, in its text and in its tokens. Pure; `decode` turns token ids into text."""

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]
# Bytes that are no character, or half of one, show as this.
CUT_CHARACTER = "\ufffd"


def find_stop(text: str, stop: Sequence[str], start: int = 0) -> str | None:
    """The stop string that begins first, looking from `start`."""
    places = {each: text.find(each, start) for each in stop}
    met = [each for each in stop if places[each] >= 0]
    return min(met, key=lambda each: places[each]) if met else None


def cut_at_stop(token_ids: Sequence[int], stop: Sequence[str], decode: Decode) -> Sequence[int]:
    """The tokens before the first stop string. Where it begins inside a token, that one and the rest of the stop string
    stay, or text before it would be lost: whoever decodes them cuts once more, with `cut_text`."""
    end = len(token_ids)
    if find_stop(decode(token_ids), stop) is None:
        return token_ids
    while end > 1 and find_stop(decode(token_ids[: end - 1]), stop) is not None:
        end -= 1
    kept = cut_text(decode(token_ids[:end]), stop)
    for start in range(end - 1, -1, -1):
        text = decode(token_ids[:start])
        if text == kept:
            return token_ids[:start]
        if len(text) < len(kept):
            break
    return token_ids[:end]


def cut_text(text: str, stop: Sequence[str]) -> str:
    """The text before the first stop string."""
    mark = find_stop(text, stop)
    return text if mark is None else text[: text.find(mark)]


def decode_tail(out: Sequence[int], num_bytes: int, decode: Decode) -> str:
    """Text of the last tokens, at least so many bytes of it where there are as many. A token is a byte or more, but for
    special ones, which show as nothing."""
    num_tokens = num_bytes
    while True:
        text = decode(out[-num_tokens:])
        if num_tokens >= len(out) or count_certain_bytes(text) >= num_bytes:
            return text
        num_tokens *= 2


def count_certain_bytes(text: str) -> int:
    """Of the tokens that became this text, at least: a cut character may stand for one byte, and is three itself."""
    return len(text.encode(errors="replace")) - 2 * text.count(CUT_CHARACTER)
