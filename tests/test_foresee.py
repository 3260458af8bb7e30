"""What a run will take, said before it starts: measured where a run was, modelled where there is a model, else unknown."""

from pathlib import Path
from typing import Any

import pytest
from jobs_util import call_cli, make_tree, run, write_prompts, write_spec
from makers import make_job_spec

from batchgen.driver.foresee import Foresight, Rate, extrapolate, foresee, is_alike, measure_rate
from batchgen.driver.job import open_job
from batchgen.driver.run_record import make_run_facts
from batchgen.specs.load import make_spec
from batchgen.storage import Storage


def make_record(rows: int, ready_s: float, **over: Any) -> dict[str, Any]:
    return {"total": {"rows": rows, "ready_s": ready_s}, "startup_s": 30.0, "workers": [{}, {}, {}], **over}


def test_a_rate_is_of_all_runs_and_of_none_that_did_next_to_nothing() -> None:
    assert measure_rate([]) is None
    assert measure_rate([make_record(19, 10)]) is None
    assert measure_rate([make_record(30, 10), make_record(70, 40)]) == Rate(2.0, 10.0)


def test_what_is_left_takes_start_up_and_work() -> None:
    assert extrapolate(Rate(2.0, 10.0), 4000, 4) == (510.0, 2040.0)
    assert extrapolate(Rate(2.0, 10.0), 0, 4) == (0.0, 0.0)


def test_unknown_is_said_in_words() -> None:
    assert Foresight(5, "nobody knows").describe() == "estimate for 5 rows: unknown; nobody knows"
    known = Foresight(5, "measured", (60.0, 60.0, 60.0), (8.0, 8.0, 8.0), None)
    assert "cost unknown: set cluster.gpu_hour_cost" in known.describe()
    assert Foresight(5, "x", (1.0, 2.0, 3.0), (8.0, 10.0, 12.0), 2.5).cost == (20.0, 25.0, 30.0)


def test_a_trial_tells_what_the_rest_will_take(tmp_path: Path) -> None:
    write_prompts(tmp_path / "in")
    tree = make_tree(tmp_path / "in", tmp_path / "out", tmp_path / "calls")
    before = foresee(open_job(make_spec(tree), Storage(str(tmp_path / "out"))))
    assert before.time_s is None
    assert "nothing was measured yet" in before.describe()
    run(tree, limit=30)
    ended = call_cli("plan", write_spec(tmp_path, tree), "--json")
    assert ended.code == 0, ended.err
    found = ended.report["estimate"]
    assert found["rows"] == 25
    assert found["time_s"][1] > 0
    assert found["gpu_hours"] is None  # its workers reserve none
    assert "as earlier runs of this folder went" in ended.err
    _, view = run(tree)
    assert any(line.startswith("estimate for 25 rows: about") for line in view.said)


@pytest.mark.parametrize(
    ("over", "is_known"),
    [
        ({}, True),
        ({"model": {"path": "other/model"}}, False),
        ({"cluster": {"gpus_per_worker": 2}}, False),
        ({"engine": {"kind": "transformers"}}, False),
    ],
)
def test_runs_of_another_model_engine_or_number_of_gpus_say_nothing(over: dict[str, Any], is_known: bool) -> None:
    spec = make_job_spec()
    record = make_run_facts(spec)
    assert is_alike(record, make_job_spec(**over)) is is_known
    assert not is_alike({}, spec), "a record of an earlier build, which doesn't say"


def test_the_model_gives_an_interval_and_a_cost(tmp_path: Path) -> None:
    write_prompts(tmp_path / "in", sizes=(1500,))
    tree: dict[str, Any] = make_tree(tmp_path / "in", tmp_path / "out", tmp_path / "calls")
    tree["engine"] = {"kind": "tensorrt_llm"}
    tree["model"] = {"path": "embedded"}
    tree["cluster"] = {"workers": {"max": 2}, "gpus_per_worker": 8, "gpu_hour_cost": 4.0}
    found = foresee(open_job(make_spec(tree), Storage(str(tmp_path / "out"))))
    assert found.time_s is not None, found.source
    assert found.gpu_hours is not None
    assert 0 < found.gpu_hours[0] <= found.gpu_hours[1] <= found.gpu_hours[2]
    assert found.cost == pytest.approx(tuple(4 * hours for hours in found.gpu_hours))
    assert "modelled, not measured: answers of" in found.describe()
