"""Output rows as a gate counts them: read from shard files, some rows at a time, in as few columns as the gate needs.

For a canary that is a few hundred rows; for a final gate it is every row, by the driver: none of them where the footers
know all it asks, else small columns, and the text where refusals, a schema or duplicates are asked about. Texts are known
by 8 bytes of digest; of more than `MAX_HASHES` answers those are kept whose digests are chosen by themselves, so that what
repeats is kept or left out together.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator

import pyarrow as pa
import pyarrow.compute as pc

from batchgen.gates.decide import Counts, needs_rows
from batchgen.manifest import CommittedShard
from batchgen.parquet import ParquetFile
from batchgen.spec import JobSpec
from batchgen.specs.gates import FinalGate, RateLimits
from batchgen.storage import Storage
from batchgen.verify.damage import RESTORE, refusing_damage

MAX_HASHES = 2**21
# A row group holds 16 times as many, whose texts together may be more than a driver has room for.
BATCH_ROWS = 1024
SMALL = ["status", "finish_reason", "completion_tokens"]

Test = Callable[[str], bool]


class Scanner:
    """Counts rows for one gate of one job. `num_rows`: how many rows will come, at most."""

    def __init__(self, spec: JobSpec, gate: RateLimits, num_rows: int) -> None:
        gates = spec.gates
        self._is_refusal = make_refusal_test(gates.refusals) if gate.max_refusal_rate is not None else None
        schema = find_schema(spec)
        self._is_fit = make_schema_test(schema) if gate.max_schema_failure_rate is not None and schema else None
        self._hashes: set[int] | None = None
        if isinstance(gate, FinalGate) and gate.max_duplicate_rate is not None:
            self._hashes = set()
        self._step = -(-num_rows // MAX_HASHES)

    @property
    def columns(self) -> list[str]:
        needs_text = self._is_refusal or self._is_fit or self._hashes is not None
        return [*SMALL, "text"] if needs_text else SMALL

    def count(self, rows: pa.Table) -> Counts:
        is_ok = pc.equal(rows["status"], "ok")
        ok = rows.filter(is_ok)
        texts = (text or "" for text in ok["text"].to_pylist()) if "text" in ok.schema.names else ()
        refused, unfit, num_hashed, num_repeated = self._look(texts)
        return Counts(
            rows=rows.num_rows,
            errors=rows.num_rows - ok.num_rows,
            truncated=pc.sum(pc.equal(ok["finish_reason"], "length")).as_py() or 0,
            refused=refused,
            unfit=unfit,
            tokens=pc.sum(ok["completion_tokens"]).as_py() or 0,
            num_hashed=num_hashed,
            num_repeated=num_repeated,
        )

    def _look(self, texts: Iterable[str]) -> tuple[int, int, int, int]:
        refused = unfit = num_hashed = num_repeated = 0
        for text in texts:
            refused += self._is_refusal is not None and self._is_refusal(text)
            unfit += self._is_fit is not None and not self._is_fit(text)
            if self._hashes is not None and (value := hash_text(text)) % self._step == 0:
                num_hashed += 1
                num_repeated += value in self._hashes
                self._hashes.add(value)
        return refused, unfit, num_hashed, num_repeated


def hash_text(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def find_schema(spec: JobSpec) -> str | None:
    """As JSON text."""
    own, guided = spec.gates.json_schema, spec.sampling.guided
    found = own if own is not None else guided.json_schema if guided is not None else None
    return None if found is None else str(found)


def make_refusal_test(patterns: Iterable[str]) -> Test:
    compiled = [re.compile(pattern) for pattern in patterns]
    return lambda text: any(pattern.search(text) for pattern in compiled)


def make_schema_test(schema: str) -> Test:
    from jsonschema import Draft202012Validator
    from jsonschema.validators import validator_for
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import EMPTY_REGISTRY

    parsed = json.loads(schema)
    # With nothing at hand but itself: an address in a `$ref` is never fetched.
    validator = validator_for(parsed, default=Draft202012Validator)(parsed, registry=EMPTY_REGISTRY)

    def is_fit(text: str) -> bool:
        try:
            return bool(validator.is_valid(json.loads(text)))
        except (ValueError, RecursionError):  # no JSON, or nested beyond what Python reads
            return False
        except Unresolvable:  # a `$ref` that leads nowhere: nothing is of such a schema
            return False

    return is_fit


def scan(
    storage: Storage, shards: Iterable[CommittedShard], spec: JobSpec, gate: RateLimits, max_rows: int | None = None
) -> Counts:
    """Of the first `max_rows` output rows of these files, in their order; of all without. Raises StorageError, and
    OutputError where a file is damaged."""
    chosen = list(shards)
    total = sum(shard.footer.num_rows_ok + shard.footer.num_rows_error for shard in chosen)
    left = total if max_rows is None else min(max_rows, total)
    if left == total and not needs_rows(gate):
        return Counts(rows=total, errors=sum(shard.footer.num_rows_error for shard in chosen))
    scanner, counts = Scanner(spec, gate, max(1, left)), Counts()
    for shard in chosen:
        for rows in _iter_rows(storage, shard.info.path, scanner.columns, left):
            counts = counts.add(scanner.count(rows))
            left -= rows.num_rows
        if left <= 0:
            break
    return counts


def _iter_rows(storage: Storage, path: str, columns: list[str], max_rows: int) -> Iterator[pa.Table]:
    with storage.open_read(path) as source:
        with refusing_damage(storage.url(path), f"is damaged; {RESTORE}"):
            parquet = ParquetFile(source)
            batches = parquet.iter_batches(BATCH_ROWS, columns=columns)
        while max_rows > 0:
            with refusing_damage(storage.url(path), f"is damaged; {RESTORE}"):
                if (batch := next(batches, None)) is None:
                    return
            rows = pa.Table.from_batches([batch.slice(0, max_rows)])
            max_rows -= rows.num_rows
            yield rows
