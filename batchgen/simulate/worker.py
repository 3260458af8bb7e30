"""A worker in virtual time: open shards, one window, the production order of rows, budgets and placement on one engine.

What goes next is decided by `read_ahead`, how much of a row is asked for by `budget`, on which rank by `placement`: the code
that a real worker runs. Reading, tokenising and the network take no time here; a commit takes `commit_s` beside the work.
Rows that finished before the last flush of the journal survive the worker, as in production.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import overload

from batchgen.budget import Ladder, choose_budget
from batchgen.events import Heartbeat
from batchgen.placement import Placer
from batchgen.read_ahead import ReadAhead, Stretch
from batchgen.records import Lease, ShardProgress, WorkerInfo
from batchgen.simulate.engine import EngineModel, Finished, VirtualEngine
from batchgen.simulate.rank import VirtualRequest
from batchgen.simulate.workload import VirtualRow, Workload


@dataclass(frozen=True, slots=True)
class Policies:
    """Which of the policies a run has, as values. `ladder` without rungs: one shot. `trusts_hints`: rows' expectations are
    their own, so that budgets follow them."""

    is_ordered: bool = True
    has_split: bool = True
    has_placement: bool = False
    ladder: Ladder = Ladder()
    trusts_hints: bool = False


@dataclass(frozen=True, slots=True)
class WorkerModel:
    """All that a virtual worker is made of. `window` in requests."""

    engine: EngineModel
    policies: Policies
    window: int
    num_gpus: float = 8.0
    n: int = 1
    max_prompt_tokens: int | None = None
    commit_s: float = 2.0
    journal_interval_s: float = 30.0


@dataclass(frozen=True, slots=True)
class VirtualTokens(Sequence[int]):
    """Token ids of a row's prompt without holding them: a prefix of its group's, then ids of its own."""

    row: VirtualRow

    def __len__(self) -> int:
        return self.row.prompt_tokens

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[int]: ...
    def __getitem__(self, index: int | slice) -> int | Sequence[int]:
        places = range(self.row.prompt_tokens)[index]
        return self._name(places) if isinstance(places, int) else tuple(map(self._name, places))

    def _name(self, place: int) -> int:
        if self.row.prefix is not None and place < self.row.prefix_tokens:
            return -1 - place - self.row.prefix_tokens * self.row.prefix
        return place + self.row.prompt_tokens * self.row.number


@dataclass(slots=True, eq=False)
class OpenRows:
    """A lease and its rows. `left`: how many requests of each row are to be finished, `sent` how many were sent; `done`
    the tokens of those that were cut off and go on."""

    lease: Lease
    rows: list[VirtualRow]
    left: list[int]
    sent: list[int]
    num_left: int
    num_unsent: int
    done: dict[tuple[int, int], int] = field(default_factory=dict)

    @property
    def progress(self) -> ShardProgress:
        return ShardProgress(self.lease.batch_id, len(self.rows) - self.num_left, 0, self.num_unsent)


class VirtualWorker:
    """See the module. Calls' times never go back. `journal` is the store's: finished rows of shards that are not done."""

    def __init__(
        self, worker_id: str, model: WorkerModel, workload: Workload, journal: dict[int, set[int]], now: float
    ) -> None:
        self.model, self._workload, self._journal = model, workload, journal
        self.engine = VirtualEngine(model.engine, now)
        self.info = WorkerInfo(worker_id, "", worker_id, "virtual", "", model.num_gpus, model.window, 0.0)
        self.open: dict[str, OpenRows] = {}
        self.committed: list[tuple[float, Lease]] = []
        self._ahead: ReadAhead[OpenRows] = ReadAhead()
        self._ahead.sort(model.policies.is_ordered)
        ranks = model.engine.num_ranks
        self._placer = Placer(ranks, max_rows=model.engine.max_batch_size) if model.policies.has_placement else None
        self._inflight: dict[tuple[int, int, int], OpenRows] = {}
        self._unflushed: list[tuple[int, int]] = []
        self._flushed_at = now

    # ---- what the driver calls ---------------------------------------------------------------------------------------

    def assign(self, lease: Lease) -> None:
        shard = lease.shard
        rows = self._workload.draw(shard.number, shard.row_start, shard.num_rows)
        finished = self._journal.get(shard.number, set())
        left = [0 if place in finished else self.model.n for place in range(len(rows))]
        num_left = sum(1 for each in left if each)
        opened = OpenRows(lease, rows, left, [0] * len(rows), num_left, num_left * self.model.n)
        self.open[lease.batch_id] = opened
        places = [place for place, count in enumerate(left) for _ in range(count)]
        if not places:
            self._commit(opened)
            return
        self._ahead.add(Stretch(opened, places, 1.0, [row.expected_tokens for row in rows]))

    def advance(self, until: float) -> None:
        """Work until then, by at most one step more."""
        self._fill()
        while self.engine.now < until:
            ended = self.engine.advance(until)
            for finished in ended:
                self._finish(finished)
            if ended:
                self._fill()
        if self.engine.now - self._flushed_at >= self.model.journal_interval_s:
            self._flush()

    def make_heartbeat(self) -> Heartbeat:
        progress = tuple(opened.progress for opened in self.open.values())
        engine = self.engine
        return Heartbeat(self.info.worker_id, engine.total_tokens, engine.num_inflight, engine.row_seconds, progress)

    def take_committed(self) -> list[tuple[float, Lease]]:
        """(when, lease) of shards that are complete since the last call."""
        committed, self.committed = self.committed, []
        return committed

    @property
    def is_idle(self) -> bool:
        return not self._inflight and not self._ahead.num_rows

    # ---- rows --------------------------------------------------------------------------------------------------------

    def _fill(self) -> None:
        """Longest expected first, or in order, while the window has room."""
        while (room := self.model.window - len(self._inflight)) > 0 and self._ahead.num_rows:
            for stretch, places in self._ahead.take(room, float("inf")):
                for place in places:
                    self._send(stretch.source, place)

    def _send(self, opened: OpenRows, place: int) -> None:
        key = opened.lease.shard.number, place, opened.sent[place]
        opened.sent[place] += 1
        opened.num_unsent -= 1
        self._inflight[key] = opened
        row, rank = opened.rows[place], None
        if self._placer is not None:
            rank = self._placer.place(key, VirtualTokens(row), self.engine.total_tokens)
        self._ask(key, row, 0, rank)

    def _ask(self, key: tuple[int, int, int], row: VirtualRow, done: int, rank: int | None) -> None:
        """The next part of a row. What it leaves behind is kept where it will go on."""
        policies = self.model.policies
        budget = choose_budget(
            policies.ladder,
            num_prompt=row.prompt_tokens,
            num_done=done,
            max_tokens=self._workload.max_tokens,
            max_prompt_tokens=self.model.max_prompt_tokens,
            expected=row.expected_tokens if policies.trusts_hints else None,
        )
        output = min(budget, row.output_tokens - done)
        self.engine.submit(
            VirtualRequest(
                key,
                row.prompt_tokens + done,
                output,
                budget,
                rank,
                key if done else row.prefix,
                row.prompt_tokens + done if done else row.prefix_tokens,
                leaves=key if done + output < row.output_tokens else None,
            )
        )

    def _finish(self, finished: Finished) -> None:
        key = finished.request.key
        assert isinstance(key, tuple)
        opened = self._inflight[key]
        row = opened.rows[key[1]]
        done = opened.done.get((key[1], key[2]), 0) + finished.request.output_tokens
        if self._placer is not None:
            self._placer.release(key, self.engine.total_tokens)
        if done < row.output_tokens:
            opened.done[key[1], key[2]] = done
            if self._placer is not None:
                self._placer.place_again(key, finished.rank, row.prompt_tokens + done, self.engine.total_tokens)
            self._ask(key, row, done, finished.rank if self._placer is not None else None)
            return
        del self._inflight[key]
        opened.left[key[1]] -= 1
        if opened.left[key[1]] == 0:
            opened.num_left -= 1
            self._unflushed.append((key[0], key[1]))
            if opened.num_left == 0:
                self._commit(opened)

    def _commit(self, opened: OpenRows) -> None:
        if any(opened.left):
            raise AssertionError(f"{opened.lease.batch_id} is complete with rows missing")
        del self.open[opened.lease.batch_id]
        self.committed.append((self.engine.now + self.model.commit_s, opened.lease))

    def _flush(self) -> None:
        for shard, place in self._unflushed:
            self._journal.setdefault(shard, set()).add(place)
        self._unflushed = []
        self._flushed_at = self.engine.now

    # ---- what it was worth -------------------------------------------------------------------------------------------

    def list_lost(self) -> Iterator[int]:
        """Tokens of each row that must be generated again if the worker is lost now."""
        made = self.engine.count_tokens()
        for key, opened in self._inflight.items():
            yield made.get(key, 0) + opened.done.get((key[1], key[2]), 0)
