"""Files that show whether they are whole: of a shard file every byte, of a JSON object every character.

A shard file's Parquet footer holds `batchgen.body_sha256`, the SHA-256 of every byte before the footer. The SHA-256 of
the footer itself (metadata, its length, the closing magic) is the file's *footer digest*: through the footer it covers
the body too, so whoever knows it knows the whole file. A run that reads footers anyway, after a crash, has it without
reading any row again; and without it, on a folder whose run is still going on, the footer alone vouches for the rows.

A sealed JSON object begins with `is_sealed` and ends with `sha256`, over the object without it; its bytes are exactly
those that Python's json writes of it, so that not even a blank can change unseen. This finds accidents, not forgers.
"""

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.parquet import ParquetFile

BODY_KEY = b"batchgen.body_sha256"
MAGIC = b"PAR1"
# The footer's length and the magic behind it.
END_BYTES = 8
# What is read of a file's end at first: one request, and enough for the footers of most shard files.
TAIL_BYTES = 2**17


def digest(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


# ---- Parquet ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Seal:
    """`body_sha256` is None for a file of an earlier version, which had none."""

    footer_sha256: str
    body_sha256: str | None


def write_sealed(
    table: pa.Table, *, row_group_rows: int, compression_level: int, beside: Mapping[bytes, bytes] | None = None
) -> pa.Buffer:
    """The bytes of a Parquet file (zstd) with its seal. `beside`: more for the footer, outside of Arrow's schema, which
    holds its metadata a second time."""
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, table.schema, compression="zstd", compression_level=compression_level) as writer:
        writer.write_table(table, row_group_size=row_group_rows)
        with sink.getbuffer() as body:
            body_bytes = len(body)
            writer.add_key_value_metadata({BODY_KEY: digest(body), **(beside or {})})
    data = sink.getvalue()
    if find_footer(data[-END_BYTES:], len(data)) != body_bytes:
        raise ValueError("the Parquet writer put more than the footer behind the rows; the seal would not hold")
    return pa.py_buffer(data)


def find_footer(tail: bytes | memoryview, num_bytes: int) -> int:
    """Where the footer begins in a file of this size, by its last bytes. Raises ValueError for what is not Parquet."""
    if len(tail) < END_BYTES or bytes(tail[-4:]) != MAGIC:
        raise ValueError("no Parquet footer at its end")
    start = num_bytes - END_BYTES - int.from_bytes(tail[-END_BYTES:-4], "little")
    if start < len(MAGIC):
        raise ValueError("a Parquet footer larger than its file")
    return start


def digest_footer(data: bytes | memoryview | pa.Buffer) -> str:
    """The footer digest of a whole file in memory."""
    view = memoryview(data)
    return digest(view[find_footer(view[-END_BYTES:], len(view)) :])


def read_footer_bytes(source: BinaryIO) -> bytes:
    """The footer of an open Parquet file, and nothing else of it. Raises ValueError for what is not Parquet."""
    num_bytes = source.seek(0, io.SEEK_END)
    tail = _read_from(source, max(0, num_bytes - TAIL_BYTES))
    start = find_footer(tail, num_bytes)
    return tail[start - num_bytes :] if num_bytes - start <= len(tail) else _read_from(source, start)


def _read_from(source: BinaryIO, start: int) -> bytes:
    source.seek(start)
    return source.read()


def open_footer(footer: bytes | memoryview) -> ParquetFile:
    """The metadata of a file of which there is only the footer. Raises what Arrow raises of bytes that are none."""
    return ParquetFile(pa.BufferReader(bytes(footer)))


def read_seal(footer: bytes | memoryview, parquet: ParquetFile) -> Seal:
    body = (parquet.metadata.metadata or {}).get(BODY_KEY)
    return Seal(digest(footer), None if body is None else body.decode(errors="replace"))


# ---- JSON ------------------------------------------------------------------------------------------------------------


def seal_json(value: Mapping[str, Any]) -> bytes:
    """The bytes of a sealed object."""
    return _append_digest(_dump({"is_sealed": True, **value}))


def _append_digest(content: bytes) -> bytes:
    """The JSON object with its own digest as the last member."""
    return content[:-1] + f', "sha256": "{digest(content)}"}}'.encode()


def is_json_whole(raw: bytes) -> bool | None:
    """None for an object that was never sealed (an earlier version's). Raises ValueError for what is no JSON object."""
    value = json.loads(raw)
    if not isinstance(value, dict):
        raise ValueError("no JSON object")
    if "is_sealed" not in value and "sha256" not in value:
        return None
    content = {name: held for name, held in value.items() if name != "sha256"}
    return _append_digest(_dump(content)) == raw


def _dump(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode(errors="surrogatepass")
