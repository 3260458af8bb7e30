"""A worker in virtual time: open shards, one window, the production order of rows, budgets and placement on one engine.

What goes next is decided by `read_ahead`, how much of a row is asked for by `budget`, on which rank by `placement`: code
that a real worker runs. Reading, tokenising and the network take no time here; a commit takes `commit_s` beside the work.
Rows that finished before the last flush of the journal survive the worker, as in production. It obeys the production orders
about shares of a shard; given away are the rows that it would send last, or those that it sent last with what they have so
far (whole rows of one sample only).
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from batchgen.queue.events import Heartbeat, RowsGiven, ShareEnded
from batchgen.queue.orders import DropShare, GiveRows, HelpShare, Order, TakeIn
from batchgen.records import Lease, Share, WorkerInfo
from batchgen.simulate.engine import Finished, VirtualEngine
from batchgen.simulate.open_rows import Committed, Key, OpenRows, VirtualEvent, VirtualStore, VirtualTokens
from batchgen.simulate.policies import WorkerModel
from batchgen.simulate.rank import VirtualRequest
from batchgen.simulate.workload import VirtualRow, Workload
from batchgen.worker.budget import choose_budget
from batchgen.worker.hint_check import HintCheck
from batchgen.worker.placement import Placer
from batchgen.worker.read_ahead import ReadAhead, Stretch


class VirtualWorker:
    """See the module. Calls' times never go back. `placer`: another than the production one."""

    def __init__(
        self,
        worker_id: str,
        model: WorkerModel,
        workload: Workload,
        store: VirtualStore,
        now: float,
        placer: Placer | None = None,
    ) -> None:
        self.model, self._workload, self._store = model, workload, store
        self.engine = VirtualEngine(model.engine, now)
        can_move = model.policies.can_move and model.n == 1 and bool(model.policies.ladder.rungs)
        self.info = WorkerInfo(worker_id, "", worker_id, "virtual", "", model.num_gpus, model.window, 0.0, can_move)
        self.open: dict[str, OpenRows] = {}
        self._events: list[VirtualEvent] = []
        self._ahead: ReadAhead[OpenRows] = ReadAhead()
        self._hints = HintCheck(model.num_requests, model.window)
        ranks = model.engine.num_ranks
        if placer is None and model.policies.has_placement:
            placer = Placer(ranks, max_rows=model.engine.max_batch_size)
        self._placer = placer
        self._inflight: dict[Key, OpenRows] = {}
        self._unflushed: list[tuple[int, int]] = []
        self._integral, self._counted_at = 0.0, now
        self._flushed_at = now

    # ---- what the driver calls ---------------------------------------------------------------------------------------

    def assign(self, lease: Lease) -> None:
        finished = self._store.journal.get(lease.shard.number, set())
        self._open(lease, [place for place in range(lease.shard.num_rows) if place not in finished], None)

    def obey(self, order: Order) -> None:
        match order:
            case GiveRows(share, num_requests, is_begun):
                num_given = self._give_begun(share, num_requests) if is_begun else self._give(share, num_requests)
                self._events.append(RowsGiven(self.info.worker_id, share, num_given))
            case HelpShare(share):
                self._open(share.lease, self._store.handoffs[share.lease.batch_id], share)
            case TakeIn(batch_id, _, ended):
                if (opened := self.open.get(batch_id)) is not None:
                    self._take_in(opened, ended)
            case DropShare(share):
                if (opened := self.open.pop(share.lease.batch_id, None)) is not None:
                    self._close(opened)

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
        inflight, engine = Counter(key[0] for key in self._inflight), self.engine
        progress = tuple(
            replace(opened.progress, num_inflight=inflight[batch_id]) for batch_id, opened in self.open.items()
        )
        self._integral += len(self._inflight) * (engine.now - self._counted_at)
        self._counted_at = engine.now
        return Heartbeat(
            self.info.worker_id,
            engine.total_tokens,
            engine.num_inflight,
            self._integral,
            progress,
            are_hints_useful=self._hints.verdict,
        )

    def take_events(self) -> list[VirtualEvent]:
        """Since the last call, in order."""
        events, self._events = self._events, []
        return events

    def count_tokens(self) -> int:
        return self.engine.total_tokens

    def count_running(self) -> float:
        return float(self.engine.num_running)

    def count_lost(self) -> int:
        """Tokens that must be generated again if the worker is lost now, those of finished rows left out."""
        made = self.engine.count_tokens()
        return sum(made.get(key, 0) + opened.done.get(key[1:], 0) for key, opened in self._inflight.items())

    # ---- rows --------------------------------------------------------------------------------------------------------

    def _open(self, lease: Lease, places: Iterable[int], share: Share | None) -> None:
        shard, n = lease.shard, self.model.n
        rows = self._workload.draw(shard.number, shard.row_start, shard.num_rows)
        left = [0] * len(rows)
        for place in places:
            left[place] = n
        num_left = sum(1 for each in left if each)
        opened = OpenRows(lease, rows, left, [0] * len(rows), num_left, n * num_left, share)
        begun = self._store.begun.get(lease.shard.number, {}) if share is not None else {}
        opened.done.update({(place, 0): begun[place] for place in begun if left[place]})
        self.open[lease.batch_id] = opened
        if num_left:
            self._read(opened, (place for place, count in enumerate(left) if count))
        else:
            self._end(opened)

    def _read(self, opened: OpenRows, places: Iterable[int]) -> None:
        requests = [place for place in places for _ in range(self.model.n)]
        self._ahead.add(Stretch(opened, requests, 1.0, [row.expected_tokens for row in opened.rows]))

    def _fill(self) -> None:
        """Longest expected first, or in order, while the window has room."""
        self._ahead.sort(self.model.policies.is_ordered and self._hints.are_useful)
        while (room := self.model.window - len(self._inflight)) > 0 and self._ahead.num_rows:
            for stretch, places in self._ahead.take(room, 1e18):
                opened = stretch.source
                for place in places:
                    # A row that was given away and came back is in here twice.
                    is_ours = place not in opened.away and opened.sent[place] < self.model.n
                    if is_ours and not opened.is_closed:
                        self._send(opened, place)

    def _send(self, opened: OpenRows, place: int) -> None:
        key = opened.lease.batch_id, place, opened.sent[place]
        opened.sent[place] += 1
        opened.num_unsent -= 1
        self._inflight[key] = opened
        row, rank = opened.rows[place], None
        if self._placer is not None:
            rank = self._placer.place(key, VirtualTokens(row), self.engine.total_tokens)
        self._ask(key, row, opened.done.get(key[1:], 0), rank)

    def _ask(self, key: Key, row: VirtualRow, done: int, rank: int | None) -> None:
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
        key: Key = finished.request.key  # type: ignore[assignment]
        opened, place = self._inflight[key], key[1]
        row = opened.rows[place]
        done = opened.done.get(key[1:], 0) + finished.request.output_tokens
        if self._placer is not None:
            self._placer.release(key, self.engine.total_tokens)
        if done < row.output_tokens:
            opened.done[key[1:]] = done
            if self._placer is not None:
                self._placer.place_again(key, finished.rank, row.prompt_tokens + done, self.engine.total_tokens)
            self._ask(key, row, done, finished.rank if self._placer is not None else None)
            return
        if row.expected_tokens is not None:
            self._hints.note(row.expected_tokens, row.output_tokens)
        del self._inflight[key]
        opened.left[place] -= 1
        if opened.left[place] == 0:
            opened.num_left -= 1
            self._unflushed.append((opened.lease.shard.number, place))
            if opened.num_left == 0:
                self._end(opened)

    def _end(self, opened: OpenRows) -> None:
        """All its rows are finished: a shard is committed, a share journaled and told."""
        if any(opened.left):
            raise AssertionError(f"{opened.lease.batch_id} is complete with rows missing")
        del self.open[opened.lease.batch_id]
        if opened.share is None:
            self._events.append(Committed(self.engine.now + self.model.commit_s, opened.lease))
        else:
            self._flush()
            self._events.append(ShareEnded(self.info.worker_id, opened.share, None))

    def _close(self, opened: OpenRows) -> None:
        opened.is_closed = True
        for key in [key for key, owner in self._inflight.items() if owner is opened]:
            self._stop(key)

    def _stop(self, key: Key) -> None:
        del self._inflight[key]
        self.engine.cancel(key)
        if self._placer is not None:
            self._placer.release(key, self.engine.total_tokens)

    def _flush(self) -> None:
        for shard, place in self._unflushed:
            self._store.journal.setdefault(shard, set()).add(place)
        self._unflushed = []
        self._flushed_at = self.engine.now

    # ---- shares ------------------------------------------------------------------------------------------------------

    def _give(self, share: Share, num_requests: int) -> int:
        """Whole rows of which nothing was sent: those that would go last."""
        opened = self.open.get(share.owner_batch_id)
        if opened is None:
            return 0
        rows, n = opened.rows, self.model.n
        unsent = [p for p, left in enumerate(opened.left) if left and not opened.sent[p] and p not in opened.away]
        if self.model.policies.is_ordered:
            unsent.sort(key=lambda place: -(rows[place].expected_tokens or 0.0))
        places = unsent[-max(1, num_requests // n) :]
        opened.away.update(places)
        opened.num_unsent -= n * len(places)
        self._store.handoffs[share.lease.batch_id] = places
        return n * len(places)

    def _give_begun(self, share: Share, num_requests: int) -> int:
        """The rows that were sent last, with what they have so far."""
        opened = self.open.get(share.owner_batch_id)
        if opened is None:
            return 0
        keys = [key for key, owner in self._inflight.items() if owner is opened][-num_requests:]
        made, begun = self.engine.count_tokens(), self._store.begun.setdefault(opened.lease.shard.number, {})
        for key in keys:
            done = opened.done.get(key[1:], 0) + made.get(key, 0)
            if done:
                begun[key[1]] = opened.done[key[1:]] = done
            self._stop(key)
            opened.away.add(key[1])
            opened.sent[key[1]] = 0
        self._store.handoffs[share.lease.batch_id] = [key[1] for key in keys]
        return len(keys)

    def _take_in(self, opened: OpenRows, ended: Iterable[Share]) -> None:
        """What others journaled is done; what they did not make is ours again."""
        finished = self._store.journal.get(opened.lease.shard.number, set())
        for share in ended:
            places = self._store.handoffs[share.lease.batch_id]
            again = [place for place in places if place in opened.away and place not in finished]
            opened.away.difference_update(again)
            opened.num_unsent += self.model.n * len(again)
            self._read(opened, again)
            for place in places:
                if place in finished and opened.left[place] and not opened.sent[place]:
                    if place not in opened.away:  # given by an owner before us, and not known to be away here
                        opened.away.add(place)
                        opened.num_unsent -= self.model.n
                    opened.left[place] = 0
                    opened.num_left -= 1
        if opened.num_left == 0:
            self._end(opened)
