"""The draw and the penalties on logits made by hand. What they do to a real model's answers: see test_decode."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchgen.engines.sampling import draw, draw_sampled, keep_likeliest, make_row, make_weights, penalise
from batchgen.records import SamplingParams

EOS = frozenset({1})


def test_the_arithmetic_of_the_penalties() -> None:
    row = make_row((0, 1), SamplingParams(repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25), 9, EOS)
    row.out += [2, 2, 3]
    other = make_row((0,), SamplingParams(), 9, EOS)
    logits = torch.tensor([[4.0, -4.0, 4.0, 4.0, 4.0]] * 2)
    expected = [[2.0, -8.0, 2.0 - 0.5 - 0.5, 2.0 - 0.5 - 0.25, 4.0], [4.0, -4.0, 4.0, 4.0, 4.0]]
    assert penalise(logits, [row, other]).tolist() == expected
    assert logits[0, 0] == 4.0


def count_draws(probabilities: list[float], num: int = 2000, **sampling: Any) -> list[float]:
    """Share of each token over many draws."""
    row = make_row((0,), SamplingParams(**{"top_p": 1.0, "seed": 7, **sampling}), 9, EOS)
    logits = torch.tensor([probabilities]).log().expand(num, -1)
    drawn = draw(logits, [row] * num)
    return [drawn.count(token_id) / num for token_id in range(len(probabilities))]


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({}, [0.1, 0.4, 0.2, 0.3]),
        ({"temperature": 0.0}, [0, 1, 0, 0]),
        ({"temperature": 1e-9}, [0, 1, 0, 0]),
        ({"temperature": 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_k": 1}, [0, 1, 0, 0]),
        ({"top_k": 99}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_p": 0.69}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.71}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"top_p": 0.01}, [0, 1, 0, 0]),
        ({"min_p": 0.6}, [0, 4 / 7, 0, 3 / 7]),
        ({"min_p": 1.0}, [0, 1, 0, 0]),
        ({"top_k": 3, "top_p": 0.5, "min_p": 0.1}, [0, 4 / 7, 0, 3 / 7]),
    ],
)
def test_the_draw_follows_the_filtered_distribution(sampling: dict[str, Any], expected: list[float]) -> None:
    shares = count_draws([0.1, 0.4, 0.2, 0.3], **sampling)
    assert shares == pytest.approx(expected, abs=0.04)
    assert [share == 0 for share in shares] == [share == 0 for share in expected]


PARAMS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.3, 1.0, 2.0]),
        "top_p": st.sampled_from([0.001, 0.3, 0.5, 0.95, 1.0]),
        "top_k": st.sampled_from([None, 1, 2, 3, 7, 99]),
        "min_p": st.sampled_from([None, 0.1, 0.5, 1.0]),
    }
)


@given(
    rows=st.lists(st.tuples(st.lists(st.integers(-3, 3), min_size=6, max_size=6), PARAMS), min_size=1, max_size=4),
    seed=st.integers(0, 2**32),
)
def test_the_draw_keeps_exactly_what_sorting_would(rows: list[tuple[list[int], dict[str, Any]]], seed: int) -> None:
    """With ties, which go to the lower id, and rows of unlike filters beside each other."""
    logits = torch.tensor([scores for scores, _ in rows], dtype=torch.float32)
    made = [make_row((0,), SamplingParams(seed=seed, **params), 9, EOS) for _, params in rows]
    weights = make_weights(logits, [row.sampling.temperature for row in made])
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    is_kept = keep_likeliest(ordered.double() / ordered.double().sum(-1, keepdim=True), made)
    for _ in range(20):
        for index, token_id in enumerate(draw_sampled(logits, made).tolist()):
            place = order[index].tolist().index(token_id)
            assert is_kept[index, place], (rows[index], token_id)


def test_a_filter_that_keeps_next_to_nothing_ends_by_sorting() -> None:
    logits = torch.zeros(3, 5000)
    rows = [
        make_row((0,), SamplingParams(seed=seed, top_p=top_p), 9, EOS) for seed, top_p in enumerate([1e-6, 0.95, 0.5])
    ]
    assert draw(logits, rows)[0] == 0  # of equals the first, and one is enough


def test_what_the_neighbours_ask_changes_no_draw() -> None:
    logits = torch.randn(6, 300, generator=torch.Generator().manual_seed(3)) * 2
    asks = [{}, {"top_k": 5}, {"min_p": 0.2}, {"top_p": 1.0}, {"temperature": 0.0}, {"top_p": 0.01}]

    def make() -> list[Any]:
        return [make_row((0,), SamplingParams(seed=seed, **ask), 9, EOS) for seed, ask in enumerate(asks)]

    together = [draw(logits, rows := make()), draw(logits, rows)]
    rows = make()
    alone = [[draw(logits[index : index + 1], [row])[0] for index, row in enumerate(rows)] for _ in range(2)]
    assert together == alone


def test_every_bit_of_a_seed_counts() -> None:
    logits = torch.zeros(1, 50_000)
    seeds = [1, 2, 1 + 2**32, 1 + 2**62]
    assert len({draw(logits, [make_row((0,), SamplingParams(seed=seed, top_p=1.0), 9, EOS)])[0] for seed in seeds}) == 4
