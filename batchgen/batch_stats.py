"""`batch_stats`: one row a batch, in files that are written once and numbered one by one.

A run that ends adds one file with the batches that no earlier one has. The number is what makes drivers that overlap agree:
of two that would add the same batches only one creates the file of that number.

Sketches are columns of (bucket, count) pairs that SQL can add up. What a file of an earlier version lacks is null.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from itertools import count, islice
from typing import Any

import pyarrow as pa

from batchgen.batches import BatchStats
from batchgen.errors import AlreadyExists
from batchgen.parquet import read_table
from batchgen.stats import LATENCY_FIELDS, SKETCH_FIELDS, parse_sketches
from batchgen.storage import Storage
from batchgen.verify.damage import RESTORE, refusing_damage
from batchgen.write import FORMAT_VERSION, make_parquet

STATS_FOLDER = "batch_stats"
# How many of the last files of batch_stats a listing may lack: those of runs that ended within its age.
NUM_RECENT = 8
_STATS_NAME = re.compile(rf"{STATS_FOLDER}/run-(\d{{6}})\.parquet")
DAMAGED = f"is damaged; {RESTORE}"

# So many batches become Arrow at a time: the sketches of 200,000 are some gigabytes as Python objects.
PART_BATCHES = 4096

_FLOATS = ("num_gpus", "started_at", "wall_s", "tokens_per_s", "tokens_per_s_per_gpu", "mean_inflight")
_TEXTS = ("batch_id", "shard", "outcome", "worker", "node", "engine_kind", "engine_version")


def _stats_type(name: str) -> pa.DataType:
    if name in _TEXTS:
        return pa.string()
    return pa.float64() if name in _FLOATS or name.endswith("_s") else pa.int64()


# Not an Arrow map: the library datasets can't read one.
_COUNTS = pa.list_(pa.struct([("value", pa.string()), ("count", pa.int64())]))
_EXAMPLES = pa.list_(pa.struct([("value", pa.string()), ("message", pa.string())]))
_SKETCH = pa.list_(pa.struct([("bucket", pa.int32()), ("count", pa.int64())]))
_LISTS = {"finish_reasons": _COUNTS, "error_types": _COUNTS, "error_examples": _EXAMPLES}
_PLAIN = [
    field.name for field in dataclasses.fields(BatchStats) if field.name not in ("latency", "sketches", "lengths")
]
STATS_SCHEMA = pa.schema(
    [("format_version", pa.int32())]
    + [(name, _LISTS.get(name) or _stats_type(name)) for name in _PLAIN]
    + [(name, pa.float64()) for name in LATENCY_FIELDS]
    + [("lengths", pa.string())]
    + [(name, _SKETCH) for name in SKETCH_FIELDS.values()]
)
NO_STATS = STATS_SCHEMA.empty_table()


def _make_stats_row(stats: BatchStats) -> dict[str, Any]:
    row = {name: getattr(stats, name) for name in _PLAIN}
    for name, kind in _LISTS.items():
        key, value = (field.name for field in kind.value_type)
        row[name] = None if row[name] is None else [{key: k, value: v} for k, v in row[name].items()]
    row |= {"format_version": FORMAT_VERSION, "lengths": stats.lengths or None}
    return row | dict.fromkeys(LATENCY_FIELDS) | (stats.latency or {})


def _make_part(batches: list[BatchStats]) -> pa.Table:
    plain = pa.schema([field for field in STATS_SCHEMA if field.name not in SKETCH_FIELDS.values()])
    table = pa.Table.from_pylist([_make_stats_row(stats) for stats in batches], schema=plain)
    for name, column in SKETCH_FIELDS.items():
        table = table.append_column(column, parse_sketches([(stats.sketches or {}).get(name) for stats in batches]))
    return table.cast(STATS_SCHEMA)


def make_stats_table(batches: Iterable[BatchStats]) -> pa.Table:
    """One row a batch."""
    rest, parts = iter(batches), [NO_STATS]
    while part := list(islice(rest, PART_BATCHES)):
        parts.append(_make_part(part))
    return pa.concat_tables(parts)


def _make_stats_path(number: int) -> str:
    return f"{STATS_FOLDER}/run-{number:06d}.parquet"


def list_stats_files(storage: Storage) -> list[str]:
    """Paths of all files of batch_stats. They are numbered one by one, and what the listing lacks near its end is looked
    for by name: a network file system's may not show yet what another machine wrote seconds ago."""
    listed = {info.path for info in storage.list_files(STATS_FOLDER, suffix=".parquet")}
    last = max((int(name[1]) for path in listed if (name := _STATS_NAME.fullmatch(path))), default=0)
    for number in count(max(1, last - NUM_RECENT)):
        path = _make_stats_path(number)
        if path not in listed and storage.info(path) is not None:
            listed.add(path)
        elif path not in listed and number > last:
            return sorted(listed)
    raise AssertionError("count never ends")


def read_stats_table(storage: Storage) -> pa.Table:
    """All of batch_stats, one row a batch. Raises OutputError where a file of it is damaged."""
    tables = [_read_stats_file(storage, path) for path in list_stats_files(storage)]
    return pa.concat_tables([NO_STATS, *tables])


def _read_stats_file(storage: Storage, path: str) -> pa.Table:
    with refusing_damage(storage.url(path), DAMAGED), storage.open_read(path) as source:
        table = read_table(source)
        table.validate(full=True)  # text that is none shows here, not when somebody reads the value
        return _fill(table).cast(STATS_SCHEMA)


def _fill(table: pa.Table) -> pa.Table:
    """With a null column for each that is younger than the file."""
    younger = {*SKETCH_FIELDS.values(), "lengths", "error_examples"}
    missing = [field for field in STATS_SCHEMA if field.name in younger and field.name not in table.column_names]
    for field in missing:
        table = table.append_column(field, pa.nulls(table.num_rows, field.type))
    return table.select(STATS_SCHEMA.names)


def read_batch_stats(storage: Storage) -> list[BatchStats]:
    """The batches of batch_stats, without their sketches and lengths: whoever wants to add these up has the table."""
    batches = []
    kept = [name for name in STATS_SCHEMA.names if name not in SKETCH_FIELDS.values()]
    for row in read_stats_table(storage).select(kept).to_pylist():
        fields = {name: row[name] for name in _PLAIN}
        for name in _LISTS:
            fields[name] = None if row[name] is None else dict(pair.values() for pair in row[name])
        batches.append(BatchStats(**fields, latency={name: row[name] for name in LATENCY_FIELDS}))
    return batches


def write_batch_stats(storage: Storage, batches: Mapping[str, BatchStats], check: Callable[[], None]) -> None:
    """Add the batches that batch_stats doesn't have yet, as the next file. Of two drivers that would add the same ones (one
    was frozen, the other took over) one creates the file of that number; the other reads it, and has nothing to add.
    `check` raises LeaseLost where the folder is not ours any more."""
    paths = list_stats_files(storage)
    have = {batch_id for path in paths for batch_id in _read_stats_file(storage, path)["batch_id"].to_pylist()}
    number = len(paths) + 1
    while new := [batches[batch_id] for batch_id in sorted(batches.keys() - have)]:
        path = _make_stats_path(number)
        check()
        try:
            storage.create(path, make_parquet(make_stats_table(new)))
        except AlreadyExists:
            # It may be our own, after a lost reply, or what a listing did not show yet, or a successor's.
            have.update(_read_stats_file(storage, path)["batch_id"].to_pylist())
            number += 1
        else:
            return
