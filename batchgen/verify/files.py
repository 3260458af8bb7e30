"""One shard file against the plan, the manifest and its own seal. Reads it once; many may be checked at the same time.

Digests come first: bytes that are known to be damaged are never given to a decoder. A file that has a seal is decoded in
the few columns that the checks need; one of an earlier version, without a seal, in all of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from batchgen.batches import FileFooter
from batchgen.errors import NotFound, OutputError
from batchgen.names import make_batch_id
from batchgen.parquet import ParquetFile
from batchgen.records import Shard
from batchgen.storage import FileInfo, Storage
from batchgen.verify.damage import OF_DAMAGE
from batchgen.verify.rows import AGAIN, CHECKED, RowCheck
from batchgen.worker.seal import END_BYTES, Seal, digest, find_footer
from batchgen.worker.shard_footer import parse_footer


@dataclass(frozen=True, slots=True)
class Expected:
    """What must be true of every shard file of a job. `entries`: lines of the manifest by path; `epoch` is the manifest's,
    and `is_settled` says that no run began since. `fields`: the output's columns in order; types of ours only."""

    fingerprint: str
    n: int
    has_own_keys: bool
    fields: Sequence[tuple[str, pa.DataType | None]]
    entries: Mapping[str, Mapping[str, Any]]
    epoch: int
    is_settled: bool


@dataclass(slots=True)
class FileFacts:
    """What was found out. `rows` is None where they were not looked at; `is_newer`: made after the manifest."""

    path: str
    shard: Shard
    faults: list[str]
    footer: FileFooter | None = None
    rows: RowCheck | None = None
    is_sealed: bool = True
    is_newer: bool = False


class Fault(Exception):
    """Nothing further can be said of the file."""


def check_file(storage: Storage, info: FileInfo, shard: Shard, expected: Expected) -> FileFacts:
    """All that can be known of one planned shard file. Raises StorageError where the store fails."""
    facts = FileFacts(info.path, shard, [])
    try:
        data = memoryview(storage.read_bytes(info.path))
        footer = _find_footer_bytes(data)
        _check_bytes(data, footer, facts, expected)
        _check_footer(facts, expected)
        _check_rows(data, facts, expected)
    except NotFound:
        facts.faults.append("was there and is gone")
    except Fault as fault:
        facts.faults.append(str(fault))
    return facts


def _find_footer_bytes(data: memoryview) -> memoryview:
    try:
        return data[find_footer(data[-END_BYTES:], len(data)) :]
    except ValueError as error:
        raise Fault(f"is no whole Parquet file ({error})") from error


def _check_bytes(data: memoryview, footer: memoryview, facts: FileFacts, expected: Expected) -> None:
    """Are these the bytes that were committed? Fills in what the footer says."""
    entry = expected.entries.get(facts.path, {})
    known = entry.get("footer_sha256")
    is_known = known is not None and digest(footer) == known
    if known is not None and not is_known and expected.is_settled:
        raise Fault("its footer is not the one that manifest.json knows")
    try:
        facts.footer, seal = parse_footer(bytes(footer), "")
    except OutputError as error:
        raise Fault("its footer is damaged, or not one of batchgen's") from error
    except OF_DAMAGE as error:
        raise Fault(f"its footer is damaged ({type(error).__name__})") from error
    facts.is_newer = facts.footer.epoch > expected.epoch
    if known is not None and not is_known and not facts.is_newer:
        raise Fault("its footer is not the one that manifest.json knows")
    _check_body(data, footer, seal, facts)
    if entry and not facts.is_newer and entry["num_bytes"] != len(data):
        facts.faults.append(f"has {len(data)} bytes; manifest.json says {entry['num_bytes']}")


def _check_body(data: memoryview, footer: memoryview, seal: Seal, facts: FileFacts) -> None:
    facts.is_sealed = seal.body_sha256 is not None
    if seal.body_sha256 is not None and digest(data[: len(data) - len(footer)]) != seal.body_sha256:
        raise Fault("its rows are not the bytes that were committed")


def _check_footer(facts: FileFacts, expected: Expected) -> None:
    footer, shard = facts.footer, facts.shard
    assert footer is not None
    if footer.fingerprint != expected.fingerprint:
        raise Fault("belongs to another job (fingerprint)")
    if footer.shard != shard.number:
        raise Fault(f"holds shard-{footer.shard:09d}, by its footer")
    if footer.batch_id != make_batch_id(footer.shard, footer.epoch, footer.attempt):
        facts.faults.append("its footer names a batch that is not of its attempt")
    entry = expected.entries.get(facts.path)
    if entry is not None and not facts.is_newer:
        said = (entry["num_rows"], entry["num_rows_error"])
        if said != (footer.num_rows_ok + footer.num_rows_error, footer.num_rows_error):
            facts.faults.append(f"manifest.json counts {said[0]} rows and {said[1]} errors, its footer others")


def _check_rows(data: memoryview, facts: FileFacts, expected: Expected) -> None:
    assert facts.footer is not None
    check = RowCheck(facts.shard, expected.n, expected.has_own_keys)
    try:
        parquet = ParquetFile(pa.BufferReader(pa.py_buffer(data)))
        _check_fields(parquet.schema_arrow, expected)
        for number in range(parquet.num_row_groups):
            check.add(parquet.read_row_group(number, columns=list(CHECKED) if facts.is_sealed else None))
    except OF_DAMAGE as error:
        raise Fault(f"its rows can't be decoded ({type(error).__name__})") from error
    facts.rows = check
    facts.faults += check.list_faults(facts.footer)


def _check_fields(schema: pa.Schema, expected: Expected) -> None:
    names = [name for name, _ in expected.fields]
    if schema.names != names:
        raise Fault(f"has other columns than the job's: {', '.join(sorted(set(schema.names) ^ set(names))) or 'moved'}")
    for name, kind in expected.fields:
        if kind is not None and schema.field(name).type != kind:
            raise Fault(f"its column '{name}' is {schema.field(name).type} where {kind} was written")


__all__ = ["AGAIN", "Expected", "Fault", "FileFacts", "check_file"]
