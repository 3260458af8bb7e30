"""Carries a compaction out. OUT is read and never written; DEST is a plain dataset of its own at every instant.

Every shard file's seal is checked before its rows are taken. A part is created whole, read back, and its rows' digest held
against that of the rows that were taken. Started again it goes on: parts that stand are read and checked, not made anew.
`_compact.json` in DEST says of what it is made; DEST of anything else is refused. `_SUCCESS` is written last.
"""

import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen import manifest
from batchgen.compact.digest import RowDigest
from batchgen.compact.plan import Source, cut_parts
from batchgen.errors import AlreadyExists, OutputError
from batchgen.names import make_data_path
from batchgen.parquet import ParquetFile, read_table
from batchgen.storage import Storage
from batchgen.verify.damage import RESTORE, refusing_damage
from batchgen.worker.seal import digest_footer, seal_json
from batchgen.worker.shard_footer import read_whole_file

FORMAT_VERSION = 1
PLAN, SUCCESS = "_compact.json", "_SUCCESS"
KEY = b"batchgen.compact"
# Rows are gathered until they take so much, and make one row group.
GROUP_BYTES = 128 * 2**20


def compact(out: Storage, dest: Storage, target_bytes: int, on_part: Callable[[str], None]) -> dict[str, Any]:
    """What was done. Raises OutputError for what can't be compacted, and where a file is not what it should be."""
    _check_places(out, dest)
    sources = _list_sources(out)
    parts = cut_parts(sources, target_bytes)
    _freeze(out, dest, target_bytes, parts)
    num_made = 0
    for number, part in enumerate(parts):
        path = make_part_path(number)
        is_new = dest.info(path) is None
        if is_new:
            _make_part(out, dest, path, part)
        check_part(dest, path, part)
        num_made += is_new
        on_part(f"{path}: {sum(source.num_rows for source in part):,} rows of {len(part):,} shards, checked")
    summary = {"parts": len(parts), "made": num_made, "rows": sum(source.num_rows for source in sources)}
    dest.put(SUCCESS, seal_json(summary | {"source": out.root}))
    return {**summary, "source": out.root, "destination": dest.root}


def make_part_path(number: int) -> str:
    return f"part-{number:06d}.parquet"


def _check_places(out: Storage, dest: Storage) -> None:
    one, other = f"{out.root.rstrip('/')}/", f"{dest.root.rstrip('/')}/"
    if one.startswith(other) or other.startswith(one):
        raise OutputError(f"{dest.root}: lies in {out.root}, or it in there; give a folder apart from it")


def _list_sources(out: Storage) -> list[Source]:
    """The shard files. Raises OutputError for a job that has not finished, and where rows are missing."""
    said = manifest.read_json(out, "manifest.json")
    if said is None or out.info(manifest.SUCCESS) is None:
        raise OutputError(f"{out.root}: has no finished dataset (no _SUCCESS); run its job to the end first")
    committed = manifest.load_committed(out, said["fingerprint"])
    sources = [
        Source(shard, found.info.num_bytes, found.footer.num_rows_ok + found.footer.num_rows_error, found.footer_sha256)
        for shard, found in committed.items()
    ]
    num_rows, wanted = sum(source.num_rows for source in sources), said["rows"]["output"]
    if num_rows != wanted:
        raise OutputError(f"{out.root}: its files hold {num_rows:,} rows, its manifest {wanted:,}; {RESTORE}")
    return sources


def _freeze(out: Storage, dest: Storage, target_bytes: int, parts: list[list[Source]]) -> None:
    """Write down what is made of what, or find that an earlier start did, in just this way."""
    fields = {"format_version": FORMAT_VERSION, "source": out.root, "target_bytes": target_bytes}
    data = seal_json({**fields, "parts": [[asdict(source) for source in part] for part in parts]})
    if manifest.read_json(dest, PLAN) is None and dest.list_files("", suffix=".parquet"):
        raise OutputError(f"{dest.root}: has files of others; give a new folder")
    try:
        dest.create(PLAN, data)
    except AlreadyExists:
        if dest.read_bytes(PLAN) != data:
            raise OutputError(
                f"{dest.root}: was begun from another dataset, another state of it, or for another size; give a new folder"
            ) from None


def _make_part(out: Storage, dest: Storage, path: str, part: list[Source]) -> None:
    sink, digest, writer = io.BytesIO(), None, None
    for group in gather(_read_alike(out, part)):
        if digest is None or writer is None:
            digest = RowDigest(group.schema)
            writer = pq.ParquetWriter(sink, group.schema, compression="zstd")
        digest.add(group)
        writer.write_table(group, row_group_size=group.num_rows)
    if digest is None or writer is None:
        raise OutputError(f"{out.root}: {path} would have no rows; {RESTORE}")
    said = {"digest": digest.hexdigest(), "num_rows": digest.num_rows}
    writer.add_key_value_metadata({KEY: json.dumps(said | {"sources": _name(part)})})
    writer.close()
    try:
        with sink.getbuffer() as data:
            dest.create(path, data)
    except AlreadyExists:
        return  # our own after a lost reply, or another start's: it is checked like any other


def _name(part: list[Source]) -> list[str]:
    return [source.footer_sha256 for source in part]


def _read_shard(out: Storage, source: Source) -> pa.Table:
    """All rows of a shard file whose every byte is what was committed."""
    path = make_data_path(source.shard)
    data = out.read_bytes(path)
    read_whole_file(data, out.url(path))
    if digest_footer(data) != source.footer_sha256:
        raise OutputError(f"{out.url(path)}: was changed since the compaction began; give a new folder")
    return read_table(pa.BufferReader(data)).replace_schema_metadata(None)


def _read_alike(out: Storage, part: list[Source]) -> Iterator[pa.Table]:
    """The part's shards. Raises OutputError where one has other columns than the first."""
    first: pa.Schema | None = None
    for source in part:
        table = _read_shard(out, source)
        first = first or table.schema
        if not table.schema.equals(first):
            where = out.url(make_data_path(source.shard))
            raise OutputError(f"{where}: its columns are not those of the shards before it; {RESTORE}")
        yield table


def gather(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in row groups of about GROUP_BYTES."""
    held: list[pa.Table] = []
    num_bytes = 0
    for table in tables:
        held.append(table)
        num_bytes += table.nbytes
        if num_bytes >= GROUP_BYTES:
            yield from _cut(pa.concat_tables(held), num_bytes)
            held, num_bytes = [], 0
    if held:
        yield from _cut(pa.concat_tables(held), num_bytes)


def _cut(table: pa.Table, num_bytes: int) -> Iterator[pa.Table]:
    step = max(1, table.num_rows * GROUP_BYTES // max(num_bytes, GROUP_BYTES))
    for start in range(0, table.num_rows, step):
        yield table.slice(start, step)


def check_part(dest: Storage, path: str, part: list[Source]) -> None:
    """Read it back: its rows must be those that were taken from these shards, every one, in order."""
    url = dest.url(path)
    with refusing_damage(url, "is damaged; delete it and compact again"), dest.open_read(path) as source:
        parquet = ParquetFile(source)
        said = json.loads((parquet.metadata.metadata or {}).get(KEY, b"{}"))
        digest = RowDigest(parquet.schema_arrow)
        for number in range(parquet.num_row_groups):
            digest.add(parquet.read_row_group(number))
    wanted = sum(source.num_rows for source in part)
    is_same = said.get("digest") == digest.hexdigest() and said.get("sources") == _name(part)
    if not is_same or digest.num_rows != wanted:
        raise OutputError(f"{url}: does not hold the rows of its shards; delete it and compact again")
