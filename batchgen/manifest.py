"""What is committed, and what a run says of it.

The output folder is the truth: a shard is committed when its file exists. What is in the files is read from
`_batchgen/committed.parquet`, the compacted copy of their footers, and from the footers themselves where the copy has
no line for that very version of a file (the driver died before it compacted, or the folder was copied). Also the
frozen plan, the spec and `_SUCCESS`.
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
from batchgen.driver.fence import Put
from batchgen.errors import AlreadyExists, LeaseLost, NotFound, OutputError
from batchgen.names import parse_batch_id
from batchgen.parquet import ParquetFile, read_table
from batchgen.records import InputFile, Shard
from batchgen.stats import merge_stats
from batchgen.storage import FileInfo, Storage
from batchgen.verify.damage import RESTORE, refusing_damage
from batchgen.worker.shard_footer import read_footer
from batchgen.write import footer_from_json, footer_to_json, make_parquet

SPEC = "_batchgen/spec.json"
PLAN_FOLDER = "_batchgen/plan"
PLAN_FILES = f"{PLAN_FOLDER}/files.parquet"
PLAN_SHARDS = PLAN_FOLDER + "/shards-{:06d}.parquet"
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
            parts = ParquetFile(source).iter_batches(COMMITTED_ROWS)
            return {
                (row["path"], row["version"]): (footer_from_json(row["footer"]), row["footer_sha256"])
                for part in parts
                for row in part.to_pylist()
            }
    except (NotFound, OutputError):
        return {}


def write_committed(put: Put, committed: Iterable[CommittedShard]) -> None:
    """Compact the footers, so that the next run need not read them one by one. A cache: may be deleted at any time."""
    sink, shards = pa.BufferOutputStream(), iter(committed)
    with pq.ParquetWriter(sink, COMMITTED_SCHEMA, compression="zstd") as writer:
        # 200,000 footers are a gigabyte as text: a part of them at a time.
        while part := list(islice(shards, COMMITTED_ROWS)):
            rows = [(s.info.path, s.info.version, footer_to_json(s.footer), s.footer_sha256) for s in part]
            columns = [pa.array(values, pa.string()) for values in zip(*rows, strict=True)]
            writer.write_table(pa.Table.from_arrays(columns, schema=COMMITTED_SCHEMA))
    put(COMMITTED, sink.getvalue().to_pybytes())


# ---- batches ---------------------------------------------------------------------------------------------------------


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
    _create_once(storage, PLAN_FILES, make_parquet(pa.Table.from_pylist(rows, schema=schema)))


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
            table = read_table(source)
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
                    for row in read_table(source).to_pylist()
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
    _create_once(storage, PLAN_SHARDS.format(shards[0].number), make_parquet(table))


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
