"""Finished rows of one batch, in memory or in the journal. Values."""

from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from batchgen.names import make_reused_id
from batchgen.records import JournalRef, Lease

ReadBack = Callable[[JournalRef], pa.Table]


@dataclass(frozen=True, slots=True)
class Finished:
    """Results as Arrow. `ref`: where they are journaled; None: nowhere yet. `rows` is None when they are journaled only."""

    rows: pa.Table | None
    ref: JournalRef | None = None

    @property
    def num_bytes(self) -> int:
        return 0 if self.rows is None else int(self.rows.nbytes)


@dataclass(frozen=True, slots=True)
class Parts:
    """A finished shard's rows by where they came from: `generated` and `carried` by this attempt."""

    output: pa.Table
    generated: pa.Table
    carried: pa.Table
    recovered: pa.Table


def load_rows(part: Finished, lease: Lease, read_back: ReadBack | None) -> pa.Table:
    """The rows, wherever they are. A segment may hold another batch's of the same shard, too: a share of it."""
    if part.rows is not None:
        return part.rows
    if read_back is None or part.ref is None:
        raise ValueError("rows were dropped from memory, and there is no way to read them back")
    rows = read_back(part.ref)
    return rows.filter(pc.is_in(rows["batch_id"], pa.array([lease.batch_id, make_reused_id(lease.batch_id)])))


def split_carried(rows: pa.Table, batch_id: str) -> tuple[pa.Table, pa.Table]:
    """(rows that this batch generated, rows that it took over). Most batches took over none, and nothing is copied."""
    is_carried = pc.equal(rows["batch_id"], make_reused_id(batch_id))
    if not pc.any(is_carried).as_py():
        return rows, rows.slice(0, 0)
    return rows.filter(pc.invert(is_carried)), rows.filter(is_carried)
