"""What every batch of a run did, and which shards it committed: what the end of the run writes down."""

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from sys import intern
from typing import TypeVar

from batchgen.batches import BatchStats, FileFooter
from batchgen.logs import log_event
from batchgen.manifest import CommittedShard, add_batches
from batchgen.names import make_data_path
from batchgen.queue.events import ShardCommitted
from batchgen.queue.progress import Tally
from batchgen.queue.work_queue import LostLease
from batchgen.records import WorkerInfo
from batchgen.stats import make_lost_stats
from batchgen.storage import FileInfo

ValueT = TypeVar("ValueT")


@dataclass(slots=True)
class Ledger:
    """`batches` by id, `committed` by shard number."""

    batches: dict[str, BatchStats] = field(default_factory=dict)
    committed: dict[int, CommittedShard] = field(default_factory=dict)
    tally: Tally = field(default_factory=Tally)

    def note_lost(self, lost: LostLease, info: WorkerInfo | None, now: float) -> None:
        stats = make_lost_stats(
            lost.lease.batch_id,
            info=info,
            started_at=time.time() - (now - lost.started_at),
            wall_s=lost.ended_at - lost.started_at,
        )
        self.note_batches([stats])

    def note_batches(self, batches: Iterable[BatchStats]) -> None:
        add_batches(self.batches, batches)

    def note_end(self, event: ShardCommitted) -> None:
        """The end of a batch says more than what was noted while it ran."""
        self.batches.pop(event.batch_id, None)
        if event.stats.outcome != "committed":
            self.note_batches([event.stats])

    def _keep(self, footer: FileFooter, stats: BatchStats) -> FileFooter:
        """The footer as it is kept for the end of the run, and what else is known of its batches. It tells the batch that
        committed whole: beside it only what it could not know. 200,000 of these are held at once, so names that are the
        same in all of them are kept once."""
        batches = tuple(_share_names(batch) for batch in footer.batches)
        if stats.outcome == "committed":
            rest = BatchStats(
                stats.batch_id, stats.shard, stats.attempt, stats.epoch, stats.outcome, write_s=stats.write_s
            )
            self.note_batches([rest])
        self.note_batches(batch for batch in batches if batch.batch_id != stats.batch_id)
        return replace(footer, batches=batches, fingerprint=intern(footer.fingerprint))

    def commit(self, event: ShardCommitted) -> None:
        """The first file of a shard in this run, by whichever attempt."""
        footer = self._keep(event.footer, event.stats)
        info = FileInfo(make_data_path(footer.shard), event.num_bytes, event.version)
        self.committed[footer.shard] = CommittedShard(info, footer, event.footer_sha256)
        error_types: Counter[str] = Counter()
        for batch in footer.batches:
            error_types.update(batch.error_types or {})
        self.tally.commit(footer.num_rows_ok, footer.num_rows_error, error_types)
        log_event(
            "shard_committed",
            shard=footer.shard,
            batch=event.batch_id,
            worker=event.worker_id,
            rows_ok=footer.num_rows_ok,
            rows_error=footer.num_rows_error,
            error_types=dict(error_types),
        )


def _share_names(stats: BatchStats) -> BatchStats:
    """The same batch, with one object for each name that many batches have."""
    return replace(
        stats,
        outcome=intern(stats.outcome),
        worker=stats.worker and intern(stats.worker),
        node=stats.node and intern(stats.node),
        engine_kind=stats.engine_kind and intern(stats.engine_kind),
        engine_version=stats.engine_version and intern(stats.engine_version),
        latency=_share_keys(stats.latency),
        sketches=_share_keys(stats.sketches),
        finish_reasons=_share_keys(stats.finish_reasons),
        error_types=_share_keys(stats.error_types),
        error_examples=_share_keys(stats.error_examples),
    )


def _share_keys(found: Mapping[str, ValueT] | None) -> dict[str, ValueT] | None:
    return None if found is None else {intern(key): value for key, value in found.items()}
