"""The store side of one shard: what is there already, and the one commit. Blocking; called off the event loop.

The file's existence is the commit. A second attempt for the same shard finds it and drops its own work; a reply that was
lost is recognised by the batch id in the footer of what is there. Error rows may be replaced, generations never: a
replacement copies the ok rows unchanged and swaps the file only if it is still the version that was read.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.compute as pc

from batchgen import journal
from batchgen.batches import BatchStats, FileFooter
from batchgen.engines import get_engine_kind
from batchgen.errors import AlreadyExists, Conflict, Damaged
from batchgen.gates.count import make_counter, make_rules
from batchgen.gates.texts import digest_texts, make_text_sample
from batchgen.lengths import make_template_lengths
from batchgen.manifest import CommittedShard
from batchgen.names import is_reused_id, make_reused_id, parse_batch_id
from batchgen.parquet import read_table
from batchgen.queue.events import ShardCommitted
from batchgen.records import JournalRef, Lease, Partial, RowId, Shard, Share, Slot, WorkerInfo
from batchgen.spec import JobSpec
from batchgen.stats import count_rows, make_batch_stats, make_lost_stats
from batchgen.storage import FileInfo, Storage
from batchgen.worker import handoff
from batchgen.worker.open_shard import OpenShard
from batchgen.worker.partial_rows import SCHEMA as PARTIALS_SCHEMA
from batchgen.worker.partial_rows import read_partial_rows
from batchgen.worker.seal import digest_footer
from batchgen.worker.shard_footer import read_footer, read_whole_file
from batchgen.write import FORMAT_VERSION, make_output_schema, make_result_schema, make_shard_file


@dataclass(frozen=True, slots=True)
class Spent:
    """What the worker measured of a batch."""

    started_at: float
    wall_s: float
    mean_inflight: float | None


def is_in(shard: Shard, source_row: int, sample_index: int) -> bool:
    return shard.row_start <= source_row < shard.row_end and sample_index >= 0


def find_again(rows: pa.Table, errors: str) -> pa.ChunkedArray:
    """For each row: is it an error that `errors` (as `retry.errors`) says to try again? Never null."""
    if errors == "none":
        return pc.and_(pc.is_valid(rows["status"]), False)
    failed = pc.equal(rows["status"], "error")
    return pc.and_(failed, pc.fill_null(rows["is_retryable"], False)) if errors == "retryable" else failed


class ShardFiles:
    """Reads and commits shards of one job on one output folder."""

    def __init__(self, storage: Storage, spec: JobSpec, passthrough: pa.Schema) -> None:
        self._storage, self._spec = storage, spec
        self._may_quote = get_engine_kind(spec.engine.kind).capabilities.quotes_prompts
        self._fingerprint = spec.fingerprint()
        self.result_schema = make_result_schema(spec)
        self._output_schema = make_output_schema(spec, passthrough)
        self._count_for_gates = make_counter(make_rules(spec))

    def find_committed(self, lease: Lease) -> CommittedShard | None:
        """The shard's file, where an earlier attempt of it has committed; None when it must be made."""
        info = self._storage.info(lease.shard.data_path)
        if info is None or info.version == lease.replaces:
            return None
        return CommittedShard(info, *read_footer(self._storage, info.path))

    def read_journal(self, lease: Lease, after_epoch: int) -> tuple[pa.Table, list[str]]:
        """(rows that runs later than this one finished and journaled, each once. What the run that committed the file to be
        replaced made of this shard is in that file or lost, and `batch_stats` says so: a segment that was not deleted must
        not bring its errors back, nor one that a zombie wrote later the rows of a lost batch (`manifest.is_settled`).
        Errors of an earlier run are tried again as those of a committed shard are: what `retry.errors` names is left
        out; what is to be said of segments that are damaged)."""
        rows, left_out = journal.read_sound_rows(self._storage, lease.journal, self.result_schema)
        batches = [parse_batch_id(batch_id) for batch_id in rows["batch_id"].to_pylist()]
        is_late = pa.array([epoch > after_epoch for _, epoch, _ in batches], pa.bool_())
        is_old = pa.array([epoch < lease.epoch for _, epoch, _ in batches], pa.bool_())
        is_again = pc.and_(is_old, find_again(rows, self._spec.retry.errors))
        return journal.drop_repeated(rows.filter(pc.and_not(is_late, is_again))), left_out

    def read_partials(self, shard: Shard, refs: Sequence[JournalRef]) -> tuple[list[tuple[RowId, Partial]], list[str]]:
        """(answers so far of the shard's rows that are journaled there; what is to be said of segments that are damaged).
        Raises StorageError."""
        rows, left_out = journal.read_sound_partials(self._storage, refs, PARTIALS_SCHEMA)
        found = read_partial_rows(rows).items()
        return [(RowId(shard.file.path, *slot), partial) for slot, partial in found if is_in(shard, *slot)], left_out

    def read_back(self, ref: JournalRef) -> pa.Table:
        """What this worker journaled there. Raises StorageError."""
        return journal.read_ref(self._storage, ref, self.result_schema)

    def read_kept(self, lease: Lease, errors: str) -> tuple[pa.Table, int]:
        """(rows of the file to be replaced that stay as they are: all but the error rows to be tried again; the epoch
        of the run that made it). Raises OutputError where its bytes are not those that were committed: a new seal must
        never vouch for rows that were damaged meanwhile."""
        path = lease.shard.data_path
        data = self._storage.read_bytes(path)
        footer = read_whole_file(data, self._storage.url(path))
        rows = read_table(pa.BufferReader(data), columns=self.result_schema.names).cast(self.result_schema)
        return rows.filter(pc.invert(find_again(rows, errors))), footer.epoch

    def write_segment(self, path: str, rows: dict[int, pa.Table]) -> dict[int, JournalRef]:
        return journal.write_segment(self._storage, path, rows, self._fingerprint)

    def write_handoff(self, batch_id: str, slots: Sequence[Slot]) -> None:
        handoff.write_handoff(self._storage, batch_id, slots)

    def read_handoff(self, share: Share) -> list[Slot]:
        """Raises NotFound, or Damaged for what is none of this share."""
        slots, shard = handoff.read_handoff(self._storage, share.lease.batch_id), share.lease.shard
        n = self._spec.sampling.n
        if not slots or not all(shard.row_start <= row < shard.row_end and 0 <= sample < n for row, sample in slots):
            raise Damaged(f"{self._storage.url(handoff.make_handoff_path(share.lease.batch_id))}: is of another shard")
        return slots

    def open_share(self, share: Share, slots: Sequence[Slot], on_packed: Callable[[pa.RecordBatch], None]) -> OpenShard:
        return OpenShard(share.lease, self._spec.sampling.n, self.result_schema, slots, on_packed)

    def commit(self, shard: OpenShard, info: WorkerInfo, spent: Spent) -> ShardCommitted:
        """Publish the shard, all or nothing. Raises StorageError; then nothing is published, or our own file is."""
        started = time.monotonic()
        lease, parts = shard.lease, shard.make_parts(self._output_schema, self.read_back)
        by = self._spec.input.length_template
        stats = make_batch_stats(
            lease,
            info,
            parts.generated,
            started_at=spent.started_at,
            wall_s=spent.wall_s,
            mean_inflight=spent.mean_inflight,
            num_from_journal=shard.num_recovered,
            num_copied=shard.num_copied,
            read_s=shard.read_s + shard.prepare_s,
            write_s=None,
            may_quote=self._may_quote,
        )
        footer = FileFooter(
            format_version=FORMAT_VERSION,
            fingerprint=self._fingerprint,
            shard=lease.shard.number,
            attempt=lease.attempt,
            epoch=lease.epoch,
            batch_id=lease.batch_id,
            **count_rows(parts.output),
            batches=(stats, *list_carried(lease, info, parts.carried), *self._list_earlier(shard, parts.recovered)),
            gates=self._count_for_gates(parts.output),
            templates=None if by is None else make_template_lengths(parts.output, by),
        )
        texts = make_text_sample([digest_texts(parts.output)]) if self._spec.gates.wants_texts else None
        level = self._spec.output.compression_level
        data = make_shard_file(parts.output, footer, compression_level=level, texts=texts)
        standing = self._publish(lease, data, footer)
        stats = replace(stats, write_s=time.monotonic() - started)
        if standing.footer.batch_id != lease.batch_id:
            stats = replace(stats, outcome="superseded")
        return make_event(info.worker_id, stats, standing)

    def _publish(self, lease: Lease, data: pa.Buffer, footer: FileFooter) -> CommittedShard:
        """The file that stands afterwards: ours, or that of the attempt that was first."""
        path = lease.shard.data_path
        try:
            if lease.replaces is None:
                version = self._storage.create(path, memoryview(data))
            else:
                version = self._storage.replace(path, memoryview(data), lease.replaces)
        except (AlreadyExists, Conflict):
            if (standing := self.find_committed(lease)) is None:
                raise
            return standing
        return CommittedShard(FileInfo(path, data.size, version), footer, digest_footer(data))

    def _list_earlier(self, shard: OpenShard, recovered: pa.Table) -> list[BatchStats]:
        """Stats of the other batches that have rows in this file: known from the file replaced, else from the rows."""
        known, lease = {}, shard.lease
        kind = self._spec.engine.kind  # the same in all runs of a job: it is in the fingerprint
        if lease.replaces is not None:
            replaced, _ = read_footer(self._storage, lease.shard.data_path)
            known = {batch.batch_id: batch for batch in replaced.batches}
        batches = []
        for batch_id in pc.unique(recovered["batch_id"]).to_pylist():
            rows = recovered.filter(pc.equal(recovered["batch_id"], batch_id))
            outcome = "reused" if is_reused_id(batch_id) else "shared" if batch_id in shard.shared_ids else "lost"
            if (stats := known.get(batch_id)) is None:
                quotes = self._may_quote
                stats = make_lost_stats(batch_id, engine_kind=kind, rows=rows, outcome=outcome, may_quote=quotes)
            batches.append(stats)
        return batches


def list_carried(lease: Lease, info: WorkerInfo, rows: pa.Table) -> list[BatchStats]:
    """What is said of the rows that this attempt took over: a batch beside its own, where there are any."""
    return (
        [make_lost_stats(make_reused_id(lease.batch_id), info=info, rows=rows, outcome="reused")]
        if rows.num_rows
        else []
    )


def make_event(worker_id: str, stats: BatchStats, standing: CommittedShard) -> ShardCommitted:
    """The event for a shard whose file stands."""
    return ShardCommitted(
        worker_id,
        stats.batch_id,
        stats,
        standing.info.num_bytes,
        standing.info.version,
        standing.footer,
        standing.footer_sha256,
    )
