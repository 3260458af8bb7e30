"""Earlier outputs as a place to take generations from: are they fit for it, and the rows at places of theirs.

A shard file is read whole and its seal looked at, for a new seal must never vouch for rows that were damaged meanwhile.
Files and decoded row groups are kept up to a bound each, so rows that keep about their order cost each file once; rows
that were shuffled cost it again and again. Prompts are in no output, and no input of an earlier run is looked at.
"""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import accumulate

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ValidationError

from batchgen.errors import InputError, StorageError
from batchgen.manifest import SPEC, read_json
from batchgen.parquet import ParquetFile, read_table
from batchgen.reuse.index import Pairs, Place, build_index, make_pairs
from batchgen.spec import JobSpec
from batchgen.specs.saved import read_saved_spec
from batchgen.storage import FileInfo, Storage
from batchgen.verify.damage import RESTORE, refusing_damage
from batchgen.worker.shard_footer import read_whole_file

MAX_FILE_BYTES = 512 * 2**20
MAX_GROUP_BYTES = 256 * 2**20
SCANNED = ["row_fingerprint", "status"]
# Not true of a row that was not generated here: nobody sent it, and nobody measured it.
NEW_VALUES = {"num_attempts": 0, "queued_s": None, "ttft_s": None, "latency_s": None}


def check_outputs(spec: JobSpec) -> None:
    """Raises InputError where an output of `input.reuse_from` can't be reused by this job."""
    for url in spec.input.reuse_from:
        if (reason := _find_reason(url, spec)) is not None:
            raise InputError(f"input.reuse_from: {url} {reason}, or leave it out")


def _find_reason(url: str, spec: JobSpec) -> str | None:
    storage = Storage(url)
    if storage.root == Storage(spec.output.path).root:
        return "is this job's own output; name an earlier one"
    try:
        facts = read_json(storage, SPEC)
    except StorageError as error:
        return f"can't be read ({error}); mend that"
    if facts is None:
        return "holds no job of batchgen; name the output.path of an earlier run"
    try:
        saved = read_saved_spec(facts)
    except (KeyError, TypeError, ValidationError):
        return "has a spec.json that this version does not read; name an output of this version"
    if not saved.output.row_fingerprints:
        return "has no row fingerprints (output.row_fingerprints); name one that has"
    if spec.output.token_ids and not saved.output.token_ids:
        return "has no column token_ids, which output.token_ids asks for; set that to false"
    return None


class EarlierOutputs:
    """Shard files of the outputs of `input.reuse_from`, and the index of their rows. Blocking; one thread at a time.
    `schema`: of result rows. Making one reads the fingerprints of all files: raises StorageError, OutputError, and OSError
    where the temporary folder is full."""

    def __init__(self, urls: Sequence[str], schema: pa.Schema) -> None:
        self._schema = schema
        self._files = [
            (storage, info) for storage in map(Storage, urls) for info in storage.list_files("data", suffix=".parquet")
        ]
        self._bytes: OrderedDict[int, bytes] = OrderedDict()
        self._groups: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()
        self._starts: dict[int, list[int]] = {}
        self.index = build_index(self._scan())

    def _scan(self) -> Iterator[Pairs]:
        for number, (storage, info) in enumerate(self._files):
            with refusing_damage(storage.url(info.path), f"is damaged; {RESTORE}"):
                rows = _read_scanned(storage, info)
            yield make_pairs(number, rows)

    def take(self, fingerprints: Sequence[bytes]) -> tuple[list[int], pa.Table]:
        """(which of them have a generation, their rows in that order: as they stand but for what was measured, with where
        they come from). Raises StorageError, OutputError."""
        wanted: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for number, place in enumerate(self.index.find(fingerprints)):
            if place is not None:
                group, row = self._find_group(place)
                wanted.setdefault((place[0], group), []).append((number, row))
        numbers, tables = [], [self._schema.empty_table()]
        for (file_number, group), some in sorted(wanted.items()):
            rows = self._read_group(file_number, group).take([row for _, row in some])
            # The index knows half of a fingerprint.
            is_same = [
                found == fingerprints[number]
                for found, (number, _) in zip(rows["row_fingerprint"].to_pylist(), some, strict=True)
            ]
            numbers += [number for (number, _), same in zip(some, is_same, strict=True) if same]
            tables.append(rows if all(is_same) else rows.filter(pa.array(is_same)))
        return numbers, pa.concat_tables(tables)

    def _find_group(self, place: Place) -> tuple[int, int]:
        """(row group, row in it)."""
        file_number, row = place
        if file_number not in self._starts:
            self._open(file_number)
        starts = self._starts[file_number]
        group = bisect_right(starts, row) - 1
        return group, row - starts[group]

    def _read_group(self, file_number: int, group: int) -> pa.Table:
        if (held := self._groups.get((file_number, group))) is not None:
            self._groups.move_to_end((file_number, group))
            return held
        storage, info = self._files[file_number]
        with refusing_damage(storage.url(info.path), f"is damaged; {RESTORE}"):
            parquet = self._open(file_number)
            names = [name for name in self._schema.names if name in parquet.schema_arrow.names]
            rows = parquet.read_row_group(group, columns=names)
            table = make_carried(rows, self._schema, storage.root)
        self._groups[file_number, group] = table
        while len(self._groups) > 1 and sum(held.nbytes for held in self._groups.values()) > MAX_GROUP_BYTES:
            self._groups.popitem(last=False)
        return table

    def _open(self, file_number: int) -> ParquetFile:
        if file_number not in self._bytes:
            storage, info = self._files[file_number]
            self._bytes[file_number] = _read_sealed(storage, info)
            while len(self._bytes) > 1 and sum(map(len, self._bytes.values())) > MAX_FILE_BYTES:
                self._bytes.popitem(last=False)
        self._bytes.move_to_end(file_number)
        parquet = ParquetFile(pa.BufferReader(self._bytes[file_number]))
        groups = (parquet.metadata.row_group(number).num_rows for number in range(parquet.num_row_groups))
        self._starts[file_number] = list(accumulate(groups, initial=0))[:-1]
        return parquet


def _read_scanned(storage: Storage, info: FileInfo) -> pa.Table:
    with storage.open_read(info.path) as source:
        return read_table(source, columns=SCANNED)


def _read_sealed(storage: Storage, info: FileInfo) -> bytes:
    data = storage.read_bytes(info.path)
    read_whole_file(data, storage.url(info.path))
    return data


def make_carried(rows: pa.Table, schema: pa.Schema, root: str) -> pa.Table:
    """Rows of an earlier output with the columns of this one. `reused_from` names the batch that generated them, as
    OUT/batch: where a row was taken over before, the first of all. A column that it lacks is one that a request with this
    fingerprint leaves null."""
    here = pc.coalesce(rows["reused_from"], rows["batch_id"])
    is_far = pc.fill_null(pc.match_substring(rows["reused_from"], "/"), False)
    origin = pc.if_else(is_far, here, pc.binary_join_element_wise(pa.scalar(root.rstrip("/")), here, "/"))
    columns = []
    for field in schema:
        if field.name in NEW_VALUES:
            columns.append(pa.repeat(pa.scalar(NEW_VALUES[field.name], field.type), rows.num_rows))
        elif field.name == "reused_from":
            columns.append(origin)
        elif field.name in rows.schema.names:
            columns.append(rows[field.name].cast(field.type))
        else:
            columns.append(pa.nulls(rows.num_rows, field.type))
    return pa.Table.from_arrays(columns, schema=schema)
