"""The figures of docs/delta.md and docs/gates.md, small: what is counted is what is claimed."""

from pathlib import Path

from batchgen.bench.delta import measure_delta, measure_duplicates
from batchgen.bench.gates import measure_gate


def test_a_delta_run_calls_the_engine_for_what_changed(tmp_path: Path) -> None:
    found = measure_delta(tmp_path, 600, 0.05)
    assert (found["first"]["calls"], found["second"]["calls"], found["second"]["reused"]) == (600, 30, 570)
    assert {found[name]["verify"] for name in ("first", "second")} == {"right"}


def test_duplicates_are_called_once(tmp_path: Path) -> None:
    found = measure_duplicates(tmp_path, 600, 10)
    assert (found["copied"]["calls"], found["generated"]["calls"]) == (60, 600)


def test_the_gate_finds_the_same_in_footers_and_in_rows(tmp_path: Path) -> None:
    found = measure_gate(tmp_path, 900, 300, 3, 0.2)
    assert (found["rows"].pop("duplicate_rate"), found["files"]) == (found["footers"]["duplicate_rate"], 3)
    assert 0.1 < found["footers"]["duplicate_rate"] < 0.3
