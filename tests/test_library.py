"""batchgen as a library: in a plain process, inside a running event loop, and light to import."""

import asyncio
import json
import logging
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import batchgen
from batchgen.errors import SpecError

SIMULATED = {"kind": "simulated", "has_latency": False}


def make_tree(folder: Path, num_rows: int = 6) -> dict[str, Any]:
    if not (folder / "in.parquet").exists():
        pq.write_table(pa.table({"q": [f"q{row}" for row in range(num_rows)]}), folder / "in.parquet")
    return {
        "input": {"paths": str(folder / "in.parquet")},
        "prompt": {"column": "q"},
        "engine": SIMULATED,
        "output": {"path": str(folder / "out")},
        "cluster": {"pool": "inline"},
    }


def test_run_inside_a_running_event_loop(tmp_path: Path) -> None:
    """As a notebook's cell is: the loop of this thread runs already."""

    async def cell() -> batchgen.RunResult:
        return batchgen.run(make_tree(tmp_path))

    result = asyncio.run(cell())
    assert (result.state, result.exit_code, result.num_rows_ok, result.num_rows_error) == ("finished", 0, 6, 0)
    assert (Path(result.output) / "_SUCCESS").exists()
    assert batchgen.run(make_tree(tmp_path)).num_rows_ok == 6, "again: everything is done"


def test_run_takes_a_path_with_overrides(tmp_path: Path) -> None:
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(make_tree(tmp_path)))
    assert batchgen.run(path, ["sampling.n=2"], limit=2).num_rows_ok == 4
    with pytest.raises(SpecError, match="change the values themselves"):
        batchgen.run(make_tree(tmp_path), ["sampling.n=2"])


def test_the_embedded_model_answers_in_the_order_of_the_prompts() -> None:
    async def cell() -> list[batchgen.Answer]:
        prompts = ["What is 7 + 5?", "What is 40 - 2?"]
        return batchgen.generate(prompts, sampling={"temperature": 0, "max_tokens": 16})

    answers = asyncio.run(cell())
    assert [(answer.index, answer.finish_reason, answer.error_type) for answer in answers] == [
        (0, "stop", None),
        (1, "stop", None),
    ]
    assert all(answer.completion_tokens for answer in answers)


def test_generate_takes_chats_and_keeps_failures_as_data() -> None:
    chats = [[{"role": "user", "content": "hi"}], [{"role": "user", "content": "ho"}], []]
    answers = batchgen.generate(chats, engine=SIMULATED, sampling={"n": 2})
    assert [(answer.index, answer.sample_index) for answer in answers] == [(i, s) for i in range(3) for s in range(2)]
    assert [answer.error_type for answer in answers] == [None] * 4 + ["bad_messages"] * 2
    assert batchgen.generate([]) == []


def test_prompts_that_cannot_be_are_refused_without_being_quoted() -> None:
    with pytest.raises(SpecError, match="in one form"):
        batchgen.generate(["a", [{"role": "user", "content": "b"}]], engine=SIMULATED)  # type: ignore[list-item]
    with pytest.raises(SpecError) as refused:
        batchgen.generate(["fine", 7_777_777], engine=SIMULATED)  # type: ignore[list-item]
    assert "7777777" not in str(refused.value)
    chats = [[{"role": "user", "content": "a"}], [{"role": "user", "content": 7_777_777}]]
    with pytest.raises(SpecError, match="give texts, or chats") as refused:
        batchgen.generate(chats, engine=SIMULATED)
    assert "7777777" not in "".join(traceback.format_exception(refused.value))


def test_events_reach_the_users_own_logging(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "batchgen"):
        batchgen.run(make_tree(tmp_path))
    events = [getattr(record, "event", None) for record in caplog.records]
    assert events[0] == "run_started"
    assert events[-1] == "run_ended"
    committed = [record for record in caplog.records if getattr(record, "event", None) == "shard_committed"]
    assert sum(record.ids["rows_ok"] for record in committed) == 6
    assert all(record.run == {"job": record.run["job"], "epoch": 1} for record in committed)


def test_a_run_that_has_nothing_to_do_ends_its_log_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    batchgen.run(make_tree(tmp_path))
    with caplog.at_level(logging.INFO, "batchgen"):
        batchgen.run(make_tree(tmp_path))
    last = caplog.records[-1]
    assert (last.event, last.run["epoch"], last.ids["exit_code"]) == ("run_ended", 2, 0)  # type: ignore[attr-defined]


def test_importing_is_light_and_offers_what_it_says() -> None:
    code = (
        "import sys, batchgen; before = set(sys.modules); assert 'pyarrow' not in before and 'pydantic' not in before\n"
        "import typing; [getattr(batchgen, name) for name in batchgen.__all__]\n"
        "assert callable(batchgen.run) and callable(batchgen.generate)\n"
        "import batchgen.driver.run; assert batchgen.run.__module__ == 'batchgen.library'\n"
        "try: batchgen.nothing\nexcept AttributeError: print('ok')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("ok\n", 0), done.stderr
