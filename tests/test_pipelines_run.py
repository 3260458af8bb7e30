"""Pipelines end to end, without Ray: real jobs, real processes, real kills, hooks that are really told."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pipeline_util import make_eager, make_job, make_pipeline, write_pipeline, write_prompts
from typer.testing import CliRunner

from batchgen.cli import app
from batchgen.pipelines.partitions import make_partition_name

REPO = Path(__file__).parents[1]


def call(*args: str, exit_code: int = 0) -> dict[str, Any]:
    """A command's JSON line."""
    done = CliRunner().invoke(app, [*args, "--json"])
    assert done.exit_code == exit_code, done.output
    value: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return value


@pytest.fixture
def root(tmp_path: Path) -> str:
    write_prompts(tmp_path / "in" / "rows.parquet")
    return str(tmp_path)


def read_ids(folder: str) -> list[str]:
    ids: list[str] = pq.read_table(f"{folder}/data")["custom_id"].to_pylist()
    return ids


def test_a_date_is_run_filtered_judged_published_and_told(root: str, tmp_path: Path) -> None:
    told = tmp_path / "told.json"
    hook = {"command": [sys.executable, "-c", f"import sys; open({str(told)!r}, 'w').write(sys.stdin.read())"]}
    file = write_pipeline(tmp_path / "p.yaml", make_pipeline(root, on_success=[hook]))
    run = call("pipelines", "run", file, "--date", "2026-11-20")
    assert (run["key"], run["state"], run["attempt"]) == ("2026-11-20T0100Z", "succeeded", 1)
    latest = json.loads((tmp_path / "published" / "latest.json").read_text())
    assert latest["logical_date"] == "2026-11-20"
    outputs = {name: value["path"] for name, value in latest["outputs"].items()}
    assert len(read_ids(outputs["generate"])) == 20
    assert read_ids(outputs["judge"]) == [f"q{n}" for n in range(1, 20, 2)]
    payload = json.loads(told.read_text())
    assert (payload["state"], payload["run"], payload["outputs"]) == ("succeeded", run["key"], outputs)
    call("pipelines", "run", file, "--date", "2026-11-20", exit_code=2)
    shown = call("pipelines", "show", file)
    assert [found["key"] for found in shown["runs"]] == [run["key"]]


def test_input_that_does_not_come_fails_the_run_with_its_name(root: str, tmp_path: Path) -> None:
    wait = [{"marker": f"{root}/arrived/{{{{ logical_date }}}}/_DONE"}]
    file = write_pipeline(tmp_path / "p.yaml", make_pipeline(root, wait_for=wait, wait_deadline="1s"))
    run = call("pipelines", "run", file, "--date", "2026-11-20", exit_code=1)
    assert "arrived/2026-11-20/_DONE is not there" in run["message"]
    (tmp_path / "arrived" / "2026-11-20").mkdir(parents=True)
    (tmp_path / "arrived" / "2026-11-20" / "_DONE").write_text("")
    assert call("pipelines", "run", file, "--date", "2026-11-20")["state"] == "succeeded"


def test_a_listing_must_stay_the_same(root: str, tmp_path: Path) -> None:
    wait = [{"stable": f"{root}/in", "unchanged_for": "1s"}]
    file = write_pipeline(tmp_path / "p.yaml", make_pipeline(root, wait_for=wait))
    started = time.monotonic()
    assert call("pipelines", "run", file, "--date", "2026-11-20")["state"] == "succeeded"
    assert time.monotonic() - started > 1.0


def test_a_failed_run_is_tried_again_and_told(root: str, tmp_path: Path) -> None:
    (tmp_path / "in" / "rows.parquet").unlink()
    with receiving(lambda number: 500 if number == 0 else 200) as (url, received):
        file = write_pipeline(tmp_path / "p.yaml", make_pipeline(root, on_failure=[{"webhook": url}]))
        run = call("pipelines", "run", file, "--date", "2026-11-20", exit_code=1)
    assert (run["state"], run["attempt"], run["num_failed"]) == ("failed", 2, 1)
    assert "in" in run["message"]
    assert not (tmp_path / "published").exists()
    assert [body["state"] for body in received] == ["failed", "failed"], "told again after the 500"
    assert len({body["id"] for body in received}) == 1


class receiving:
    """A webhook's receiver. `answer(number of the request)` is the status."""

    def __init__(self, answer: Callable[[int], int]) -> None:
        received: list[Any] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                status = answer(len(received))
                received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(status)
                self.end_headers()

            def log_message(self, *_: Any) -> None: ...

        self._server, self._received = HTTPServer(("127.0.0.1", 0), Handler), received
        self._thread = threading.Thread(target=self._server.serve_forever)

    def __enter__(self) -> tuple[str, list[Any]]:
        self._thread.start()
        return f"http://127.0.0.1:{self._server.server_port}/", self._received

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def test_an_older_date_moves_no_pointer_back_and_retention_keeps_the_newest(root: str, tmp_path: Path) -> None:
    tree = make_pipeline(root, retention={"keep": 1})
    del tree["stages"][1]
    file = write_pipeline(tmp_path / "p.yaml", tree)
    for day in (19, 18):
        call("pipelines", "run", file, "--date", f"2026-11-{day}")
    published = tmp_path / "published"
    assert json.loads((published / "latest.json").read_text())["run"] == "2026-11-19T0100Z"
    assert len(list((published / "dates").iterdir())) == 2
    (tmp_path / "made" / "2026-11-18T0100Z" / "mine.txt").write_text("not a job's")
    with scheduler(file) as process:
        wait_until(lambda: [run["is_deleted"] for run in call("pipelines", "show", file)["runs"]] == [True, False])
        assert process.poll() is None
    left = {path.name for path in (tmp_path / "made" / "2026-11-18T0100Z").rglob("*") if path.is_file()}
    assert left - {"replace.lock"} == {"mine.txt"}, "a local store's lock file stays"
    assert [path.name for path in (published / "dates").iterdir()] == ["2026-11-19T0100Z.json"]
    assert len(read_ids(f"{root}/made/2026-11-19T0100Z")) == 20


def test_a_partition_that_failed_is_all_that_is_made_again(root: str, tmp_path: Path) -> None:
    """Each has its attempts, its input and its end; readers are given the date when all of them are there."""
    tree = make_pipeline(root, retries={"max": 0}, max_active_partitions=2)
    tree["partitions"] = {"lang": ["en", "zh Hant"]}
    tree["wait_for"] = [{"marker": f"{root}/in/{{{{ lang }}}}/_DONE"}]
    tree["wait_deadline"] = "1s"
    tree["stages"][0]["job"]["input"]["paths"] = f"{root}/in/{{{{ lang }}}}/*.parquet"
    for stage in tree["stages"]:
        stage["job"]["output"]["path"] += "/{{ lang }}"
    write_prompts(tmp_path / "in" / "en" / "rows.parquet")
    (tmp_path / "in" / "en" / "_DONE").write_text("")
    file = write_pipeline(tmp_path / "p.yaml", tree)
    run = call("pipelines", "run", file, "--date", "2026-11-20", exit_code=1)
    name = make_partition_name(["zh Hant"])
    assert {part: value["state"] for part, value in run["partitions"].items()} == {"en": "succeeded", name: "failed"}
    assert run["message"].startswith(f"1 of 2 partitions failed; {name}: the input has not arrived")
    assert not (tmp_path / "published").exists()
    assert f"1 failed ({name})" in CliRunner().invoke(app, ["pipelines", "show", file]).output
    write_prompts(tmp_path / "in" / "zh Hant" / "rows.parquet", 6)
    (tmp_path / "in" / "zh Hant" / "_DONE").write_text("")
    run = call("pipelines", "run", file, "--date", "2026-11-20")
    assert [value["attempt"] for value in run["partitions"].values()] == [1, 2], "the other one was not touched"
    assert "partitions: 2 succeeded" in CliRunner().invoke(app, ["pipelines", "show", file]).output
    outputs = json.loads((tmp_path / "published" / "latest.json").read_text())["outputs"]
    assert list(outputs) == ["generate/en", "judge/en", f"generate/{name}", f"judge/{name}"]
    assert outputs[f"judge/{name}"]["partition"] == {"lang": "zh Hant"}
    assert [outputs[f"generate/{part}"]["rows_ok"] for part in ("en", name)] == [20, 6]


def test_the_nightly_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands, with 12 questions of the embedded model's kind."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "nightly" / "prompts" / "2026-11-20"
    folder.mkdir(parents=True)
    pairs = [(f"What is {n} plus {n + 1}?", str(2 * n + 1)) for n in range(12)]
    columns = {"id": [f"q{n}" for n in range(12)], "question": [q for q, _ in pairs], "answer": [a for _, a in pairs]}
    pq.write_table(pa.table(columns), folder / "questions.parquet")
    (folder / "_DONE").write_text("")
    run = call("pipelines", "run", str(REPO / "jobs" / "nightly.yaml"), "--date", "2026-11-20")
    assert run["state"] == "succeeded"
    latest = json.loads((tmp_path / "nightly" / "latest.json").read_text())
    judged = pq.read_table(f"{latest['outputs']['judge']['path']}/data").to_pylist()
    assert judged
    assert all(row["generate_text"] is not None and row["text"] is not None for row in judged)


def test_a_scheduler_that_is_killed_leaves_the_run_to_the_next(root: str, tmp_path: Path) -> None:
    tree = make_pipeline(root)
    del tree["stages"][1]
    tree["stages"][0]["job"]["engine"] = {"kind": "simulated", "mean_tokens": 5, "decode_tokens_per_s": 4.0}
    file = write_pipeline(tmp_path / "p.yaml", tree)
    call("pipelines", "backfill", file, "--from", "2026-11-18", "--to", "2026-11-19")
    for _ in range(2):
        with scheduler(file):
            wait_until(lambda: any(run["state"] == "running" for run in call("pipelines", "show", file)["runs"]))
    with scheduler(file):
        wait_until(lambda: call("pipelines", "list", file)["pipelines"][0]["succeeded"] == 2)
    runs = call("pipelines", "show", file)["runs"]
    assert [(run["state"], run["attempt"]) for run in runs] == [("succeeded", 1)] * 2


def read_report(root: str, stage: str, key: str, lang: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(Path(f"{root}/{stage}/{key}/{lang}/report.json").read_text())
    return report


def test_each_job_expects_the_lengths_of_its_own_stage_and_partition_the_date_before(root: str, tmp_path: Path) -> None:
    """Without a line in the file; one that says null expects none. The report of the job and `show` say which."""
    tree = make_pipeline(root, max_active_partitions=2)
    tree["partitions"] = {"lang": ["en", "de"]}
    for stage in tree["stages"]:
        stage["job"]["output"]["path"] += "/{{ lang }}"
    judge = tree["stages"][1]
    again = make_job(root, "again", "", input={**judge["job"]["input"], "length_prior": None})
    again["output"]["path"] += "/{{ lang }}"
    tree["stages"].append({**judge, "name": "again", "job": {**again, "prompt": judge["job"]["prompt"]}})
    file = write_pipeline(tmp_path / "p.yaml", tree)
    runs = [call("pipelines", "run", file, "--date", f"2026-11-{day}") for day in (19, 20)]
    keys = [run["key"] for run in runs]
    assert [run["length_priors"] for run in runs] == [[], keys[:1]]
    for lang in ("en", "de"):
        for stage, folder in (("made", f"{root}/made/{keys[0]}/{lang}"), ("judged", f"{root}/judged/{keys[0]}/{lang}")):
            first, second = (read_report(root, stage, key, lang) for key in keys)
            assert (first["what"]["length_prior"], second["what"]["length_prior"]) == (None, folder)
        assert read_report(root, "again", keys[1], lang)["what"]["length_prior"] is None
    shown = CliRunner().invoke(app, ["pipelines", "show", file]).output
    assert shown.count(f", lengths expected as in {keys[0]}") == 1
    told = CliRunner().invoke(app, ["report", f"{root}/made/{keys[1]}/en"]).output
    assert "lengths expected" in told
    tree["stages"][1]["job"]["prompt"] = {"template": "Well? {text}"}
    other = call("pipelines", "run", write_pipeline(tmp_path / "p.yaml", tree), "--date", "2026-11-21")
    priors = [read_report(root, stage, other["key"], "en")["what"]["length_prior"] for stage in ("made", "judged")]
    assert priors == [f"{root}/made/{keys[1]}/en", None], "other prompts, other lengths"
    html = Path(f"{root}/made/{keys[1]}/en/report.html").read_text()
    assert f"as measured by {root}/made/{keys[0]}/en" in html


class scheduler:
    """A real `batchgen schedule --local`, killed with SIGKILL at the end."""

    def __init__(self, file: str) -> None:
        command = make_eager("schedule", file, "--local")
        self._process = subprocess.Popen(command, stderr=subprocess.DEVNULL)

    def __enter__(self) -> subprocess.Popen[bytes]:
        return self._process

    def __exit__(self, *_: Any) -> None:
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.wait()


def wait_until(is_so: Callable[[], bool], timeout_s: float = 180) -> None:
    give_up_at = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < give_up_at
        time.sleep(0.1)
