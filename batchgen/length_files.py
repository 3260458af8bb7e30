"""Where lengths are read and written: the hint column of the input, and `_batchgen/lengths.json` of a run.

Of the input only the hint column is read, once, before the plan is frozen; the sums go into the plan. What a run measured
is merged from the footers of its shard files when it ends, so that a later job can expect it (`input.length_prior`).
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import groupby
from typing import Any

import pyarrow as pa

from batchgen.errors import InputError, StorageError
from batchgen.lengths import (
    HintTotals,
    LengthPrior,
    bucket_middle,
    format_lengths,
    make_prior,
    merge_lengths,
    total_hints,
)
from batchgen.manifest import CommittedShard, read_json, write_json
from batchgen.read import Unreadable, iter_shard
from batchgen.records import Shard
from batchgen.spec import JobSpec
from batchgen.storage import Storage
from batchgen.verify.damage import RESTORE, refusing_damage

LENGTHS = "_batchgen/lengths.json"
FORMAT_VERSION = 1
# Hints are small: so many of them are decoded at a time.
HINT_ROWS = 8192
NUM_SCAN_THREADS = 8


def measure_shards(shards: Sequence[Shard], spec: JobSpec, planned_hint: str | None) -> list[Shard]:
    """The shards, with what their rows' hints promise where the spec names a column and the plan does not know it yet.
    `planned_hint`: the column that the plan's own sums are of. Raises InputError, and InputChanged when a file is no longer
    the planned one."""
    if spec.input.length_hint is None:
        return list(shards)
    is_other = planned_hint != spec.input.length_hint
    unknown = (shard for shard in shards if is_other or shard.expected_tokens is None)
    files = [list(group) for _, group in groupby(unknown, key=lambda shard: shard.file.path)]
    with ThreadPoolExecutor(NUM_SCAN_THREADS, thread_name_prefix="hints") as threads:
        measured = {shard.number: shard for found in threads.map(lambda f: _measure(f, spec), files) for shard in found}
    return [measured.get(shard.number, shard) for shard in shards]


def _measure(shards: list[Shard], spec: JobSpec) -> list[Shard]:
    """Shards of one file, in order. Each row group is decoded once, whatever the shards' borders; a corrupt page says
    nothing here, and becomes its rows' error later."""
    column, first, last = spec.input.length_hint, shards[0], shards[-1]
    assert column is not None
    limit = None if spec.prompt.sampling is not None else spec.sampling.max_tokens
    totals = [HintTotals()] * len(shards)
    place = 0
    for row, rows in iter_shard(replace(first, row_end=last.row_end), [column], max_rows=HINT_ROWS):
        end = row + rows.num_rows
        while place < len(shards) and shards[place].row_start < end:
            shard = shards[place]
            if not isinstance(rows, Unreadable):
                start = max(row, shard.row_start)
                part = _get_column(rows, column, shard.file.path).slice(start - row, min(end, shard.row_end) - start)
                totals[place] = totals[place].add(total_hints(part, limit))
            if shard.row_end > end:
                break
            place += 1
    return [_expect(shard, total, spec.sampling.n) for shard, total in zip(shards, totals, strict=True)]


def _get_column(rows: pa.RecordBatch, column: str, path: str) -> pa.Array:
    if column not in rows.schema.names:
        raise InputError(f"{path}: has no column '{column}' (input.length_hint); name one that it has, or leave it out")
    found = rows.column(column)
    kinds = pa.types
    if not (kinds.is_integer(found.type) or kinds.is_floating(found.type) or kinds.is_null(found.type)):
        raise InputError(f"{path}: column '{column}' (input.length_hint) is {found.type}; it must be a number")
    return found


def _expect(shard: Shard, total: HintTotals, n: int) -> Shard:
    tokens, largest = total.expect(shard.num_rows)
    return replace(shard, expected_tokens=None if tokens is None else n * tokens, max_expected_tokens=largest)


def read_prior(spec: JobSpec) -> LengthPrior | None:
    """What the run at `input.length_prior` measured; without one, what the first of `input.reuse_from` did that measured
    any. Raises InputError where a prior was named and there is nothing."""
    if (url := spec.input.length_prior) is None:
        return next(
            (prior for url in spec.input.reuse_from if (prior := _find_prior(url, "reuse_from")) is not None), None
        )
    if (prior := _find_prior(url, "length_prior")) is None:
        raise InputError(
            f"input.length_prior: {Storage(url).root} has no measured lengths; name the output.path of a run that "
            "has ended, or leave it out"
        )
    return prior


def _find_prior(url: str, name: str) -> LengthPrior | None:
    """None where nothing was measured. Raises InputError for what can't be read."""
    storage = Storage(url)
    try:
        fields = read_json(storage, LENGTHS)
    except StorageError as error:
        raise InputError(f"input.{name}: {error}") from error
    if fields is None:
        return None
    with refusing_damage(storage.url(LENGTHS), f"is damaged; {RESTORE}", InputError):
        return make_prior(merge_lengths([fields["lengths"]]))


def make_length_facts(committed: Iterable[CommittedShard]) -> dict[str, Any]:
    """What all generations in the output say of lengths. A figure that nobody counted is null."""
    counts = merge_lengths(batch.lengths for shard in committed for batch in shard.footer.batches)
    prior = make_prior(counts)
    return {
        "format_version": FORMAT_VERSION,
        "num_rows": counts.total() if prior else None,
        "mean_completion_tokens": prior.mean_tokens if prior else None,
        "max_completion_tokens": bucket_middle(max(length for _, length in counts)) if prior else None,
        "lengths": format_lengths(counts),
    }


def write_lengths(storage: Storage, committed: Iterable[CommittedShard]) -> None:
    write_json(storage, LENGTHS, make_length_facts(committed))
