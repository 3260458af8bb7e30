"""Where lengths are read and written: the hint or template column of the input, and `_batchgen/lengths.json` of a run.

Of the input only that column is read, once, before the plan is frozen; the sums go into the plan. What a run measured is
merged from the footers of its shard files when it ends, so that a later job can expect it (`input.length_prior`).
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import groupby
from typing import Any

import pyarrow as pa

from batchgen.errors import InputError, StorageError
from batchgen.lengths import (
    BYTES_PER_TOKEN,
    MAX_TEMPLATES,
    HintTotals,
    LengthCounts,
    LengthPrior,
    bucket_middle,
    format_lengths,
    keep_largest,
    make_prior,
    merge_lengths,
    total_hints,
    total_templates,
)
from batchgen.manifest import CommittedShard, read_json, write_json
from batchgen.read import Unreadable, iter_shard
from batchgen.records import Shard
from batchgen.spec import InputSpec, JobSpec
from batchgen.storage import Storage
from batchgen.verify.damage import RESTORE, refusing_damage

LENGTHS = "_batchgen/lengths.json"
FORMAT_VERSION = 1
# Hints are small: so many of them are decoded at a time.
HINT_ROWS = 8192
NUM_SCAN_THREADS = 8


# A field of the input section, and the column that it names.
Measured = tuple[str, str]


def find_measured(spec: InputSpec) -> Measured | None:
    """What shards are measured by: hints, else templates."""
    if spec.length_hint is not None:
        return "length_hint", spec.length_hint
    return None if spec.length_template is None else ("length_template", spec.length_template)


def measure_shards(
    shards: Sequence[Shard], spec: JobSpec, planned: Measured | None, prior: LengthPrior | None = None
) -> list[Shard]:
    """The shards, with what their rows' hints promise, or what the prior says of their templates, where the spec names a
    column and the plan does not know it yet. `planned`: what the plan's own sums are of. Raises InputError, and
    InputChanged when a file is no longer the planned one."""
    by = find_measured(spec.input)
    if by is None or (by[0] == "length_template" and (prior is None or not prior.templates)):
        return list(shards)
    is_other = planned != by
    unknown = (shard for shard in shards if is_other or shard.expected_tokens is None)
    files = [list(group) for _, group in groupby(unknown, key=lambda shard: shard.file.path)]
    with ThreadPoolExecutor(NUM_SCAN_THREADS, thread_name_prefix="hints") as threads:
        measured = {
            shard.number: shard
            for found in threads.map(lambda f: _measure(f, spec, by, prior), files)
            for shard in found
        }
    return [measured.get(shard.number, shard) for shard in shards]


def _measure(shards: list[Shard], spec: JobSpec, by: Measured, prior: LengthPrior | None) -> list[Shard]:
    """Shards of one file, in order. Each row group is decoded once, whatever the shards' borders; a corrupt page says
    nothing here, and becomes its rows' error later."""
    column, first, last = by[1], shards[0], shards[-1]
    limit = None if spec.prompt.sampling is not None else spec.sampling.max_tokens
    totals = [HintTotals()] * len(shards)
    place = 0
    for row, rows in iter_shard(replace(first, row_end=last.row_end), [column], max_rows=HINT_ROWS):
        end = row + rows.num_rows
        while place < len(shards) and shards[place].row_start < end:
            shard = shards[place]
            if not isinstance(rows, Unreadable):
                start = max(row, shard.row_start)
                part = _get_column(rows, by, shard.file.path).slice(start - row, min(end, shard.row_end) - start)
                totals[place] = totals[place].add(_total(part, by, shard, prior, limit))
            if shard.row_end > end:
                break
            place += 1
    return [_expect(shard, total, spec.sampling.n) for shard, total in zip(shards, totals, strict=True)]


def _total(
    values: pa.Array, by: Measured, shard: Shard, prior: LengthPrior | None, max_tokens: int | None
) -> HintTotals:
    if by[0] == "length_hint" or prior is None:
        return total_hints(values, max_tokens)
    tokens = None if shard.prompt_bytes is None else shard.prompt_bytes / BYTES_PER_TOKEN / shard.num_rows
    return total_templates(values, prior, tokens, max_tokens)


def _get_column(rows: pa.RecordBatch, by: Measured, path: str) -> pa.Array:
    """A plan may stand whose input nobody has looked at with this column."""
    field, column = by
    if column not in rows.schema.names:
        raise InputError(f"{path}: has no column '{column}' (input.{field}); name one that it has, or leave it out")
    found = rows.column(column)
    is_fit, wanted = (is_number, "a number") if field == "length_hint" else (is_name, "text or integers")
    if not is_fit(found.type):
        raise InputError(f"{path}: column '{column}' (input.{field}) is {found.type}; it must be {wanted}")
    return found


def is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind))


def is_name(kind: pa.DataType) -> bool:
    """Can it name templates?"""
    if pa.types.is_dictionary(kind):
        return is_name(kind.value_type)
    kinds = (
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.binary(),
        pa.large_binary(),
        pa.binary_view(),
        pa.null(),
    )
    return kind in kinds or bool(pa.types.is_integer(kind))


def _expect(shard: Shard, total: HintTotals, n: int) -> Shard:
    tokens, largest = total.expect(shard.num_rows)
    return replace(shard, expected_tokens=None if tokens is None else n * tokens, max_expected_tokens=largest)


def read_prior(spec: JobSpec) -> LengthPrior | None:
    """What the run at `input.length_prior` measured; without one, what the first of `input.reuse_from` did that measured
    any. Raises InputError where a prior was named and there is nothing."""
    if (url := spec.input.length_prior) is None:
        return next(
            (prior for url in spec.input.reuse_from if (prior := find_prior(url, "reuse_from")) is not None), None
        )
    if (prior := find_prior(url, "length_prior")) is None:
        raise InputError(
            f"input.length_prior: {Storage(url).root} has no measured lengths; name the output.path of a run that "
            "has ended, or leave it out"
        )
    return prior


def find_prior(url: str, name: str) -> LengthPrior | None:
    """What the run with this output measured, None where that is nothing. `name`: the field of the input section that
    names it. Raises InputError for what can't be read."""
    storage = Storage(url)
    try:
        fields = read_json(storage, LENGTHS)
    except StorageError as error:
        raise InputError(f"input.{name}: {error}") from error
    if fields is None:
        return None
    with refusing_damage(storage.url(LENGTHS), f"is damaged; {RESTORE}", InputError):
        templates = {name: merge_lengths([text]) for name, text in fields.get("templates", {}).items()}
        return make_prior(merge_lengths([fields["lengths"]]), templates, storage.root)


def make_length_facts(committed: Iterable[CommittedShard]) -> dict[str, Any]:
    """What all generations in the output say of lengths. A figure that nobody counted is null."""
    shards = list(committed)
    counts = merge_lengths(batch.lengths for shard in shards for batch in shard.footer.batches)
    templates: dict[str, LengthCounts] = {}
    for shard in shards:
        for name, text in (shard.footer.templates or {}).items():
            templates.setdefault(name, Counter()).update(merge_lengths([text]))
    prior = make_prior(counts)
    return {
        "format_version": FORMAT_VERSION,
        "num_rows": counts.total() if prior else None,
        "mean_completion_tokens": prior.mean_tokens if prior else None,
        "max_completion_tokens": bucket_middle(max(length for _, length in counts)) if prior else None,
        "lengths": format_lengths(counts),
        "templates": {name: format_lengths(own) for name, own in keep_largest(templates, MAX_TEMPLATES).items()},
    }


def write_lengths(storage: Storage, committed: Iterable[CommittedShard]) -> None:
    write_json(storage, LENGTHS, make_length_facts(committed))
