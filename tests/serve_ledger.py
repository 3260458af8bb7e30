"""Which rows of an endpoint's batches are safe in the store, and which its engines were asked for: no safe one again."""

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from batchgen.engines.simulated import read_calls
from batchgen.errors import NotFound
from batchgen.journal import INDEX_KEY, is_partials, list_segments
from batchgen.manifest import read_plan
from batchgen.parquet import ParquetFile, read_table
from batchgen.serve.state import State
from batchgen.storage import Storage

RowKey = tuple[str, int, int]


def read_safe(storage: Storage) -> set[RowKey]:
    """Rows of one job that are journaled or committed. The journal first: a segment goes once its rows are committed."""
    plan = read_plan(storage)
    if plan is None:
        return set()
    files = {shard.number: shard.file.path for shard in plan[2]}
    found = set[RowKey]()
    for path in list_segments(storage):
        if not is_partials(path):
            found |= _read_segment(storage, path, files)
    for info in storage.list_files("data", suffix=".parquet"):
        with storage.open_read(info.path) as source:
            table = read_table(source, columns=["source_file", "source_row", "sample_index"])
        found |= set(zip(*(table[name].to_pylist() for name in table.column_names), strict=True))
    return found


def _read_segment(storage: Storage, path: str, files: dict[int, str]) -> set[RowKey]:
    try:
        with storage.open_read(path) as source:
            segment = ParquetFile(source)
            numbers = json.loads((segment.schema_arrow.metadata or {})[INDEX_KEY])["shards"]
            tables = [segment.read_row_group(group, ["source_row", "sample_index"]) for group in range(len(numbers))]
    except NotFound:  # committed meanwhile
        return set()
    return {
        (files[number], row, sample)
        for number, table in zip(numbers, tables, strict=True)
        for row, sample in zip(table["source_row"].to_pylist(), table["sample_index"].to_pylist(), strict=True)
    }


@dataclass
class Ledger:
    """Of these batches, which may be appended to. `note` after every kill; `check` at the end."""

    state: State
    calls: str
    tenant: str
    batch_ids: list[str] = field(default_factory=list)
    safe: set[RowKey] = field(default_factory=set)
    num_safe: list[int] = field(default_factory=list)
    _known: Counter[RowKey] = field(default_factory=Counter)
    _at_risk: int = 0

    def count_calls(self) -> Counter[RowKey]:
        calls = read_calls(self.calls)
        return Counter(call[:3] for call in calls if any(batch_id in call[0] for batch_id in self.batch_ids))

    def note(self, *, max_lost: int | None = None) -> None:
        """Something was just killed. `max_lost`: rows that may be asked for again because of it; else all that the
        engines were asked for and that are not safe: those engines are dead."""
        jobs = [Storage(self.state.job_url(self.tenant, batch_id)) for batch_id in self.batch_ids]
        safe = {row for job in jobs for row in read_safe(job)}
        assert self.safe <= safe, "rows that were safe are gone"
        self.check_safe()
        self.safe = safe
        self.num_safe.append(len(safe))
        self._known = self.count_calls()
        self._at_risk += len(self._known.keys() - safe) if max_lost is None else max_lost

    def check_safe(self) -> None:
        """Since the last kill nothing was asked for that was safe then."""
        again = self.count_calls() - self._known
        assert not again.keys() & self.safe, "rows were generated again that were journaled or committed"

    def check(self, num_rows: int) -> int:
        """How many rows were asked for again: none but those a kill put at risk."""
        self.check_safe()
        calls = self.count_calls()
        num_again = calls.total() - len(calls)
        assert len(calls) == num_rows
        assert num_again <= self._at_risk
        return num_again


def wait_for_calls(calls: str, num: int, is_over: Callable[[], bool] = lambda: False, timeout_s: float = 120) -> None:
    """Until the engines were asked for so many more rows than now; or it is over, and there are no more."""
    wanted, give_up_at = len(read_calls(calls)) + num, time.monotonic() + timeout_s
    while len(read_calls(calls)) < wanted and not is_over():
        assert time.monotonic() < give_up_at
        time.sleep(0.05)
