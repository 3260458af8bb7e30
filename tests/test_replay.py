"""`batchgen replay`: any row's request again, exactly, and its answer where the engine repeats itself."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from jobs_util import Tree, make_prompts, make_tree, read_rows, run, run_cli, write_file
from typer.testing import CliRunner

from batchgen.cli import app
from batchgen.engines.simulated import ByteTokenizer
from batchgen.errors import EngineDied
from batchgen.replay import Replay, describe_stored, list_texts, send
from batchgen.specs.load import make_spec
from batchgen.storage import Storage


def replay(out: Path | str, *args: str) -> tuple[int, dict[str, Any]]:
    ended = CliRunner().invoke(app, ["replay", str(out), "--json", *args])
    return ended.exit_code, dict(json.loads(ended.stdout.splitlines()[-1]))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    write_file(tmp_path / "in.parquet", make_prompts(25), row_group_size=7)
    tree = make_tree(
        tmp_path / "in.parquet", tmp_path / "out", sampling={"n": 2, "seed": 3}, input={"custom_id": "key"}
    )
    assert run(tree)[0]["exit_code"] == 0
    return tmp_path / "out"


def test_a_row_is_rebuilt_by_key_and_by_place(out: Path) -> None:
    code, by_key = replay(out, "--row", "row-13", "--sample", "1")
    _, by_place = replay(out, "--row", f"{out.parent}/in.parquet:13", "--sample", "1")
    assert (code, by_key) == (0, by_place)
    row = next(row for row in read_rows(out) if (row["source_row"], row["sample_index"]) == (13, 1))
    request = by_key["request"]
    asked = ByteTokenizer().encode_chat([{"role": "user", "content": "question number 13 é"}], thinking=False)
    assert request["token_ids"] == asked
    assert (request["source_row"], request["sample_index"]) == (13, 1)
    assert request["fingerprint"] == row["row_fingerprint"].hex()
    assert by_key["is_same_request"] is True
    assert by_key["stored"]["batch_id"] == row["batch_id"]
    assert "text" not in by_key["stored"]
    assert "text" not in request


def test_text_is_shown_to_who_asks(out: Path) -> None:
    _, told = replay(out, "--row", "row-2", "--show-text")
    row = next(row for row in read_rows(out) if (row["source_row"], row["sample_index"]) == (2, 0))
    assert told["stored"]["text"] == row["text"]
    assert "question number 2 é" in told["request"]["text"]


@pytest.mark.parametrize("sample", ["0", "1"])
def test_it_runs_again_and_compares(out: Path, sample: str) -> None:
    code, told = replay(out, "--row", "row-7", "--sample", sample, "--run")
    assert (code, told["differs"], told["is_same_request"]) == (0, [], True)
    assert "text" not in told["answer"]
    code, told = replay(out, "--row", "row-7", "--sample", sample, "--run", "--set", "sampling.seed=4")
    assert (code, told["is_same_request"]) == (1, False)
    assert "text" in told["differs"]


def test_a_bad_row_says_why_it_made_no_request(tmp_path: Path) -> None:
    write_file(tmp_path / "in.parquet", pa.table({"prompt": pa.array(["a", None])}))
    tree: Tree = make_tree(tmp_path / "in.parquet", tmp_path / "out", retry={"max_error_rate": 1.0})
    run(tree)
    row = f"{tmp_path}/in.parquet:1"
    code, told = replay(tmp_path / "out", "--row", row)
    types = (told["request"]["failure"]["error_type"], told["stored"]["error_type"])
    assert (code, types) == (0, ("null_prompt", "null_prompt"))
    code, told = replay(tmp_path / "out", "--row", row, "--run")
    assert (code, told["state"]) == (2, "refused")


def test_a_servers_words_about_an_error_are_text(tmp_path: Path) -> None:
    """They may quote the prompt; our own, and those of engines that are ours, quote none."""
    stored = {"status": "error", "error_message": "no: 'somebody's prompt'", "text": None}
    server: Tree = {"engine": {"kind": "openai", "base_urls": ["http://127.0.0.1:9/v1"], "model": "m"}}
    for over, is_shown in ((server, False), ({}, True)):
        spec = make_spec(make_tree(tmp_path / "in.parquet", tmp_path / "out") | over)
        assert ("error_message" in (describe_stored(stored, list_texts(spec, show_text=False)) or {})) is is_shown
        assert "error_message" in (describe_stored(stored, list_texts(spec, show_text=True)) or {})


def test_an_engine_that_does_not_open_is_closed(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Broken:
        async def open(self) -> None:
            done.append("open")
            raise EngineDied("its server came up half")

        async def close(self) -> None:
            done.append("close")

    monkeypatch.setattr("batchgen.replay.create_engine", lambda _: Broken())
    with pytest.raises(EngineDied):
        asyncio.run(send(Replay(Storage(str(out)), "row-1", 0), show_text=False))
    assert done == ["open", "close"]


REFUSED = [
    ("nobody", "0", "no committed row has this custom_id"),
    ("{file}:25", "0", "the file has rows 0 to 24"),
    ("row-1", "2", "the job has samples 0 to 1"),
]


@pytest.mark.parametrize(("row", "sample", "told"), REFUSED)
def test_what_is_not_there_is_refused(out: Path, row: str, sample: str, told: str) -> None:
    row = row.replace("{file}", f"{out.parent}/in.parquet")
    code, refusal = replay(out, "--row", row, "--sample", sample)
    assert code == 2
    assert told in refusal["message"]


def test_the_embedded_model_repeats_a_greedy_row(tmp_path: Path) -> None:
    """A real engine and tokenizer, in a process of its own, as a user would."""
    write_file(tmp_path / "in.parquet", pa.table({"prompt": ["What is 2 + 3?", "What is 40 + 2?"]}))
    tree = make_tree(tmp_path / "in.parquet", tmp_path / "out", sampling={"temperature": 0, "max_tokens": 16})
    tree["engine"] = {"kind": "transformers"}
    assert run(tree)[0]["exit_code"] == 0
    ended = run_cli(tmp_path, "replay", str(tmp_path / "out"), "--row", f"{tmp_path}/in.parquet:1", "--run", "--json")
    told = json.loads(ended.out.splitlines()[-1])
    assert (told["is_same_request"], told["differs"]) == (True, [])


@pytest.mark.s3
def test_a_row_on_s3_is_rebuilt_and_sent_again(s3_url: str) -> None:
    """Input and output there; and a row that was taken from an earlier output like any other."""
    write_file(f"{s3_url}/in.parquet", make_prompts(25), row_group_size=7)
    keyed = {"input": {"custom_id": "key"}, "sampling": {"seed": 3}}
    first = make_tree(f"{s3_url}/in.parquet", f"{s3_url}/out", **keyed)
    assert run(first)[0]["exit_code"] == 0
    second = make_tree(f"{s3_url}/in.parquet", f"{s3_url}/later", **keyed)
    second["input"]["reuse_from"] = f"{s3_url}/out"
    assert run(second)[0]["job"]["rows_reused"] == 25
    row = next(row for row in read_rows(f"{s3_url}/later") if row["source_row"] == 13)
    for out in (f"{s3_url}/out", f"{s3_url}/later"):
        for name in ("row-13", f"{s3_url}/in.parquet:13"):
            code, told = replay(out, "--row", name, "--run")
            assert (code, told["is_same_request"], told["differs"]) == (0, True, [])
            assert told["request"]["fingerprint"] == row["row_fingerprint"].hex()
    assert told["stored"]["reused_from"] == row["reused_from"] == f"{s3_url}/out/{row['reused_from'].split('/')[-1]}"
    code, told = replay(f"{s3_url}/nowhere", "--row", "row-13")
    assert (code, told["state"]) == (2, "refused")
