"""What a pipeline's parts do where something goes wrong beside them: another scheduler, a receiver, a row, a clock."""

import json
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pipeline_util import make_pipeline, write_pipeline, write_prompts
from typer.testing import CliRunner

from batchgen.cli import app
from batchgen.cli.pipelines import ask, has_ended
from batchgen.driver.run import run_job
from batchgen.driver.view import QuietView
from batchgen.errors import InputError
from batchgen.pipelines.calendar import parse_key
from batchgen.pipelines.decide import Outcome
from batchgen.pipelines.events import Began, Ended, PartitionEnded, Submitted
from batchgen.pipelines.execute import execute
from batchgen.pipelines.filters import write_filtered
from batchgen.pipelines.hooks import HookFailed, Teller, tell
from batchgen.pipelines.keeper import Keeper
from batchgen.pipelines.limits import with_limits
from batchgen.pipelines.load import load_pipeline
from batchgen.pipelines.log import Log
from batchgen.pipelines.orders import Order, open_folder, write_order, write_outcome
from batchgen.pipelines.spec import HookSpec, PipelineSpec
from batchgen.pipelines.submit import LifeSigns, LocalSubmitter, Status, Submission, SubmitterAway
from batchgen.storage import Storage
from batchgen.write import make_parquet

ONE, OTHER = "2026-11-18T0100Z", "2026-11-19T0100Z"


def make_spec(root: Path, **changes: Any) -> PipelineSpec:
    write_prompts(root / "in" / "rows.parquet")
    file = write_pipeline(root / "p.yaml", make_pipeline(str(root), **changes))
    return load_pipeline(file, datetime(2026, 11, 20, tzinfo=UTC)).spec


class Meddled:
    """A submitter beside which another scheduler ends the other run, at the first look."""

    kind = "local"

    def __init__(self, other: Log) -> None:
        self._other, self._has_meddled = other, False

    def submit(self, submission: Submission) -> None:
        raise AssertionError(submission.id)

    def get_status(self, submission: Submission) -> Status:
        del submission
        if not self._has_meddled:
            self._has_meddled = True
            self._other.catch_up()
            assert self._other.append(PartitionEnded(OTHER, "", "failed", "", 1.0, 0.0))
            assert self._other.append(Ended(OTHER, "failed", "", 0.0))
        return "ended"

    def stop(self, submission: Submission) -> None: ...


def make_keeper(spec: PipelineSpec, submitter: Any, only: str | None = None) -> Keeper:
    return Keeper(spec, submitter, Teller(), time.monotonic, str, str, only)


def submit(spec: PipelineSpec, log: Log, key: str) -> None:
    order = Order(spec=spec, key=key, attempt=1, previous=None, began_at=0.0)
    digest = write_order(open_folder(spec), order)
    assert log.append(Began(key, "asked", 0.0))
    assert log.append(Submitted(key, 1, digest, "local", 0.0))


def end(log: Log, key: str, at: float = 0.0, *hooks: str) -> None:
    """It failed."""
    assert log.append(PartitionEnded(key, "", "failed", "", 0.0, at))
    assert log.append(Ended(key, "failed", "", at, hooks))


def test_a_run_that_another_scheduler_ended_meanwhile_is_not_ended_twice(tmp_path: Path) -> None:
    """An append that loses folds in the other's event, which may be of the run that comes next."""
    spec = make_spec(tmp_path, max_active_runs=2)
    log, folder = Log(open_folder(spec)), open_folder(spec)
    for key in (ONE, OTHER):
        submit(spec, log, key)
        write_outcome(folder, key, "", 1, Outcome(True, gpu_hours=1.0))
    keeper = make_keeper(spec, Meddled(Log(folder)))
    keeper.keep(0.0)
    keeper.keep(0.0)
    runs = Log(folder).catch_up().runs
    assert {key: (run.state, run.gpu_hours) for key, run in runs.items()} == {
        ONE: ("succeeded", 1.0),
        OTHER: ("failed", 1.0),
    }


def test_an_earlier_failure_is_not_taken_for_the_end_of_what_is_asked_for_now(tmp_path: Path) -> None:
    spec = make_spec(tmp_path)
    log = Log(open_folder(spec))
    submit(spec, log, ONE)
    end(log, ONE)
    submit(spec, log, OTHER)  # so there is no room for it yet
    assert ask(spec, [ONE]) == [ONE]
    keeper = make_keeper(spec, Meddled(Log(open_folder(spec))), only=ONE)
    keeper.keep(0.0)
    assert not has_ended(keeper, ONE)


def test_a_second_end_of_a_date_is_told_by_whoever_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One scheduler was there for the first end; another began the date again, ended it and died."""
    monkeypatch.setattr("batchgen.pipelines.aftermath.HOOK_GRACE_S", 0.0)
    told = tmp_path / "told"
    command = [sys.executable, "-c", f"open({str(told)!r}, 'a').write('x')"]
    spec = make_spec(tmp_path, on_failure=[{"command": command}])
    other, keeper = Log(open_folder(spec)), make_keeper(spec, None)
    for number in range(2):
        submit(spec, other, ONE)
        end(other, ONE, float(number), spec.on_failure[0].id)
        give_up_at = time.monotonic() + 120
        while other.catch_up().runs[ONE].hooks_left:
            assert time.monotonic() < give_up_at
            keeper.keep(0.0)
            time.sleep(0.02)
        assert told.read_text() == "x" * (number + 1)


def test_a_hook_that_is_new_is_told_of_no_old_end(tmp_path: Path) -> None:
    told = tmp_path / "told"
    command = [sys.executable, "-c", f"open({str(told)!r}, 'a').write('x')"]
    spec = make_spec(tmp_path)
    log = Log(open_folder(spec))
    submit(spec, log, ONE)
    end(log, ONE)
    later = make_spec(tmp_path, on_failure=[{"command": command}])
    keeper = make_keeper(later, None)
    keeper.aftermath.own_ends.add(ONE)
    keeper.keep(0.0)
    assert has_ended(keeper, ONE), "nothing is left to be told"
    submit(later, keeper.log, OTHER)
    write_outcome(open_folder(later), OTHER, "", 1, Outcome(False, "it failed", can_retry=False))
    keeper.submitter = OnlyEnds()
    wait_until(lambda: keeper.keep(0.0) is None and has_ended(keeper, OTHER))
    assert told.read_text() == "x"


@pytest.mark.parametrize("catchup", [True, False])
def test_a_paused_pipeline_begins_nothing_until_it_is_resumed(tmp_path: Path, catchup: bool) -> None:
    """By the commands. What is at work goes on; of the dates that were missed meanwhile as many begin as `catchup` says."""
    schedule = {"cron": "0 2 * * *", "timezone": "Europe/Berlin", "start": "2026-11-18T00:00:00Z", "catchup": catchup}
    spec, file = make_spec(tmp_path, schedule=schedule, max_active_runs=9), str(tmp_path / "p.yaml")
    keeper, days = make_keeper(spec, Starts()), [parse_key(f"2026-11-{day}T0130Z").timestamp() for day in (18, 19, 21)]
    keeper.keep(days[0])
    command("pause", file)
    for now in days:
        keeper.keep(now)
    command("backfill", file, "--from", "2026-11-17", "--to", "2026-11-17")
    keeper.keep(days[2])
    assert {key: run.state for key, run in keeper.history.runs.items()} == {ONE: "running"}
    assert "nightly" in command("list", file)
    assert "paused" in command("list", file)
    command("resume", file)
    keeper.keep(days[2])
    missed = ["2026-11-19T0100Z", "2026-11-20T0100Z", "2026-11-21T0100Z"]
    assert list(keeper.history.runs) == [ONE, *(missed if catchup else missed[2:]), "2026-11-17T0100Z"]
    assert "paused" not in command("list", file)


def command(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["pipelines", *arguments])
    assert done.exit_code == 0, done.output
    return done.output


class Starts:
    """A submitter whose jobs are all at work."""

    kind = "local"

    def submit(self, submission: Submission) -> None: ...

    def get_status(self, submission: Submission) -> Status:
        del submission
        return "running"

    def stop(self, submission: Submission) -> None: ...


class OnlyEnds:
    """A submitter that knows nothing but ends."""

    kind = "local"

    def submit(self, submission: Submission) -> None:
        raise AssertionError(submission.id)

    def get_status(self, submission: Submission) -> Status:
        del submission
        return "ended"

    def stop(self, submission: Submission) -> None: ...


def wait_until(is_so: Callable[[], bool]) -> None:
    give_up_at = time.monotonic() + 120
    while not is_so():
        assert time.monotonic() < give_up_at
        time.sleep(0.02)


def test_a_keeper_forgets_runs_that_the_history_has_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchgen.pipelines.history.KEPT_RUNS", 5)
    spec = make_spec(tmp_path, wait_for=[{"marker": str(tmp_path / "in" / "rows.parquet")}])
    keeper = make_keeper(spec, OnlyEnds())
    for day in range(40):
        key = f"2026-10-{day + 1:02d}T0100Z" if day < 31 else f"2026-11-{day - 30:02d}T0100Z"
        submit(spec, keeper.log, key)
        write_outcome(keeper.folder, key, "", 1, Outcome(True))
        keeper.keep(0.0)
    assert keeper.history.count("succeeded") == 40
    held = [keeper.aftermath.own_ends, keeper.aftermath._told, keeper.aftermath._seen_ends, keeper.history.runs]
    assert max(map(len, held)) <= 11
    assert not keeper._silent_since
    assert not keeper._arrivals


def test_a_partition_that_left_the_file_ends_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at once: two schedulers are not given a new file in the same second."""
    spec = make_spec(tmp_path)
    keeper = make_keeper(spec, OnlyEnds())
    assert keeper.log.append(Began(ONE, "asked", 0.0, None, ("fr",)))
    keeper.keep(0.0)
    assert keeper.history.runs[ONE].state == "waiting"
    monkeypatch.setattr("batchgen.pipelines.keeper.GONE_GRACE_S", 0.0)
    keeper.keep(0.0)
    assert "no partition 'fr' any more" in keeper.history.runs[ONE].message


def test_while_the_head_is_away_what_waits_for_its_input_too_long_fails(tmp_path: Path) -> None:
    """And nothing is submitted to it."""
    spec = make_spec(tmp_path, max_active_runs=3, wait_for=[{"marker": str(tmp_path / "_DONE")}], wait_deadline="1h")
    keeper = make_keeper(spec, Away())
    submit(spec, keeper.log, ONE)
    assert keeper.log.append(Began(OTHER, "asked", 0.0))
    with pytest.raises(SubmitterAway):
        keeper.keep(3601.0)
    runs = keeper.history.runs
    assert (runs[ONE].state, runs[OTHER].state) == ("running", "failed")
    assert "_DONE is not there" in runs[OTHER].message
    (tmp_path / "_DONE").write_text("")
    assert keeper.log.append(Began("2026-11-17T0100Z", "asked", 3601.0))
    with pytest.raises(SubmitterAway):
        keeper.keep(3602.0)
    assert runs["2026-11-17T0100Z"].state == "waiting"


class Away:
    """A submitter that never answers."""

    kind = "local"

    def submit(self, submission: Submission) -> None:
        raise AssertionError(submission.id)

    def get_status(self, submission: Submission) -> Status:
        raise SubmitterAway(submission.id)

    def stop(self, submission: Submission) -> None:
        raise SubmitterAway(submission.id)


def test_a_filter_that_leaves_nothing_is_not_tried_again(tmp_path: Path) -> None:
    tree = make_pipeline(str(tmp_path))
    tree["stages"][1]["input"]["filter"] = "score > 100"
    write_prompts(tmp_path / "in" / "rows.parquet")
    spec = load_pipeline(write_pipeline(tmp_path / "p.yaml", tree), datetime(2026, 11, 20, tzinfo=UTC)).spec
    order = Order(spec=spec, key=ONE, attempt=1, previous=None, began_at=0.0)
    outcome = execute(order, lambda job: run_job(job, QuietView()), str)
    assert (outcome.is_ok, outcome.can_retry) == (False, False)
    assert "the filter leaves none of its 20 rows" in outcome.message


def test_gpu_hours_of_all_jobs_are_counted(tmp_path: Path) -> None:
    def run(spec: Any) -> dict[str, Any]:
        report = run_job(spec, QuietView())
        report["run"]["gpu_hours"] = 1.5
        return report

    order = Order(spec=make_spec(tmp_path), key=ONE, attempt=1, previous=None, began_at=0.0)
    outcome = execute(order, run, str)
    assert (outcome.is_ok, outcome.gpu_hours) == (True, 3.0)


RUN_ENDS = "2026-11-20T10:00:00+00:00"
OWN = [
    ("2026-11-20T10:30:00+01:00", True),
    ("2026-11-20T09:30:00-01:00", False),
    ("2026-11-20 09:59:00Z", True),
    (None, False),
]


@pytest.mark.parametrize(("own", "is_kept"), OWN)
def test_the_tighter_deadline_holds(own: str | None, is_kept: bool) -> None:
    tree: dict[str, Any] = {"cluster": {} if own is None else {"deadline": own}}
    assert with_limits(tree, RUN_ENDS, None)["cluster"]["deadline"] == (own if is_kept else RUN_ENDS)


def test_a_filter_that_fails_on_a_row_does_not_quote_it(tmp_path: Path) -> None:
    table = pa.table({"text": ["12", "the prompt of somebody"]})
    Storage(str(tmp_path / "out")).create("data/shard-000000000.parquet", make_parquet(table))
    with pytest.raises(InputError) as refused:
        write_filtered("CAST(text AS INTEGER) > 3", "generate", str(tmp_path / "out"), str(tmp_path / "next"))
    assert "somebody" not in f"{refused.value} {refused.value.__cause__} {refused.value.__context__}"
    assert "ConversionException" in str(refused.value)
    with pytest.raises(InputError, match="no_such_column"):
        write_filtered("no_such_column > 3", "generate", str(tmp_path / "out"), str(tmp_path / "next"))


def test_a_receiver_that_speaks_no_http_is_a_hook_that_failed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65_536)
                connection.sendall(b"nonsense\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/"
        with pytest.raises(HookFailed, match="BadStatusLine"):
            tell(HookSpec(webhook=url), {"id": "x"})
        thread.join()


def test_what_a_command_leaves_behind_does_not_hold_it_up() -> None:
    left = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(30)'])"
    started = time.monotonic()
    tell(HookSpec(command=(sys.executable, "-c", left), timeout=25.0), {"id": "x"})
    assert time.monotonic() - started < 25.0


def test_a_machine_that_can_start_no_process_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "no-folder").write_text(json.dumps({}))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "no-folder"))
    submission = Submission(Storage(str(tmp_path)), "nightly", ONE, 1, "order")
    with pytest.raises(SubmitterAway, match="can't be started here"):
        LocalSubmitter(LifeSigns(time.monotonic)).submit(submission)
