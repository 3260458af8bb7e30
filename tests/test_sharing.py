"""Shards that end a run are split between workers, whoever dies while that goes on: real workers, one process.

`CrashingPool` ends workers without mercy at a step of the protocol, as a lost node would: what was not journaled is gone.
"""

import contextlib
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from jobs_util import (
    RecordingView,
    Tree,
    check_conserved,
    check_output,
    count_calls,
    list_output,
    make_prompts,
    make_tree,
    merge,
    read_stats,
    run,
    write_file,
    write_prompts,
)

import batchgen.driver.run
from batchgen.driver.dispatch import Dispatcher
from batchgen.driver.inline_pool import InlinePool
from batchgen.engines.simulated import SimulatedEngine
from batchgen.metrics import Meter
from batchgen.queue.events import JournalFlushed, PoolEvent, RowsGiven, ShardCommitted, ShareEnded, WorkerLost
from batchgen.queue.orders import GiveRows, HelpShare, Order, TakeIn
from batchgen.queue.tail import TailPolicy
from batchgen.records import Generation, Request
from batchgen.storage import Storage
from batchgen.worker.handoff import list_handoffs, make_handoff_path, read_handoff, write_handoff
from batchgen.worker.worker import WorkerSetup

ROWS = 120
# Splits as soon as anybody runs dry, however little there is to gain: the protocol is what is tried here.
EAGER = TailPolicy(min_gain_s=0.0, ahead_share=0.5, look_s=0.02)
QUICK = {
    "has_latency": True,
    "slots": 4,
    "max_inflight": 4,
    "decode_tokens_per_s": 600,
    "sigma": 0.5,
    "mean_tokens": 12,
}

Step = Callable[[Any], bool]
# (name, what is seen: an order on its way out or an event on its way in)
STEPS: dict[str, Step] = {
    "asked": lambda seen: isinstance(seen, GiveRows),
    "given": lambda seen: isinstance(seen, RowsGiven) and seen.num_requests > 0,
    "helping": lambda seen: isinstance(seen, HelpShare),
    "ended": lambda seen: isinstance(seen, ShareEnded),
    "taken in": lambda seen: isinstance(seen, TakeIn),
}


@dataclass
class Crash:
    """When to kill whom: at the nth time the step is seen. `before`: the order or event itself is lost with the worker."""

    step: Step
    victims: tuple[str, ...]
    nth: int = 1
    num_seen: int = 0
    killed: list[str] = field(default_factory=list)


class CrashingPool(InlinePool):
    crash: Crash | None = None
    seen: list[Any]

    def __init__(self, setup: WorkerSetup) -> None:
        super().__init__(setup)
        self.seen = []
        self._news: list[PoolEvent] = []
        self._share: Any = None
        self._doomed: list[random.Random] = []

    def tell(self, worker_id: str, order: Order) -> None:
        super().tell(worker_id, order)
        self._look(order)

    def poll(self, timeout_s: float) -> list[PoolEvent]:
        found = super().poll(min(timeout_s, 0.05))
        while self._doomed and self._threads:
            self._end(self._doomed.pop().choice(sorted(self._threads)))
        for event in found:
            if not self.crash or getattr(event, "worker_id", None) not in self.crash.killed:
                self._look(event)
        events = [
            event for event in found if getattr(event, "worker_id", "") not in (self.crash or Crash(bool, ())).killed
        ]
        news, self._news = self._news, []
        return [*events, *news]

    def _look(self, seen: Any) -> None:
        self.seen.append(seen)
        self._share = getattr(seen, "share", self._share)
        if self.crash is None or not self.crash.step(seen):
            return
        self.crash.num_seen += 1
        if self.crash.num_seen == self.crash.nth:
            for victim in self.crash.victims:
                self._end(self._share.owner_id if victim == "owner" else self._share.lease.worker_id)

    def doom(self, draw: random.Random) -> None:
        """End some worker at the next poll. From any thread."""
        self._doomed.append(draw)

    def _end(self, worker_id: str) -> None:
        assert self.crash is not None
        self.kill(worker_id)
        self.crash.killed.append(worker_id)
        self._news.append(WorkerLost(worker_id, "killed by the test"))


@contextlib.contextmanager
def splitting(monkeypatch: pytest.MonkeyPatch, crash: Crash | None = None) -> Iterator[list[CrashingPool]]:
    pools: list[CrashingPool] = []
    make_dispatcher = batchgen.driver.run.make_dispatcher

    def create_pool(setup: WorkerSetup) -> CrashingPool:
        pools.append(CrashingPool(setup))
        pools[-1].crash = crash
        return pools[-1]

    def make_eager(*args: Any) -> Dispatcher:
        dispatcher = make_dispatcher(*args)
        dispatcher.sharing.policy = dispatcher.staffing.tail = EAGER
        return dispatcher

    with monkeypatch.context() as patch:
        patch.setitem(batchgen.driver.run.run_job.__kwdefaults__, "create_pool", create_pool)
        patch.setattr(batchgen.driver.run, "make_dispatcher", make_eager)
        yield pools


@pytest.fixture
def files(tmp_path: Path) -> list[tuple[str, int]]:
    return write_prompts(tmp_path / "in", (ROWS,))


@pytest.fixture
def tree(tmp_path: Path, files: list[tuple[str, int]]) -> Tree:
    """One shard for two workers: one of them has nothing to do but help."""
    del files
    places = (tmp_path / "in", tmp_path / "out", tmp_path / "calls")
    return make_tree(*places, engine=QUICK, output={"rows_per_shard": ROWS, "journal_interval_s": 0.1})


def check(tree: Tree, files: list[tuple[str, int]], n: int = 1) -> dict[str, dict[str, Any]]:
    out = tree["output"]["path"]
    check_output(out, files, n)
    check_conserved(out, files, n)
    assert not [name for name in list_output(out, "_batchgen/journal") if name.endswith(".json")], "a handoff is left"
    return read_stats(out)


def test_one_shard_is_made_by_two_workers_and_committed_by_one(
    tree: Tree, files: list[tuple[str, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []
    monkeypatch.setattr(Meter, "note", lambda _, rows: counted.extend(rows["source_row"].to_pylist()))
    with splitting(monkeypatch) as pools:
        report, view = run(tree)
    assert report["exit_code"] == 0
    assert view.warned == []
    assert len(counted) == len(set(counted)) == ROWS, "the metrics count what a helper made, too"
    stats = check(tree, files)
    assert count_calls(tmp_path / "calls") == ROWS, "nothing was generated twice"
    shared = [row for row in stats.values() if row["outcome"] == "shared"]
    (own,) = (row for row in stats.values() if row["outcome"] == "committed")
    assert shared
    assert {row["worker"] for row in shared} != {own["worker"]}
    assert own["num_rows_ok"] + sum(row["num_rows_ok"] for row in shared) == ROWS
    assert own["num_rows_from_journal"] == sum(row["num_rows_ok"] for row in shared)
    assert all(row["wall_s"] > 0 and row["completion_tokens"] > 0 for row in shared)
    assert sum(isinstance(seen, ShardCommitted) for seen in pools[0].seen) == 1
    assert not any(isinstance(seen, JournalFlushed) and len(seen.refs) == 0 for seen in pools[0].seen)


def test_the_same_rows_come_out_split_or_not(
    tree: Tree, files: list[tuple[str, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with splitting(monkeypatch):
        run(tree)
    plain = merge(tree, {"output": {"path": str(tmp_path / "plain")}, "engine": {"has_latency": False}})
    run(plain)
    columns = ("custom_id", "text", "completion_tokens", "finish_reason")
    rows = [check_output(tmp_path / name, files) for name in ("out", "plain")]
    assert [[row[c] for c in columns] for row in rows[0]] == [[row[c] for c in columns] for row in rows[1]]


def test_n_samples_are_split_too(
    tree: Tree, files: list[tuple[str, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with splitting(monkeypatch):
        run(merge(tree, {"sampling": {"n": 3}}))
    assert any(row["outcome"] == "shared" for row in check(tree, files, 3).values())
    assert count_calls(tmp_path / "calls") == 3 * ROWS


@pytest.mark.parametrize("victims", [("owner",), ("helper",), ("owner", "helper")], ids=" and ".join)
@pytest.mark.parametrize("step", STEPS)
def test_whoever_dies_while_a_shard_is_split_every_row_is_there_once(
    tree: Tree,
    files: list[tuple[str, int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    victims: tuple[str, ...],
) -> None:
    crash = Crash(STEPS[step], victims)
    with splitting(monkeypatch, crash):
        report, view = run(tree)
    assert report["exit_code"] == 0, view.warned
    assert len(crash.killed) == len(victims), "it never came so far"
    stats = check(tree, files)
    lost = [row for row in stats.values() if row["outcome"] == "lost"]
    assert ("owner" in victims) <= bool(lost), "an attempt that was lost is accounted for"
    # A crash costs what was in flight and one interval; a share that outlives its owner may be made twice as well.
    assert count_calls(tmp_path / "calls") <= 2 * ROWS


@pytest.mark.parametrize("seed", range(4))
def test_workers_that_die_at_any_time_cost_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Not at a step of the protocol but whenever: three workers, shards of any size, up to four deaths."""
    draw = random.Random(seed)
    files, n = write_prompts(tmp_path / "in", (80, 47)), draw.choice([1, 2])
    tree = make_tree(
        tmp_path / "in", tmp_path / "out", tmp_path / "calls", engine=QUICK, sampling={"n": n},
        output={"rows_per_shard": draw.choice([20, 60, 200]), "journal_interval_s": draw.choice([0.05, 0.2])},
        cluster={"workers": {"min": 3, "max": 3}}, retry={"max_shard_attempts": 50, "max_start_failures": 50},
    )  # fmt: skip
    with splitting(monkeypatch, Crash(lambda _: False, ())) as pools:
        deaths = [
            threading.Timer(draw.uniform(0.1, 1.0), lambda: pools and pools[0].doom(draw))
            for _ in range(draw.randint(1, 4))
        ]
        for death in deaths:
            death.start()
        report, view = run(tree)
        for death in deaths:
            death.cancel()
    assert report["exit_code"] == 0, view.warned
    check(tree, files, n)


def test_rows_in_error_stay_errors_when_a_helper_made_them(
    tree: Tree, files: list[tuple[str, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = merge(tree, {"engine": {"failure_rate": 0.3}, "retry": {"max_attempts": 1, "max_error_rate": 1.0}})
    with splitting(monkeypatch):
        run(failing)
    rows = check_output(tmp_path / "out", files)
    num_errors = sum(row["status"] == "error" for row in rows)
    assert 0 < num_errors < ROWS
    assert count_calls(tmp_path / "calls") == ROWS
    with splitting(monkeypatch):  # errors are replaced, shares of that too
        run(tree)
    again = check_output(tmp_path / "out", files)
    assert all(row["status"] == "ok" for row in again)
    assert count_calls(tmp_path / "calls") == ROWS + num_errors


def test_passthrough_columns_and_bad_rows_are_the_owners(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = make_prompts(ROWS).append_column("topic", pa.array([f"t{row}" for row in range(ROWS)]))
    prompts = [None if row % 7 == 3 else text for row, text in enumerate(table["prompt"].to_pylist())]
    table = table.set_column(0, "prompt", pa.array(prompts))
    name = write_file(tmp_path / "in" / "a.parquet", table, row_group_size=16)
    tree = make_tree(
        tmp_path / "in", tmp_path / "out", engine=QUICK, output={"rows_per_shard": ROWS},
        input={"passthrough": ["topic"], "custom_id": "key"}, retry={"max_error_rate": 1.0},
    )  # fmt: skip
    with splitting(monkeypatch):
        run(tree)
    rows = check_output(tmp_path / "out", [(name, ROWS)])
    assert [(row["topic"], row["custom_id"]) for row in rows] == [(f"t{i}", f"row-{i}") for i in range(ROWS)]
    assert [row["error_type"] for row in rows] == [("null_prompt" if i % 7 == 3 else None) for i in range(ROWS)]
    assert any(row["outcome"] == "shared" for row in read_stats(tmp_path / "out").values())


def test_a_run_that_is_stopped_while_it_splits_goes_on(
    tree: Tree, files: list[tuple[str, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from batchgen.errors import Cancelled
    from batchgen.specs.load import make_spec

    class StopView(RecordingView):
        def show(self, progress: Any) -> None:
            if any(isinstance(seen, HelpShare) for seen in pools[0].seen) and progress.num_rows_done > 30:
                raise Cancelled("stopped by the test")

    with splitting(monkeypatch) as pools:
        report = batchgen.driver.run.run_job(make_spec(tree), StopView())
    assert report["exit_code"] == 3
    num_calls = count_calls(tmp_path / "calls")
    with splitting(monkeypatch):
        assert run(tree)[0]["exit_code"] == 0
    check(tree, files)
    assert num_calls < ROWS == count_calls(tmp_path / "calls"), "a drain loses nothing, of a share neither"


def test_an_idle_worker_above_the_least_number_is_released(
    tree: Tree, files: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("test_sharing.EAGER", TailPolicy(full_share=2.0, release_after_s=0.1))
    slow = merge(tree, {"engine": {"decode_tokens_per_s": 20, "slots": 64, "max_inflight": 64}})
    slow["cluster"]["workers"] = {"min": 1, "max": 2}
    slow["output"]["rows_per_shard"] = ROWS  # one worker has all the work
    dispatchers: list[Dispatcher] = []
    with splitting(monkeypatch):
        make_eager = batchgen.driver.run.make_dispatcher

        def keep(*args: Any) -> Dispatcher:
            dispatchers.append(make_eager(*args))
            for _ in range(2):
                args[2].start_worker(dispatchers[-1].roster.make_worker_id(dispatchers[-1].clock()))
            return dispatchers[-1]

        monkeypatch.setattr(batchgen.driver.run, "make_dispatcher", keep)
        report, view = run(slow)
    assert report["exit_code"] == 0, view.warned
    assert dispatchers[0].roster.num_released == 1
    assert len(dispatchers[0].roster.workers) == 1
    assert view.warned == []
    check(slow, files)


# ---- handoffs --------------------------------------------------------------------------------------------------------


def test_a_handoff_is_read_as_it_was_written_and_found_again(tmp_path: Path) -> None:
    storage, slots = Storage(str(tmp_path / "out")), [(3, 0), (7, 1)]
    for _ in range(2):  # the second time after a lost reply
        write_handoff(storage, "shard-000000001-e1-a2", slots)
    assert read_handoff(storage, "shard-000000001-e1-a2") == slots
    assert list_handoffs(storage) == [make_handoff_path("shard-000000001-e1-a2")]


# ---- rows that an engine has begun ---------------------------------------------------------------------------------------

BEGUN = 10
MOVING = TailPolicy(min_gain_s=0.0, look_s=0.02, min_move_gain_s=-1e9, settle_s=0.1, trial_share=0.5)


@pytest.fixture
def begun_files(tmp_path: Path) -> list[tuple[str, int]]:
    return write_prompts(tmp_path / "in", (BEGUN,))


@pytest.fixture
def begun_tree(tmp_path: Path, begun_files: list[tuple[str, int]]) -> Tree:
    """One worker's engine takes all rows at once, so that the other has nothing to do but go on with what it has begun."""
    del begun_files
    engine = {"has_latency": True, "slots": BEGUN, "max_inflight": BEGUN, "decode_tokens_per_s": 100}
    return make_tree(
        tmp_path / "in", tmp_path / "out", tmp_path / "calls",
        engine={**engine, "sigma": 0.4, "mean_tokens": 90, "token_budget": 30},
        sampling={"max_tokens": 400}, output={"rows_per_shard": BEGUN, "journal_interval_s": 0.1},
    )  # fmt: skip


@contextlib.contextmanager
def moving(monkeypatch: pytest.MonkeyPatch, crash: Crash | None = None) -> Iterator[list[CrashingPool]]:
    with splitting(monkeypatch, crash) as pools, monkeypatch.context() as patch:
        patch.setitem(globals(), "EAGER", MOVING)
        yield pools


def list_given(pool: CrashingPool) -> list[int]:
    """How many rows were given at each time that some were asked for which an engine had begun."""
    asked = {one.share.lease.batch_id for one in pool.seen if isinstance(one, GiveRows) and one.is_begun}
    return [one.num_requests for one in pool.seen if isinstance(one, RowsGiven) and one.share.lease.batch_id in asked]


def check_texts(tree: Tree, files: list[tuple[str, int]], tmp_path: Path) -> None:
    """They are those of a run in which every answer came in one piece."""
    run(merge(tree, {"output": {"path": str(tmp_path / "plain")}, "engine": {"has_latency": False}}))
    columns = ("custom_id", "text", "prompt_tokens", "completion_tokens", "finish_reason")
    rows = [check_output(tmp_path / name, files) for name in ("out", "plain")]
    assert [[row[c] for c in columns] for row in rows[0]] == [[row[c] for c in columns] for row in rows[1]]


def test_rows_that_were_begun_go_on_at_an_idle_engine(
    begun_tree: Tree, begun_files: list[tuple[str, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts: list[tuple[int, int, int]] = []
    generate = SimulatedEngine.generate

    async def record(self: SimulatedEngine, request: Request) -> Generation:
        done = 0 if request.partial is None else len(request.partial.token_ids)
        parts.append((id(self), request.row_id.source_row, done))
        return await generate(self, request)

    monkeypatch.setattr(SimulatedEngine, "generate", record)
    with moving(monkeypatch) as pools:
        report, view = run(begun_tree)
    assert report["exit_code"] == 0, view.warned
    assert sum(list_given(pools[0])) > 0
    stats = check(begun_tree, begun_files)
    assert {row["outcome"] for row in stats.values()} == {"committed", "shared"}
    engines: dict[int, set[int]] = {}
    for engine, row, _ in parts:
        engines.setdefault(row, set()).add(engine)
    both = {row for row, seen in engines.items() if len(seen) == 2}
    assert both, "a row was on both engines"
    begun_anew = [row for _, row, done in parts if done == 0]
    assert len(begun_anew) == len(set(begun_anew)), "and none of them began anew"
    # Its answer so far was taken in the middle of a part, where no budget ends.
    assert any(done % 30 for _, row, done in parts if row in both)
    check_texts(begun_tree, begun_files, tmp_path)


@pytest.mark.parametrize("victims", [("owner",), ("helper",)], ids=" and ".join)
@pytest.mark.parametrize("step", STEPS)
def test_whoever_dies_while_begun_rows_are_moved_every_row_is_there_once(
    begun_tree: Tree,
    begun_files: list[tuple[str, int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    victims: tuple[str, ...],
) -> None:
    crash = Crash(STEPS[step], victims)
    with moving(monkeypatch, crash):
        report, view = run(merge(begun_tree, {"engine": {"decode_tokens_per_s": 250}}))
    assert report["exit_code"] == 0, view.warned
    assert len(crash.killed) == len(victims), "it never came so far"
    check(begun_tree, begun_files)
    check_texts(begun_tree, begun_files, tmp_path)


@pytest.mark.parametrize(("moves", "num_moved"), [("none", 0), ("unseeded", 0), ("all", 1)])
def test_rows_with_a_seed_are_moved_only_where_the_spec_says_so(
    begun_tree: Tree,
    begun_files: list[tuple[str, int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moves: str,
    num_moved: int,
) -> None:
    tree = merge(begun_tree, {"sampling": {"seed": 7}, "cluster": {"moves": moves}})
    with moving(monkeypatch) as pools:
        report, _ = run(merge(tree, {"engine": {"decode_tokens_per_s": 250}}))
    assert report["exit_code"] == 0
    assert min(1, sum(list_given(pools[0]))) == num_moved
    check(tree, begun_files)
    check_texts(tree, begun_files, tmp_path)
