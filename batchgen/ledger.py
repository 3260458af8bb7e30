"""What every batch of a run did, and which shards it committed: what the end of the run writes down."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from batchgen.batches import BatchStats
from batchgen.events import ShardCommitted
from batchgen.manifest import CommittedShard, add_batches
from batchgen.progress import Tally
from batchgen.records import WorkerInfo, make_data_path
from batchgen.stats import make_lost_stats
from batchgen.storage import FileInfo
from batchgen.work_queue import LostLease


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
        self.note_batches([event.stats, *event.footer.batches])

    def commit(self, event: ShardCommitted) -> None:
        """The first file of a shard in this run, by whichever attempt."""
        footer = event.footer
        info = FileInfo(make_data_path(footer.shard), event.num_bytes, event.version)
        self.committed[footer.shard] = CommittedShard(info, footer, event.footer_sha256)
        self.tally.commit(footer.num_rows_ok, footer.num_rows_error)
