"""The benchmark of the decode loop makes what it counts. Small figures, no timing asserted."""

from typing import Any

import pytest

from batchgen.bench.decode import WAYS, make_model, make_workload


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("tiny", "cpu")


def test_the_workload_is_the_same_each_time_and_has_a_long_tail() -> None:
    work = make_workload(500, 74.0, 0.9, 600)
    assert work == make_workload(500, 74.0, 0.9, 600)
    assert 60 < sum(work.lengths) / 500 < 90
    assert max(work.lengths) > 300 > 74 > min(work.lengths)


@pytest.mark.filterwarnings("ignore")  # the library's own, of its own ways
@pytest.mark.parametrize("way", WAYS)
def test_every_way_answers_the_whole_workload(way: str, model: Any) -> None:
    work = make_workload(5, 6.0, 0.5, 12)
    measured = WAYS[way](model, work, 4)
    assert measured.num_tokens == sum(work.lengths)
    assert measured.tokens_per_s == pytest.approx(measured.num_tokens / measured.wall_s)
    assert measured.cpu_s > 0
    assert measured.roofline_s is None  # there is no GPU's bandwidth to stand beside
