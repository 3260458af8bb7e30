"""Who tries which suspects, and what came of it: between the queue, the store and `suspects`, where the decisions are.

What is suspected is written down before anything is lent on its account, so that a driver that dies forgets nothing of
it; deaths are rare, so that costs nothing. Where a worker vanished without a word, the rows that its shards' journal
doesn't hold are the suspects. A run that would quarantine more than `retry.max_quarantined` rows stops instead: then it is
the engine that is broken.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import pyarrow as pa

from batchgen import journal
from batchgen.errors import RunStopped, StorageError
from batchgen.manifest import read_json
from batchgen.queue import suspects
from batchgen.queue.events import EngineRestarted, WorkerLost
from batchgen.queue.suspects import ShardRows, Suspects
from batchgen.queue.trial_queue import TrialQueue
from batchgen.queue.work_queue import LostLease
from batchgen.records import Lease
from batchgen.row_ranges import RowRanges, make_ranges, subtract
from batchgen.spec import JobSpec
from batchgen.storage import Storage
from batchgen.verify.damage import refusing_damage
from batchgen.worker.seal import seal_json

PATH = "_batchgen/suspects.json"
DAMAGED = "is damaged; delete it: rows that kill engines are then looked for anew"
KEYS = pa.schema([("source_row", pa.int64()), ("sample_index", pa.int32())])


@dataclass(slots=True)
class _Trial:
    group: int
    open: set[str]


@dataclass(slots=True)
class Inquiry:
    """Of one run. `window`: requests that an engine has at once, so as many suspects of a death. `clock`: seconds since the
    epoch, for what is written down outlives the process."""

    storage: Storage
    spec: JobSpec
    queue: TrialQueue
    index: journal.JournalIndex
    on_warning: Callable[[str], None]
    clock: Callable[[], float] = time.time
    state: Suspects = field(default_factory=Suspects)
    _trials: dict[str, _Trial] = field(default_factory=dict)

    # ---- the store ---------------------------------------------------------------------------------------------------

    def load(self, todo: Iterable[int]) -> None:
        """What earlier runs suspected of the shards that are to be done. Raises OutputError where it is damaged."""
        fields = read_json(self.storage, PATH)
        if fields is None:
            return
        with refusing_damage(self.storage.url(PATH), DAMAGED):
            self.state = suspects.keep_shards(suspects.from_json(fields), todo)
        if self.spec.retry.errors == "all":  # quarantined rows too are tried again
            self.state = replace(self.state, quarantined=())
        self.queue.hold(self.state.shards)

    def _change(self, state: Suspects) -> None:
        if state == self.state:
            return
        self.state = state
        self.queue.hold(state.shards)
        try:
            self.storage.put(PATH, seal_json(suspects.to_json(state)))
        except StorageError as error:  # the next change writes all of it; a driver that dies now looks for it anew
            self.on_warning(f"suspected rows are not written down: {error}")

    # ---- decisions out -----------------------------------------------------------------------------------------------

    def lend(self, now: float, *, num_starting: int) -> list[Lease]:
        """The next group that nobody tries, to an idle worker. None is idle and none will be soon: one is kept free."""
        self._settle()
        tried = {trial.group for trial in self._trials.values()}
        tried |= {group.number for group in self._list_convicted()}
        free = [group for group in self.state.groups if group.number not in tried]
        ready = next((g for g in free if self.queue.can_lend_rows(number for number, _ in g.rows)), None)
        idle = self.queue.find_idle() if ready is not None else None
        self.queue.reserve(is_wanted=ready is not None and idle is None and num_starting == 0 and not self._trials)
        if ready is None or idle is None:
            return []
        leases = self.queue.lend_rows(idle, ready.rows, now)
        self._trials[idle] = _Trial(ready.number, {lease.batch_id for lease in leases})
        return leases

    def complete(self, lease: Lease) -> Lease:
        """The lease with what a worker must know: the journal, and which rows not to touch."""
        number = lease.shard.number
        return replace(lease, journal=self.index.get(number), quarantined=self.state.get_quarantined(number))

    def is_trying(self, worker_id: str) -> bool:
        return worker_id in self._trials

    # ---- facts in ----------------------------------------------------------------------------------------------------

    def note_returned(self, worker_id: str, batch_id: str) -> None:
        """The lease's rows ended. When all of the group's did, they are cleared."""
        trial = self._trials.get(worker_id)
        if trial is None or batch_id not in trial.open:
            return
        trial.open.discard(batch_id)
        if not trial.open:
            del self._trials[worker_id]
            self._change(suspects.clear(self.state, trial.group))

    def note_failed(self, worker_id: str, batch_id: str) -> None:
        """The store or the input failed: says nothing of the rows, which are tried again."""
        trial = self._trials.get(worker_id)
        if trial is not None and batch_id in trial.open:
            del self._trials[worker_id]

    def note_loss(self, lost: WorkerLost, window: int) -> bool:
        """A worker is gone, its leases not taken yet. Is it for its rows, and looked into? Raises RunStopped."""
        if not lost.has_rows_to_blame:
            self._trials.pop(lost.worker_id, None)
            return False
        held = self.queue.list_leases(lost.worker_id)
        return self._note_death(lost.worker_id, lost.reason, lost.inflight, held, window)

    def note_restart(self, event: EngineRestarted, window: int) -> None:
        """Raises RunStopped."""
        held = [lost for lost in self.queue.list_leases(event.worker_id) if lost.lease.batch_id in event.batch_ids]
        self._note_death(event.worker_id, event.reason, event.inflight, held, window)

    def note_committed(self, shard_number: int) -> None:
        """Somebody had finished its rows: nobody is suspected of them any more."""
        if shard_number in self.state.shards:
            self._change(suspects.keep_shards(self.state, self._list_shards() - {shard_number}))

    def _list_shards(self) -> frozenset[int]:
        return self.state.shards | {number for number, _ in self.state.quarantined} | self.state.struck

    def _note_death(
        self, worker_id: str, reason: str, inflight: Sequence[ShardRows] | None, held: Sequence[LostLease], window: int
    ) -> bool:
        trial, now = self._trials.pop(worker_id, None), self.clock()
        before = self.state
        rows = self._list_unfinished(held) if inflight is None else inflight
        # Somebody who was taken for dead may have finished them: no trial of those would ever be lent.
        rows = [(number, ranges) for number, ranges in rows if not self.queue.has_done(number)]
        if trial is not None and any(group.number == trial.group for group in before.groups):
            self._change(suspects.blame(before, trial.group, rows, now))
        elif inflight is None:
            self._change(suspects.accuse_unknown(before, rows, window, now))
        else:
            self._change(suspects.accuse(before, rows, window, now))
        known = {group.number for group in before.groups}
        if new := [group for group in self.state.groups if group.number not in known]:
            count = sum(group.num_rows for group in new)
            self.on_warning(f"{count} rows were in flight when {worker_id}'s engine died; they are tried apart")
        has_changed = self.state.groups != before.groups
        self._settle()
        self._check_engine(reason)
        return has_changed

    # ---- the verdict -------------------------------------------------------------------------------------------------

    def _list_convicted(self) -> list[suspects.Group]:
        return suspects.list_convicted(self.state, self.clock(), self.spec.retry.max_deaths_alone)

    def _settle(self) -> None:
        """Asked at every turn: deaths by chance are forgotten after a while, and then the verdict is due."""
        tried = {trial.group for trial in self._trials.values()}
        if not self.state.groups or any(group.number in tried for group in self.state.groups):
            return  # who is being tried may be cleared yet
        num_before = self.state.num_quarantined
        self._change(suspects.settle(self.state, self.clock(), self.spec.retry.max_deaths_alone))
        if num_more := self.state.num_quarantined - num_before:
            self.on_warning(f"{num_more} rows are quarantined: engines died with each of them alone in flight")

    def _check_engine(self, reason: str) -> None:
        """An engine that dies of everything would leave nobody to wait for before the first verdict."""
        num_guilty = self.state.num_quarantined + len(self._list_convicted())
        if num_guilty > self.spec.retry.max_quarantined:
            raise RunStopped(
                f"{num_guilty} rows killed engines (retry.max_quarantined is "
                f"{self.spec.retry.max_quarantined}); it may be the engine that is broken, the last one's reason: {reason}"
            )

    # ---- what vanished without a word --------------------------------------------------------------------------------

    def _list_unfinished(self, lost: Sequence[LostLease]) -> list[ShardRows]:
        """Rows that these leases had to generate and the journal doesn't hold."""
        unfinished = []
        for lease in (held.lease for held in lost):
            shard = lease.shard
            wanted = lease.only or ((shard.row_start, shard.row_end),)
            wanted = subtract(wanted, self.state.get_quarantined(shard.number))
            if not lease.is_last_resort:
                unfinished.append((shard.number, subtract(wanted, self._read_finished(lease))))
        return [(number, ranges) for number, ranges in unfinished if ranges]

    def _read_finished(self, lease: Lease) -> RowRanges:
        """Rows whose n samples are all journaled. A segment that can't be read vouches for none of its rows."""
        try:
            keys, _ = journal.read_sound_rows(self.storage, self.index.get(lease.shard.number), KEYS)
        except StorageError as error:
            self.on_warning(f"{lease.shard.id}: its journal can't be read: {error}")
            return ()
        return make_ranges(_list_whole(keys, self.spec.sampling.n))


def _list_whole(keys: pa.Table, n: int) -> list[int]:
    counts = keys.group_by(KEYS.names).aggregate([]).group_by("source_row").aggregate([("sample_index", "count")])
    return [row["source_row"] for row in counts.to_pylist() if row["sample_index_count"] >= n]
