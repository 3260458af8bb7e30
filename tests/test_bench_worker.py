"""The benchmark of what our worker costs an engine serves what it counts, both ways. Small figures, no timing asserted."""

from dataclasses import replace
from pathlib import Path

import pytest

from batchgen.bench.decode import Workload, make_workload
from batchgen.bench.worker import Setup, check_lengths, compare, describe_device, write_checkpoint


@pytest.mark.filterwarnings("ignore")  # the library's own
def test_both_ways_answer_every_row_at_its_length(tmp_path: Path) -> None:
    setup = Setup(tmp_path, "cpu", rows=4, cache_gib=0.5)
    write_checkpoint(setup, "tiny")
    work = make_workload(6, 4.0, 0.5, 8)
    said: list[str] = []
    fed = compare(setup, work, 1, said.append)
    first, second = "fed all at once", "through the worker"
    assert [run.name for run in fed] == [first, second]
    assert {run.num_tokens for run in fed} == {sum(work.lengths)}
    assert all(run.tokens_per_s == pytest.approx(run.num_tokens / run.wall_s) for run in fed)
    # A job is more than its serving.
    assert all(run.job_s is not None and run.job_s > run.wall_s for run in fed if run.name == second)
    assert len(said) == 2
    assert describe_device("cpu")["device"] == "cpu"


def test_answers_of_another_length_are_no_result() -> None:
    work = Workload(prompts=[(1,), (2,)], lengths=[3, 4])
    check_lengths([3, 4], work)
    for wrong in ([3], [4, 3], [3, None]):
        with pytest.raises(RuntimeError, match="lengths"):
            check_lengths(wrong, replace(work))
