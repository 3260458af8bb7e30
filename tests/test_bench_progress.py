"""The measuring command on a few rows: it says what watching takes, and no more than the run took."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from batchgen.bench.progress import WATCHERS, counting
from batchgen.metrics import Meter

COMMAND = Path(__file__).parents[1] / "jobs" / "bench_progress.py"


def test_what_watching_costs_is_told() -> None:
    options = ["--rows", "600", "--page-s", "0", "--no-metrics"]
    ended = subprocess.run([sys.executable, str(COMMAND), *options], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert 0 < found["progress_cpu_s"] < found["run_cpu_s"]
    assert 0 < found["page_cpu_s"] <= found["progress_cpu_s"]
    assert found["share_of_cpu"] == pytest.approx(found["progress_cpu_s"] / found["run_cpu_s"], rel=0.01)


def test_what_is_counted_is_put_back() -> None:
    before = [getattr(owner, name) for owner, name in WATCHERS]
    assert (Meter, "note") in WATCHERS
    with counting(1.0) as spent:
        assert [getattr(owner, name) for owner, name in WATCHERS] != before
        assert len(spent) == len(WATCHERS)
    assert [getattr(owner, name) for owner, name in WATCHERS] == before


@pytest.mark.ray
def test_metrics_are_told_to_a_ray_and_counted() -> None:
    command = [sys.executable, str(COMMAND), "--rows", "600"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])
    assert 0 < found["note_cpu_s"] < found["progress_cpu_s"] < found["run_cpu_s"]
    assert found["worker_metrics_cpu_s"] > 0
    assert found["native_threads_cpu_s"] >= 0
