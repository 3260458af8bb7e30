"""The draw and the penalties on logits made by hand. What they do to a real model's answers: see test_decode."""

from typing import Any

import pytest
import torch

from batchgen.engines.sampling import draw, make_row, penalise
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
