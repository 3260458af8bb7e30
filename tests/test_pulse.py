"""What a run looks like: rates, the interval of the time left, workers' states; the screen, the log, the status object."""

import dataclasses
import io
import json
import logging
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from batchgen.cli import app
from batchgen.cli.outputs import watch_status
from batchgen.driver import control
from batchgen.driver.control import STATUS, RunStatus, read_run_status, read_status, write_status
from batchgen.driver.screen import format_line, make_screen
from batchgen.logs import Note, in_run, log_event, log_note, note_batch, writing_json
from batchgen.names import make_batch_id
from batchgen.queue.events import Heartbeat
from batchgen.queue.progress import Progress, Tally
from batchgen.queue.pulse import MAX_LINES, MAX_STEPS, Pulse, Snapshot
from batchgen.queue.roster import Roster
from batchgen.queue.trial_queue import TrialQueue
from batchgen.records import ShardProgress, WorkerInfo
from batchgen.spec import ClusterSpec, RetrySpec
from batchgen.storage import Storage


class World:
    """A driver's facts, in virtual time."""

    def __init__(self, num_workers: int = 1) -> None:
        self.queue = TrialQueue([], epoch=1, retry=RetrySpec(), cluster=ClusterSpec())
        self.roster, self.tally, self.pulse = Roster(1.0), Tally(), Pulse()
        for number in range(num_workers):
            info = WorkerInfo(self.roster.make_worker_id(0.0), "b", f"node-{number}", "simulated", "1", 1.0, 8, 0.0)
            self.roster.greet(info, 0.0)
            self.queue.add_worker(info, 0.0)

    def hear(self, worker_id: str, tokens: int, now: float, shards: tuple[ShardProgress, ...] = ()) -> None:
        beat = Heartbeat(worker_id, tokens, 4, 0.0, shards)
        self.tally.hear(beat)
        self.queue.renew(beat, now)

    def look(self, now: float, *, rows: int, of: int = 1000, price: float | None = None) -> Snapshot:
        self.roster.turn(now)
        num_workers, num_tokens = len(self.roster.workers), self.tally.num_tokens
        progress = Progress(of, 10, 0, rows, 0, 0, num_tokens, num_workers, len(self.roster.starting), 4, 8, 0, now)
        return self.pulse.look(progress, self.queue, self.roster, self.tally, now, 0.5, price)


def test_rates_are_of_the_last_half_minute_and_of_the_run() -> None:
    world = World()
    for second in range(101):
        tokens = second * 10 if second <= 60 else 600 + (second - 60) * 50
        world.hear("worker-0001", tokens, float(second))
        seen = world.look(float(second), rows=second)
    assert seen.tokens_per_s == pytest.approx(50)
    assert seen.mean_tokens_per_s == pytest.approx(26)
    assert seen.workers[0].tokens_per_s == pytest.approx(50)
    assert (seen.workers[0].state, seen.worker_states, seen.gpu_hours) == ("idle", {"idle": 1}, 0.5)


def test_a_steady_run_has_a_narrow_interval_and_a_worker_that_joins_halves_the_time() -> None:
    world = World()
    for second in range(1, 101):
        seen = world.look(float(second), rows=5 * second)
    assert seen.eta_s == pytest.approx(100)
    assert seen.eta_low_s == pytest.approx(100)
    assert seen.eta_high_s == pytest.approx(100)
    info = WorkerInfo(world.roster.make_worker_id(100.0), "b", "n", "simulated", "1", 1.0, 8, 0.0)
    world.roster.greet(info, 100.0)
    assert world.look(100.0, rows=500).eta_s == pytest.approx(50)


def test_nothing_is_foreseen_before_anything_is_known() -> None:
    world = World()
    first = world.look(1.0, rows=0)
    assert (first.eta_s, first.eta_low_s, first.tokens_per_s) == (None, None, None)
    assert "ETA -" in format_line(first)
    assert world.look(2.0, rows=1000).eta_s == 0.0


def test_the_cost_so_far_is_told_where_there_is_a_price() -> None:
    world = World()
    assert format_line(world.look(1.0, rows=0)).endswith("GPU-hours 0.50")
    seen = world.look(2.0, rows=0, price=3.0)
    assert seen.cost == 1.5
    assert format_line(seen).endswith("GPU-hours 0.50 (cost 1.50)")


def test_nine_in_ten_ends_fall_into_the_interval() -> None:
    """400 seeded runs whose rows come in independent bursts, each asked at 30 % of its rows when it will end."""
    inside = 0
    for seed in range(400):
        rng, world, rows, now, asked = random.Random(seed), World(), 0, 0.0, None
        while rows < 1000:
            now += 1.0
            rows = min(1000, rows + rng.choice([0, 0, 1, 1, 2, 8]))
            seen = world.look(now, rows=rows)
            if asked is None and rows >= 300:
                asked = (now, seen)
        assert asked is not None
        at, then = asked
        assert then.eta_low_s is not None
        assert then.eta_high_s is not None
        inside += then.eta_low_s <= now - at <= then.eta_high_s
    assert 0.85 <= inside / 400 <= 0.95


def test_what_it_remembers_is_bounded() -> None:
    world = World()
    for second in range(5000):
        seen = world.look(second / 2, rows=second, of=10**6)
    assert len(world.pulse._steps) <= 2 * MAX_STEPS + 1
    assert len(world.pulse._recent) < 100
    assert seen.eta_s == pytest.approx((10**6 - 4999) / 2, rel=0.01)


def test_workers_are_told_by_what_is_wrong_with_them_and_never_too_many() -> None:
    world = World(num_workers=MAX_LINES + 20)
    for worker_id in list(world.roster.workers)[1:]:
        world.hear(worker_id, 0, 60.0)
    next(w for w in world.queue.look_at_workers() if w.info.worker_id == "worker-0005").is_leaving = True
    world.roster.make_worker_id(60.0)
    seen = world.look(60.0, rows=1)
    assert [line.state for line in seen.workers[:3]] == ["silent", "leaving", "idle"]
    assert len(seen.workers) == MAX_LINES
    assert seen.worker_states == {"silent": 1, "leaving": 1, "idle": MAX_LINES + 18, "starting": 1}


def test_errors_are_counted_by_type_in_open_and_committed_shards() -> None:
    world = World()
    world.tally.commit(3, 2, {"null_prompt": 2})
    open_shard = ShardProgress("b", 1, 3, error_types=(("timed_out", 2), ("null_prompt", 1)))
    world.hear("worker-0001", 5, 1.0, (open_shard,))
    seen = world.look(1.0, rows=6)
    assert seen.error_types == {"null_prompt": 3, "timed_out": 2}
    assert "null_prompt 3, timed_out 2" in format_line(seen)


def test_the_screen_shows_it_in_few_lines() -> None:
    world = World(num_workers=MAX_LINES)
    console = Console(file=io.StringIO(), width=100, force_terminal=False)
    console.print(make_screen(world.look(1.0, rows=10), ["running, epoch 1"]))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "10 of 1,000 rows" in shown
    assert "worker-0001" in shown
    assert "and 28 more workers" in shown
    assert len(shown.splitlines()) <= 25


# ---- the log ---------------------------------------------------------------------------------------------------------


def test_an_event_is_one_line_with_the_runs_ids_and_its_own() -> None:
    stream = io.StringIO()
    with writing_json(stream), in_run(job="abc", epoch=3):
        log_event("shard_committed", shard=7, rows_ok=2)
        log_note(Note("worker-0001 was lost: \n gone", "worker_lost", worker="worker-0001"), level=30, event="warning")
        log_note(note_batch(make_batch_id(5, 3, 1), "worker-0002", "no room"), level=30, event="warning")
    log_event("nobody_listens_any_more")
    first, second, third = map(json.loads, stream.getvalue().splitlines())
    assert first.items() >= {"event": "shard_committed", "job": "abc", "epoch": 3, "shard": 7, "level": "info"}.items()
    assert second.items() >= {"event": "worker_lost", "worker": "worker-0001", "level": "warning"}.items()
    assert third.items() >= {"event": "batch_failed", "shard": 5, "worker": "worker-0002"}.items()


def test_a_note_is_a_sentence_that_crosses_processes() -> None:
    import pickle

    note = pickle.loads(pickle.dumps(Note("told", "worker_lost", worker="w")))
    assert (note, note.event, note.ids) == ("told", "worker_lost", {"worker": "w"})


# ---- the status object -----------------------------------------------------------------------------------------------


def test_an_earlier_runs_word_never_replaces_a_later_ones(tmp_path: Path) -> None:
    storage, seen = Storage(str(tmp_path)), World().look(1.0, rows=1)
    write_status(storage, 2, "running", seen, [])
    write_status(storage, 1, "running", seen, [])
    assert json.loads(storage.read_bytes(STATUS))["epoch"] == 2
    write_status(storage, 2, "finished", seen, [])
    write_status(storage, 3, "running", seen, [])
    status = read_status(storage)
    assert status is not None
    assert (status["epoch"], status["state"]) == (3, "running")
    assert read_run_status(storage, status).progress == dataclasses.replace(seen)
    storage.put(STATUS, b"{torn")
    write_status(storage, 3, "running", seen, [])
    assert json.loads(storage.read_bytes(STATUS))["epoch"] == 3


def write_spec(folder: Path, **engine: Any) -> str:
    pq.write_table(pa.table({"q": [f"SECRET prompt {row}" for row in range(40)]}), folder / "in.parquet")
    tree = {
        "input": {"paths": str(folder / "in.parquet")},
        "prompt": {"column": "q"},
        "engine": {"kind": "simulated", "mean_tokens": 20, "sigma": 0.1, "slots": 4, **engine},
        "output": {"path": str(folder / "out")},
        "cluster": {"pool": "inline", "log_interval_s": 0.2},
    }
    (folder / "spec.yaml").write_text(yaml.safe_dump(tree))
    return str(folder / "spec.yaml")


def test_status_watch_follows_a_run_to_its_end_and_a_log_is_json(tmp_path: Path) -> None:
    spec, out = write_spec(tmp_path, decode_tokens_per_s=60, reject_text="prompt 7"), str(tmp_path / "out")
    ran: list[Any] = []
    begun = threading.Event()

    class Waiting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if getattr(record, "event", "") == "progress":
                begun.set()

    handler = Waiting()
    logging.getLogger("batchgen").addHandler(handler)
    runner = threading.Thread(target=lambda: ran.append(CliRunner().invoke(app, ["run", spec])))
    watcher = CliRunner()
    try:
        runner.start()
        assert begun.wait(120)
        found = Storage(out)
        while read_status(found) is None:
            begun.wait(0.05)
        status = read_status(found)
        assert status is not None
        lines = read_run_status(found, status)
        assert lines.progress.num_rows == 40
    finally:
        runner.join(60)
        logging.getLogger("batchgen").removeHandler(handler)
    watched = watcher.invoke(app, ["status", out, "--watch", "--interval", "0.2", "--json"])
    assert watched.exit_code == 0
    assert json.loads(watched.stdout.splitlines()[-1])["state"] == "finished"
    assert "rows 40/40" in watched.stderr
    status = read_status(Storage(out))
    assert status is not None
    last = read_run_status(Storage(out), status).progress
    assert last.mean_tokens_per_s is not None
    assert last.mean_tokens_per_s > 0
    assert last.error_types == {"rejected": 1}
    assert (last.workers, last.worker_states, last.eta_s) == ((), {}, None), "nobody works any more"
    events = [json.loads(line) for line in ran[0].stderr.splitlines()]
    assert {"run_started", "progress", "shard_committed", "run_ended"} <= {event["event"] for event in events}
    assert len({(event["job"], event["epoch"]) for event in events}) == 1
    assert "SECRET" not in ran[0].stderr


@pytest.mark.s3
def test_status_watch_of_a_run_on_s3_from_a_process_of_its_own(tmp_path: Path, s3_url: str) -> None:
    """Which is begun while the run goes on, and ends with it."""
    spec, out = write_spec(tmp_path, decode_tokens_per_s=50), f"{s3_url}/watched"
    command = [sys.executable, "-m", "batchgen.cli"]
    run = subprocess.Popen([*command, "run", spec, "--set", f"output.path={out}"], stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 60
        while (status := read_status(Storage(out))) is None and time.monotonic() < end:
            time.sleep(0.05)
        assert status is not None
        assert status["state"] == "running"
        watch = [*command, "status", out, "--watch", "--interval", "0.2", "--json"]
        watched = subprocess.run(watch, capture_output=True, text=True, timeout=60, check=False)
    finally:
        assert run.wait(60) == 0
    assert watched.returncode == 0, watched.stderr
    told = json.loads(watched.stdout.splitlines()[-1])
    assert (told["state"], told["progress"]["num_rows_done"]) == ("finished", 40)
    rows = [line.split("  ")[0] for line in watched.stderr.splitlines() if line.startswith("rows ")]
    assert rows[-1] == "rows 40/40"
    assert "SECRET" not in watched.stderr


def test_watching_from_a_pipe_tells_each_word_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [{"updated_at": at, "rows": rows} for at, rows in [(1.0, 10), (1.0, 10), (2.0, 20), (2.0, 20), (3.0, 30)]]
    world, rest = World(), iter(words[1:])

    def look(_: Storage, status: dict[str, Any]) -> RunStatus:
        return RunStatus([], world.look(status["updated_at"], rows=status["rows"]), status["updated_at"] == 3.0)

    monkeypatch.setattr(control, "read_status", lambda _: next(rest))
    monkeypatch.setattr(control, "read_run_status", look)
    assert watch_status(Storage(str(tmp_path)), words[0], 0.0)["rows"] == 30
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["rows 10/1,000", "rows 20/1,000"]


def test_a_log_in_text_where_it_is_asked_for(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["run", write_spec(tmp_path, has_latency=False), "--log-format", "text"])
    assert done.exit_code == 0
    assert "40 of 40 (ok 40, error 0)" in done.stderr
    assert not done.stderr.startswith("{")
