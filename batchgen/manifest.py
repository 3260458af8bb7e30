"""What is committed, and what a run says of it.

The output folder is the truth: a shard is committed when its file exists. What is in the files is read from
`_batchgen/committed.parquet`, the compacted copy of their footers, and from the footers themselves where the copy has
no line for that very version of a file (the driver died before it compacted, or the folder was copied). `batch_stats`
gets one immutable file a run with the batches that no earlier one has. Also the frozen plan, the spec and `_SUCCESS`.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.batches import BatchStats, FileFooter
from batchgen.damage import RESTORE, refusing_damage
from batchgen.errors import AlreadyExists, LeaseLost, NotFound, OutputError
from batchgen.records import InputFile, Shard, parse_batch_id
from batchgen.shard_footer import read_footer
from batchgen.stats import LATENCY_FIELDS, merge_stats
from batchgen.storage import FileInfo, Storage
from batchgen.write import FORMAT_VERSION, footer_from_json, footer_to_json

SPEC = "_batchgen/spec.json"
PLAN_FOLDER = "_batchgen/plan"
PLAN_FILES = f"{PLAN_FOLDER}/files.parquet"
PLAN_SHARDS = PLAN_FOLDER + "/shards-{:06d}.parquet"
STATS_FOLDER = "batch_stats"
COMMITTED = "_batchgen/committed.parquet"
LOCK = "_batchgen/lock.json"
SUCCESS = "_SUCCESS"
# Outcomes of batches whose rows, if any, stand in another one's file: lost, or made for another.
UNCOMMITTED = ("lost", "shared")
NUM_FOOTER_THREADS = 32
COMMITTED_ROWS = 4096
COMMITTED_SCHEMA = pa.schema([(name, pa.string()) for name in ("path", "version", "footer", "footer_sha256")])
# What a plan knows of its shards' lengths. Plans of earlier versions lack these columns: then nothing is known.
EXPECTED = ("expected_tokens", "max_expected_tokens", "prompt_bytes")
DAMAGED = f"is damaged; {RESTORE}"

_FLOATS = ("num_gpus", "started_at", "wall_s", "tokens_per_s", "tokens_per_s_per_gpu", "mean_inflight")
_TEXTS = ("batch_id", "shard", "outcome", "worker", "node", "engine_kind", "engine_version")


def _stats_type(name: str) -> pa.DataType:
    if name in _TEXTS:
        return pa.string()
    return pa.float64() if name in _FLOATS or name.endswith("_s") else pa.int64()


# Not an Arrow map: the library datasets can't read one.
_COUNTS = pa.list_(pa.struct([("value", pa.string()), ("count", pa.int64())]))
_PLAIN = [
    field.name for field in dataclasses.fields(BatchStats) if field.name not in ("latency", "sketches", "lengths")
]
STATS_SCHEMA = pa.schema(
    [("format_version", pa.int32())]
    + [(name, _COUNTS if name in ("finish_reasons", "error_types") else _stats_type(name)) for name in _PLAIN]
    + [(name, pa.float64()) for name in LATENCY_FIELDS]
)


@dataclass(frozen=True, slots=True)
class CommittedShard:
    """A shard file that stands: its version in the store, what its footer says, and the digest of that (`seal`), which
    covers the whole file."""

    info: FileInfo
    footer: FileFooter
    footer_sha256: str


# ---- what is committed -----------------------------------------------------------------------------------------------


def load_committed(
    storage: Storage, fingerprint: str, known_shards: Iterable[CommittedShard] = ()
) -> dict[int, CommittedShard]:
    """All committed shards by number; footers of `known_shards` are not read again where their file is unchanged. Raises
    OutputError for a file in data/ that is not this job's."""
    infos = storage.list_files("data", suffix=".parquet")
    known = {(shard.info.path, shard.info.version): (shard.footer, shard.footer_sha256) for shard in known_shards}
    known = known or _load_compacted(storage)
    unknown = [info for info in infos if (info.path, info.version) not in known]
    with ThreadPoolExecutor(NUM_FOOTER_THREADS, thread_name_prefix="footer") as threads:
        read = dict(
            zip((i.path for i in unknown), threads.map(lambda i: read_footer(storage, i.path), unknown), strict=True)
        )
    committed = {}
    for info in infos:
        footer, footer_sha256 = known.get((info.path, info.version)) or read[info.path]
        if footer.fingerprint != fingerprint:
            raise OutputError(
                f"{storage.url(info.path)}: belongs to another job (fingerprint); choose another output.path"
            )
        committed[footer.shard] = CommittedShard(info, footer, footer_sha256)
    return committed


def _load_compacted(storage: Storage) -> dict[tuple[str, str], tuple[FileFooter, str]]:
    """What the copy holds; nothing where it is damaged, or of an earlier version: then the footers are read again."""
    try:
        with refusing_damage(storage.url(COMMITTED), "is damaged"), storage.open_read(COMMITTED) as source:
            parts = pq.ParquetFile(source).iter_batches(COMMITTED_ROWS)
            return {
                (row["path"], row["version"]): (footer_from_json(row["footer"]), row["footer_sha256"])
                for part in parts
                for row in part.to_pylist()
            }
    except (NotFound, OutputError):
        return {}


def write_committed(storage: Storage, committed: Iterable[CommittedShard]) -> None:
    """Compact the footers, so that the next run need not read them one by one. A cache: may be deleted at any time."""
    sink, shards = pa.BufferOutputStream(), iter(committed)
    with pq.ParquetWriter(sink, COMMITTED_SCHEMA, compression="zstd") as writer:
        # 200,000 footers are a gigabyte as text: a part of them at a time.
        while part := list(islice(shards, COMMITTED_ROWS)):
            rows = [(s.info.path, s.info.version, footer_to_json(s.footer), s.footer_sha256) for s in part]
            columns = [pa.array(values, pa.string()) for values in zip(*rows, strict=True)]
            writer.write_table(pa.Table.from_arrays(columns, schema=COMMITTED_SCHEMA))
    storage.put(COMMITTED, sink.getvalue())


def _to_parquet(table: pa.Table) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


# ---- batch_stats -----------------------------------------------------------------------------------------------------


def make_stats_row(stats: BatchStats) -> dict[str, Any]:
    row = {name: getattr(stats, name) for name in _PLAIN}
    for name in ("finish_reasons", "error_types"):
        row[name] = None if row[name] is None else [{"value": v, "count": c} for v, c in row[name].items()]
    return row | {"format_version": FORMAT_VERSION} | dict.fromkeys(LATENCY_FIELDS) | (stats.latency or {})


def make_stats_table(batches: Iterable[BatchStats]) -> pa.Table:
    return pa.Table.from_pylist([make_stats_row(stats) for stats in batches], schema=STATS_SCHEMA)


def read_stats_table(storage: Storage) -> pa.Table:
    """All of batch_stats, one row a batch. Raises OutputError where a file of it is damaged."""
    tables = [STATS_SCHEMA.empty_table()]
    for info in storage.list_files(STATS_FOLDER, suffix=".parquet"):
        with refusing_damage(storage.url(info.path), DAMAGED), storage.open_read(info.path) as source:
            table = pq.read_table(source).cast(STATS_SCHEMA)
            table.validate(full=True)  # text that is none shows here, not when somebody reads the value
            tables.append(table)
    return pa.concat_tables(tables)


def read_batch_stats(storage: Storage) -> list[BatchStats]:
    """The batches of batch_stats, without what it doesn't hold: their sketches."""
    batches = []
    for row in read_stats_table(storage).to_pylist():
        fields = {name: row[name] for name in _PLAIN}
        for name in ("finish_reasons", "error_types"):
            fields[name] = None if row[name] is None else {c["value"]: c["count"] for c in row[name]}
        batches.append(BatchStats(**fields, latency={name: row[name] for name in LATENCY_FIELDS}))
    return batches


def add_batches(known: dict[str, BatchStats], batches: Iterable[BatchStats]) -> None:
    """Take in what another source knows of batches; what is known already wins, field by field."""
    for stats in batches:
        ours = known.get(stats.batch_id)
        known[stats.batch_id] = stats if ours is None else merge_stats(ours, stats)


def is_settled(batch: BatchStats, committed: Mapping[int, CommittedShard]) -> bool:
    """Is all said of this batch? Not of one that did not commit and whose shard is to be done yet: the attempt that commits
    will say what became of its journaled rows, and a line of batch_stats is never changed."""
    if batch.outcome not in UNCOMMITTED:
        return True
    standing = committed.get(parse_batch_id(batch.batch_id)[0])
    # Within one run a shard is done once: nothing of it comes after its commit, whatever its attempt's number.
    return standing is not None and batch.epoch <= standing.footer.epoch


def write_batch_stats(storage: Storage, epoch: int, batches: Mapping[str, BatchStats]) -> None:
    """Add the batches that batch_stats doesn't have yet, as this run's one file."""
    have = set(read_stats_table(storage)["batch_id"].to_pylist())
    new = [batches[batch_id] for batch_id in sorted(batches.keys() - have)]
    if not new:
        return
    try:
        storage.create(f"{STATS_FOLDER}/run-{epoch:06d}.parquet", _to_parquet(make_stats_table(new)))
    except AlreadyExists:
        return  # ours, after a lost reply: no other driver ever has this epoch


# ---- the frozen plan -------------------------------------------------------------------------------------------------


def write_plan_files(storage: Storage, files: Sequence[InputFile], passthrough: pa.Schema) -> None:
    """Freeze the listing. `passthrough` (types of the copied columns) rides along in the schema's metadata."""
    schema = pa.schema(
        [
            ("path", pa.string()),
            ("num_bytes", pa.int64()),
            ("version", pa.string()),
            ("num_rows", pa.int64()),
            ("row_group_rows", pa.list_(pa.int64())),
        ],
        metadata={b"passthrough": passthrough.serialize().to_pybytes()},
    )
    rows = [dataclasses.asdict(file) for file in files]
    _create_once(storage, PLAN_FILES, _to_parquet(pa.Table.from_pylist(rows, schema=schema)))


def _create_once(storage: Storage, path: str, data: pa.Buffer) -> None:
    """Create, or find our own after a lost reply. Raises LeaseLost when it is another driver's: only the holder of the
    lease writes plans, but where the store has no conditional writes two may think that they are."""
    try:
        storage.create(path, data)
    except AlreadyExists:
        if storage.read_bytes(path) != data.to_pybytes():
            raise LeaseLost(
                f"{storage.url(path)}: another run planned this folder meanwhile; start again to go on with its plan"
            ) from None


def read_plan(storage: Storage) -> tuple[list[InputFile], pa.Schema, list[Shard]] | None:
    """(files, passthrough schema, shards planned so far); None when nothing was planned yet. Raises OutputError where the
    plan is damaged."""
    try:
        with refusing_damage(storage.url(PLAN_FILES), DAMAGED), storage.open_read(PLAN_FILES) as source:
            table = pq.read_table(source)
            files = [InputFile(**{**row, "row_group_rows": tuple(row["row_group_rows"])}) for row in table.to_pylist()]
            passthrough = pa.ipc.read_schema(pa.py_buffer(table.schema.metadata[b"passthrough"]))
    except NotFound:
        return None
    shards: list[Shard] = []
    for info in storage.list_files(PLAN_FOLDER, suffix=".parquet"):
        if info.path != PLAN_FILES:
            with refusing_damage(storage.url(info.path), DAMAGED), storage.open_read(info.path) as source:
                shards += [
                    Shard(row["number"], files[row["file"]], row["row_start"], row["row_end"], *map(row.get, EXPECTED))
                    for row in pq.read_table(source).to_pylist()
                ]
    return files, passthrough, shards


def write_plan_shards(storage: Storage, files: Sequence[InputFile], shards: Sequence[Shard]) -> None:
    """Freeze more shards. Their numbers go on where the plan stopped, so the part's name never repeats."""
    numbers = {file.path: number for number, file in enumerate(files)}
    table = pa.table(
        {
            "number": [shard.number for shard in shards],
            "file": [numbers[shard.file.path] for shard in shards],
            "row_start": [shard.row_start for shard in shards],
            "row_end": [shard.row_end for shard in shards],
            **{name: pa.array([getattr(shard, name) for shard in shards], pa.float64()) for name in EXPECTED},
        }
    )
    _create_once(storage, PLAN_SHARDS.format(shards[0].number), _to_parquet(table))


# ---- JSON objects ----------------------------------------------------------------------------------------------------


def read_json(storage: Storage, path: str) -> dict[str, Any] | None:
    """None where there is none. Raises OutputError for what is no JSON object."""
    try:
        value = json.loads(storage.read_bytes(path))
    except NotFound:
        return None
    except (ValueError, RecursionError) as error:
        raise OutputError(f"{storage.url(path)}: is not JSON; {RESTORE}") from error
    if not isinstance(value, dict):
        raise OutputError(f"{storage.url(path)}: is no JSON object; {RESTORE}")
    return value


def write_json(storage: Storage, path: str, value: Mapping[str, Any]) -> None:
    storage.put(path, json.dumps(value, ensure_ascii=False).encode())
