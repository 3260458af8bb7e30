"""Parts of an answer put together, against an answer that came in one. Pure: the engine here is a list of tokens.

Tokens are bytes, so that seams fall inside characters and inside stop strings wherever they can.
"""

from collections.abc import Sequence

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from batchgen.records import Generation, Partial, Request, RowId, SamplingParams, TokenLogprob, Usage
from batchgen.worker.seam import can_hide_stop, count_undecided, extend, find_seam_stop, join
from batchgen.worker.stops import cut_at_stop, cut_text, find_stop


def decode(token_ids: Sequence[int]) -> str:
    return bytes(token_ids).decode(errors="replace")


def write(tokens: bytes, stop: tuple[str, ...], max_tokens: int, *, keeps_stop: bool) -> Generation:
    """What an engine answers that would write `tokens` and then end: it looks for stop strings after each of them."""
    out: list[int] = []
    reason = "length"
    for token in tokens[:max_tokens]:
        out.append(token)
        if find_stop(decode(out), stop) is not None:
            reason = "stop"
            break
    else:
        reason = "stop" if len(tokens) < max_tokens else "length"
    num_tokens = len(out) + (reason == "stop" and find_stop(decode(out), stop) is None)  # the end-of-text token
    kept = out if keeps_stop else cut_at_stop(out, stop, decode)
    logprobs = tuple(TokenLogprob(token, -0.1) for token in kept)
    usage = Usage(7, num_tokens, 3)
    return Generation(cut_text(decode(kept), stop), tuple(kept), reason, usage, 0.1, 0.2, logprobs)


def write_in_parts(
    tokens: bytes, stop: tuple[str, ...], max_tokens: int, budgets: list[int], *, keeps_stop: bool
) -> tuple[Generation, int]:
    """(the joined answer, the parts it took): as `Continuation` does, without its engine."""
    request = Request(RowId("f", 0, 0), (0,) * 7, SamplingParams(stop=stop, max_tokens=max_tokens))
    before: Partial | None = None
    num_parts = 0
    while True:
        done = len(before.token_ids) if before is not None else 0
        budget = min(budgets[num_parts % len(budgets)], max_tokens - done)
        undecided = count_undecided(before, stop, decode) if before is not None else 0
        budget = min(budget, undecided) if undecided else budget
        part = write(tokens[done:], stop, budget, keeps_stop=keeps_stop)
        num_parts += 1
        num_kept = find_seam_stop(before, part, stop, decode) if before is not None else None
        is_last = part.finish_reason != "length" or num_kept is not None or done + budget >= max_tokens
        if not is_last:
            before = extend(before, part)
        elif before is None:
            return part, num_parts
        else:
            whole = join(request, before, part, decode, num_kept=num_kept, keeps_stop=keeps_stop)
            return whole, num_parts


texts = st.text(st.sampled_from("abcäß€😀\n "), max_size=24)
stops = st.lists(st.text(st.sampled_from("abcä€😀 "), min_size=1, max_size=5), max_size=3).map(tuple)
budget_lists = st.lists(st.integers(1, 9), min_size=1, max_size=4)


@settings(max_examples=400)
@given(texts, stops, st.integers(1, 70), budget_lists, st.booleans())
@example("abcabc", ("ca",), 70, [3], True)
@example("aaaa", ("aa", "aaa"), 70, [1], False)
@example("ab😀b", ("b",), 70, [3], True)
@example("😀a", ("😀a",), 5, [1, 4], False)
@example("aaa", ("aa",), 70, [1, 2], False)
def test_parts_make_the_answer_that_one_shot_makes(
    text: str, stop: tuple[str, ...], max_tokens: int, budgets: list[int], keeps_stop: bool
) -> None:
    assume(not can_hide_stop(stop, keeps_stop=keeps_stop))
    tokens = text.encode()
    one_shot = write(tokens, stop, max_tokens, keeps_stop=keeps_stop)
    joined, _ = write_in_parts(tokens, stop, max_tokens, budgets, keeps_stop=keeps_stop)
    assert joined == one_shot


@pytest.mark.parametrize("keeps_stop", [True, False])
@pytest.mark.parametrize("size", [2, 3, 5])
def test_a_stop_string_across_the_seam_at_every_offset(size: int, keeps_stop: bool) -> None:
    text = "the quick brown fox jumps over the lazy dog"
    for place in range(4, len(text) - size):
        stop = (text[place : place + size],)
        one_shot = write(text.encode(), stop, 100, keeps_stop=keeps_stop)
        end = text.find(stop[0]) + size
        for seam in range(1, end):
            joined, _ = write_in_parts(text.encode(), stop, 100, [seam, 100], keeps_stop=keeps_stop)
            assert joined == one_shot, (stop, seam)


def test_what_the_engine_wrote_beyond_the_stop_is_dropped_and_not_counted() -> None:
    joined, num_parts = write_in_parts(b"one END two three", ("END",), 100, [5, 100], keeps_stop=True)
    assert num_parts == 2
    assert (joined.text, joined.finish_reason) == ("one ", "stop")
    assert joined.usage == Usage(7, 7, 3)
    assert joined.logprobs is not None
    assert len(joined.logprobs) == 7


def test_a_bare_end_of_text_is_no_token_of_the_answer() -> None:
    """TensorRT-LLM's answer that holds its end-of-text token alone, as the last part of one that has text."""
    request = Request(RowId("f", 0, 0), (1, 2), SamplingParams())
    part = Generation("", (0,), "stop", Usage(4, 1, 0))

    def hide(token_ids: Sequence[int]) -> str:
        return decode([token for token in token_ids if token])

    joined = join(request, Partial(tuple(b"ab")), part, hide, num_kept=None, keeps_stop=False)
    assert (joined.token_ids, joined.text, joined.usage.completion_tokens) == (tuple(b"ab"), "ab", 3)


@pytest.mark.parametrize(
    ("text", "stop", "wanted"),
    [
        ("a", (), 0),
        ("abc", ("END",), 0),
        ("abE", ("END",), 2),
        ("abEN", ("END", "Nxyz"), 3),
        ("ab", ("b",), 0),
        ("ab€"[:-1], ("b€",), 3),
    ],
)
def test_a_stop_string_that_has_begun_is_waited_for(text: str, stop: tuple[str, ...], wanted: int) -> None:
    assert count_undecided(Partial(tuple(text.encode())), stop, decode) == wanted


@pytest.mark.parametrize(
    ("stop", "hides"), [((" ", "a "), True), (("##", "\n##\n"), True), (("a", "ab"), False), (("aa",), False)]
)
def test_a_stop_string_inside_another_could_hide_it_from_an_engine_that_cuts(
    stop: tuple[str, ...], hides: bool
) -> None:
    assert can_hide_stop(stop, keeps_stop=False) is hides
    assert not can_hide_stop(stop, keeps_stop=True)


def test_half_a_character_may_begin_a_stop_string() -> None:
    assert count_undecided(Partial(tuple("a€".encode()[:-1])), ("€!",), decode) >= 2


def test_unknown_stays_unknown() -> None:
    request = Request(RowId("f", 0, 0), (1, 2), SamplingParams(logprobs=1))
    before = extend(None, Generation("a", (97,), "length", Usage(2, 1, None)))
    joined = join(request, before, Generation("b", (98,), "stop", Usage()), decode, num_kept=None, keeps_stop=True)
    assert joined.logprobs is None
    assert joined.usage == Usage(2, None, None)


@pytest.mark.parametrize("token_ids", [None, ()])
def test_a_part_must_name_its_tokens(token_ids: tuple[int, ...] | None) -> None:
    with pytest.raises(ValueError, match="token ids"):
        extend(None, Generation("a", token_ids, "length", Usage()))
