"""What the command prints for programs and for people, in this process: whole runs are in test_run.py."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from jobs_util import make_tree, write_file, write_spec
from typer.testing import CliRunner, Result

from batchgen import cli
from batchgen.errors import LeaseLost


def invoke(*args: str) -> Result:
    return CliRunner().invoke(cli.app, list(args))


def read_last_line(result: Result) -> dict[str, Any]:
    return dict(json.loads(result.stdout.splitlines()[-1]))


@pytest.mark.parametrize("command", ["validate", "plan", "run", "status", "report", "cancel"])
def test_a_refusal_is_the_last_line_too(tmp_path: Path, command: str) -> None:
    result = invoke(command, str(tmp_path / "nothing"), "--json")
    assert result.exit_code == 2
    line = read_last_line(result)
    assert (line["state"], line["exit_code"]) == ("refused", 2)
    assert result.stderr == f"batchgen: {line['message']}\n"
    assert invoke(command, str(tmp_path / "nothing")).stdout == ""


def test_a_run_that_was_under_way_says_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(*_: object) -> None:
        raise LeaseLost("another driver took it over")

    monkeypatch.setattr(cli.jobs, "watch_run", lose)
    result = invoke("run", write_spec(tmp_path, make_tree("/in", "/out")), "--json")
    assert result.exit_code == 3
    assert read_last_line(result) == {"state": "stopped", "message": "another driver took it over", "exit_code": 3}


@pytest.mark.parametrize("command", ["plan", "validate"])
def test_an_input_that_is_read_again_and_again_is_warned_of(tmp_path: Path, command: str) -> None:
    write_file(tmp_path / "in.parquet", pa.table({"prompt": ["hello"] * 1000}))
    spec = write_spec(tmp_path, make_tree(tmp_path / "in.parquet", tmp_path / "out", output={"rows_per_shard": 10}))
    result = invoke(command, spec)
    assert result.exit_code == 0
    assert "warning: the input is read 50.5 times over" in result.stderr
    assert "write it with smaller row groups (about 10 rows each)" in result.stderr
    assert "times over" not in invoke(command, spec, "--set", "output.rows_per_shard=500").stderr
