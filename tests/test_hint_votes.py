"""Most workers decide whether hints are followed."""

import random

from hypothesis import given
from hypothesis import strategies as st

from batchgen.queue.hint_votes import HintVotes

SAID = st.tuples(st.sampled_from("abcd"), st.sampled_from([None, True, False, "gone"]))


def test_the_first_word_decides_and_a_draw_changes_nothing() -> None:
    votes = HintVotes(is_followed=False)
    votes.hear("a", None)
    assert not votes.is_followed
    votes.hear("a", True)
    assert votes.is_followed
    votes.hear("b", False)
    assert votes.is_followed, "one against one"
    votes.hear("c", False)
    assert not votes.is_followed
    votes.hear("a", False)
    votes.hear("b", True)
    votes.hear("c", None)
    assert not votes.is_followed, "None takes nothing back"


def test_who_is_gone_has_no_vote_but_what_was_found_stays() -> None:
    votes = HintVotes(is_followed=True)
    votes.hear("a", False)
    votes.forget("a")
    assert not votes.is_followed
    votes.hear("b", True)
    assert votes.is_followed
    votes.forget("nobody")


@given(st.booleans(), st.lists(SAID))
def test_it_counts_right(is_followed: bool, said: list[tuple[str, bool | str | None]]) -> None:
    votes, known = HintVotes(is_followed=is_followed), dict[str, bool]()
    for worker_id, word in said:
        if word == "gone":
            votes.forget(worker_id)
            known.pop(worker_id, None)
            continue
        assert not isinstance(word, str)
        is_new = word is not None and known.get(worker_id) != word
        votes.hear(worker_id, word)
        if word is not None:
            known[worker_id] = word
        num_for = sum(known.values())
        if is_new and 2 * num_for != len(known):
            is_followed = 2 * num_for > len(known)
        assert votes.is_followed == is_followed


def test_many_workers_that_see_noise_now_and_then_agree() -> None:
    """At 0.25 one look in forty takes noise for a hint; of a hundred workers never half do."""
    rng, votes = random.Random(0), HintVotes(is_followed=False)
    for worker in range(100):
        votes.hear(f"w{worker}", False)
    for _ in range(50):
        for worker in range(100):
            votes.hear(f"w{worker}", rng.random() < 1 / 40)
            assert not votes.is_followed
