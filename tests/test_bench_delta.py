"""The figures of docs/delta.md, small: what is counted is what is claimed."""

from pathlib import Path

from batchgen.bench.delta import measure_delta, measure_duplicates


def test_a_delta_run_calls_the_engine_for_what_changed(tmp_path: Path) -> None:
    found = measure_delta(tmp_path, 600, 0.05)
    assert (found["first"]["calls"], found["second"]["calls"], found["second"]["reused"]) == (600, 30, 570)
    assert {found[name]["verify"] for name in ("first", "second")} == {"right"}


def test_duplicates_are_called_once(tmp_path: Path) -> None:
    found = measure_duplicates(tmp_path, 600, 10)
    assert (found["copied"]["calls"], found["generated"]["calls"]) == (60, 600)
