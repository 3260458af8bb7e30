"""Finished rows of uncommitted shards, spilled so that a lost worker costs an interval and not a shard.

A segment is one object for one flush of one worker, created if absent, never changed: a Parquet file with one row group for
each shard it holds rows of, and an index of them in its footer. Rows may be in several segments (a row may be generated
twice); the first one that counts wins, so what an attempt commits depends on the order of segment names only. Segments of
another kind, by their name, hold answers so far of rows that an engine is asked for in parts (`is_partials`): they live and
go as the others do, and no row of a shard is ever read from one. `JournalIndex` knows which segments still matter; a
segment goes when every shard in it is committed, or when its rows stand in a later one. Pages bear checksums, for a
segment's rows end up in shard files: a damaged one is left out, by name, and its rows are made again. A file that is no
segment of this job is refused: somebody put it there.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.errors import AlreadyExists, Damaged, Foreign, NotFound
from batchgen.parquet import ParquetFile
from batchgen.records import JournalRef
from batchgen.storage import Storage
from batchgen.verify.damage import refusing_damage

FOLDER = "_batchgen/journal"
INDEX_KEY = b"batchgen.journal"
_SEGMENT_NAME = re.compile(rf"{FOLDER}/e(\d+)-.+\.parquet")
NUM_INDEX_THREADS = 32
PARTIALS_SUFFIX = "-partials.parquet"


def make_segment_path(epoch: int, worker_id: str, sequence: int) -> str:
    return f"{FOLDER}/e{epoch:06d}-{worker_id}-{sequence:06d}.parquet"


def make_partials_path(epoch: int, worker_id: str, sequence: int) -> str:
    return f"{FOLDER}/e{epoch:06d}-{worker_id}-{sequence:06d}{PARTIALS_SUFFIX}"


def is_partials(path: str) -> bool:
    """Does the segment hold answers so far, and no results?"""
    return path.endswith(PARTIALS_SUFFIX)


def make_worker_prefix(epoch: int, worker_id: str) -> str:
    """What the names of all segments of one worker start with."""
    return f"{FOLDER}/e{epoch:06d}-{worker_id}-"


def parse_epoch(path: str) -> int | None:
    """Of the run whose worker wrote a segment; None for a name that is no segment's."""
    name = _SEGMENT_NAME.fullmatch(path)
    return None if name is None else int(name[1])


def make_segment(rows: Mapping[int, pa.Table], fingerprint: str) -> pa.Buffer:
    """The bytes of a segment. `rows`: result rows by shard number; none of the tables is empty."""
    numbers = sorted(rows)
    index = json.dumps({"fingerprint": fingerprint, "shards": numbers}).encode()
    schema = rows[numbers[0]].schema.with_metadata({INDEX_KEY: index})
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, schema, compression="zstd", write_page_checksum=True) as writer:
        for number in numbers:
            table = rows[number].replace_schema_metadata(schema.metadata)
            writer.write_table(table, row_group_size=table.num_rows)
    return sink.getvalue()


def write_segment(storage: Storage, path: str, rows: Mapping[int, pa.Table], fingerprint: str) -> dict[int, JournalRef]:
    """Write one segment; where each shard's rows lie in it. Raises StorageError; then nothing may be taken as saved.

    A name is used once, by one worker of one epoch: a segment that is there already with this very content is ours, and
    only the reply to its write was lost."""
    data = make_segment(rows, fingerprint)
    try:
        storage.create(path, memoryview(data))
    except AlreadyExists:
        if storage.read_bytes(path) != data.to_pybytes():
            raise
    return {number: JournalRef(path, group) for group, number in enumerate(sorted(rows))}


def read_index(storage: Storage, path: str, fingerprint: str) -> dict[int, JournalRef]:
    """Where each shard's rows lie in one segment. Raises Damaged when it is none, Foreign when it is not this job's."""
    url = storage.url(path)
    with refusing_damage(url, "is damaged, or no journal segment; remove it", Damaged):
        with storage.open_read(path) as source:
            metadata = ParquetFile(source).schema_arrow.metadata or {}
        if INDEX_KEY not in metadata:
            raise Foreign(f"{url}: was not written by batchgen; remove it")
        index = json.loads(metadata[INDEX_KEY])
        if index["fingerprint"] != fingerprint:
            raise Foreign(f"{url}: was written by a job with another fingerprint; remove it")
        return {int(number): JournalRef(path, group) for group, number in enumerate(index["shards"])}


def list_segments(storage: Storage) -> list[str]:
    """Paths of all segments, in name order."""
    return [info.path for info in storage.list_files(FOLDER, suffix=".parquet")]


def read_indexes(
    storage: Storage, paths: Sequence[str], fingerprint: str, on_damage: Callable[[str], None]
) -> list[dict[int, JournalRef]]:
    """Indexes of many segments, read in parallel, in the order given; those that are damaged are told of and left out.
    Raises Foreign."""

    def read(path: str) -> dict[int, JournalRef]:
        try:
            return read_index(storage, path, fingerprint)
        except Foreign:
            raise
        except Damaged as error:
            on_damage(describe_left_out(error))
            return {}

    with ThreadPoolExecutor(NUM_INDEX_THREADS, thread_name_prefix="journal") as threads:
        return [refs for refs in threads.map(read, paths) if refs]


def find_segments(
    storage: Storage, index: "JournalIndex", prefix: str, fingerprint: str, on_damage: Callable[[str], None]
) -> list[str]:
    """Add segments whose news died with their worker (`make_worker_prefix`); those of them that nobody needs. Raises
    Foreign."""
    new = [path for path in list_segments(storage) if path.startswith(prefix) and not index.knows(path)]
    return [path for refs in read_indexes(storage, new, fingerprint, on_damage) for path in index.add(refs)]


def describe_left_out(error: Damaged) -> str:
    return f"{str(error).partition(';')[0]}: left out, its rows are generated again"


def read_sound_rows(storage: Storage, refs: Sequence[JournalRef], schema: pa.Schema) -> tuple[pa.Table, list[str]]:
    """(results of one shard from its segments that are whole, what is to be said of the others). In order of `refs`: a
    (source_row, sample_index) may be there many times, and `drop_repeated` keeps its first. Choose before that, or a row
    that doesn't count hides one that does.

    A segment that is gone means its shard was committed meanwhile: the commit finds that out, so it is skipped here.
    """
    return _read_sound(storage, [ref for ref in refs if not is_partials(ref.path)], schema)


def read_sound_partials(storage: Storage, refs: Sequence[JournalRef], schema: pa.Schema) -> tuple[pa.Table, list[str]]:
    """The same of the segments that hold answers so far."""
    return _read_sound(storage, [ref for ref in refs if is_partials(ref.path)], schema)


def _read_sound(storage: Storage, refs: Iterable[JournalRef], schema: pa.Schema) -> tuple[pa.Table, list[str]]:
    tables, left_out = [pa.Table.from_batches([], schema)], []
    for ref in refs:
        try:
            tables.append(read_ref(storage, ref, schema))
        except NotFound:
            continue
        except Damaged as error:
            left_out.append(describe_left_out(error))
    return pa.concat_tables(tables), left_out


def read_ref(storage: Storage, ref: JournalRef, schema: pa.Schema) -> pa.Table:
    """Rows of one shard from one segment; of columns only those of the schema. Raises Damaged, NotFound."""
    damage = refusing_damage(storage.url(ref.path), "is a damaged journal segment; remove it", Damaged)
    with damage, storage.open_read(ref.path) as source:
        parquet = ParquetFile(source, page_checksums=True)
        rows = parquet.read_row_group(ref.row_group, columns=schema.names).cast(schema)
        rows.validate(full=True)  # text that is none would be found much later, by whoever reads the output
        return rows


def drop_repeated(rows: pa.Table) -> pa.Table:
    """Keep the first of rows with the same (source_row, sample_index)."""
    seen: set[tuple[int, int]] = set()
    keep = []
    for key in zip(rows["source_row"].to_pylist(), rows["sample_index"].to_pylist(), strict=True):
        keep.append(key not in seen)
        seen.add(key)
    return rows.filter(pa.array(keep, pa.bool_()))


@dataclass(slots=True)
class JournalIndex:
    """Which segments hold rows of which uncommitted shards. Methods return the segments that nobody needs any more."""

    _refs: dict[int, list[JournalRef]] = field(default_factory=dict)
    _shards: dict[str, set[int]] = field(default_factory=dict)
    _done: set[int] = field(default_factory=set)
    _settled: dict[int, int] = field(default_factory=dict)

    def add(self, refs: Mapping[int, JournalRef]) -> list[str]:
        """A segment was written. Adding it twice is a no-op; shards that were committed meanwhile are left out."""
        live = {number: ref for number, ref in refs.items() if not self._is_over(number, ref)}
        for number, ref in live.items():
            shards = self._shards.setdefault(ref.path, set())
            if number not in shards:
                shards.add(number)
                self._refs.setdefault(number, []).append(ref)
        return sorted({ref.path for ref in refs.values()} - self._shards.keys())

    def add_flush(
        self, refs: Iterable[tuple[int, JournalRef]], replaced: Iterable[tuple[int, tuple[str, ...]]]
    ) -> list[str]:
        """A segment was written, which holds a shard's rows of these earlier ones, too."""
        return self.add(dict(refs)) + [path for number, old in replaced for path in self.replace(number, old)]

    def _is_over(self, shard_number: int, ref: JournalRef) -> bool:
        settled = self._settled.get(shard_number, -1)
        return shard_number in self._done or (parse_epoch(ref.path) or settled + 1) <= settled

    def settle(self, shard_number: int, epoch: int) -> None:
        """A file stands that a run of this epoch committed, and it will be replaced: rows that this run or earlier ones
        journaled don't count, whenever they were written."""
        self._settled[shard_number] = epoch

    def get(self, shard_number: int) -> tuple[JournalRef, ...]:
        """Where rows of this shard lie, in name order."""
        return tuple(sorted(self._refs.get(shard_number, ()), key=lambda ref: ref.path))

    def complete(self, shard_number: int) -> list[str]:
        """The shard is committed."""
        self._done.add(shard_number)
        return self._free(shard_number, self._refs.pop(shard_number, ()))

    def replace(self, shard_number: int, paths: Iterable[str]) -> list[str]:
        """The shard's rows in these segments stand in a later one, too."""
        gone, refs = set(paths), self._refs.get(shard_number, [])
        self._refs[shard_number] = [ref for ref in refs if ref.path not in gone]
        return self._free(shard_number, [ref for ref in refs if ref.path in gone])

    def _free(self, shard_number: int, refs: Iterable[JournalRef]) -> list[str]:
        free = []
        for ref in refs:
            shards = self._shards[ref.path]
            shards.discard(shard_number)
            if not shards:
                del self._shards[ref.path]
                free.append(ref.path)
        return free

    def knows(self, path: str) -> bool:
        return path in self._shards
