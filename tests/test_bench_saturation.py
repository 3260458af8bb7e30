"""The measuring command on a few rows: what it says is possible at all, and it says it in one line."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

COMMAND = Path(__file__).parents[1] / "jobs" / "bench_saturation.py"


def measure(*options: str) -> dict[str, Any]:
    ended = subprocess.run([sys.executable, str(COMMAND), *options], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    return dict(json.loads(ended.stdout))


def test_slots_are_never_busier_than_they_can_be(tmp_path: Path) -> None:
    options = ["--rows", "24", "--slots", "8", "--shards", "4", "--hints", "exact", "--workers", "2"]
    found = measure("slots", "--folder", str(tmp_path), *options)
    assert 0 < found["saturation"] <= 1.001
    assert found["over_longest_first"] >= 0.74, "no schedule is more than a quarter shorter"
    assert found["outside_s"] > 0


@pytest.mark.parametrize("text", [(), ("--text",)])
def test_the_cpu_of_a_row_is_told_in_parts(tmp_path: Path, text: tuple[str, ...]) -> None:
    found = measure("cpu", "--folder", str(tmp_path), "--rows", "300", "--prompt-tokens", "8", *text)
    parts = [found[name] for name in ("engine_us", "tokenizer_us", "ours_us")]
    assert sum(parts) == pytest.approx(found["all_us"], rel=1e-3)
    assert found["engine_us"] > 0
    assert (found["tokenizer_us"] > 0) == bool(text)
