"""Where a simulation's lengths come from: a Parquet file with measured lengths, an earlier run, or stated figures.

Raises InputError with what to change. Nothing is assumed where nothing is given: a job's time is proportional to lengths
that only somebody who saw answers can know.
"""

from collections import Counter

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchgen.errors import InputError
from batchgen.length_files import read_prior
from batchgen.parquet import read_table
from batchgen.simulate.workload import Lengths, make_histogram_lengths, make_lengths, make_lognormal
from batchgen.spec import JobSpec

NOTHING = (
    "nothing says how long the answers are: give --lengths FILE (Parquet with a column completion_tokens), --from OUT (an "
    "earlier run), or --mean-tokens N with --sigma S"
)


def choose_lengths(
    spec: JobSpec,
    *,
    lengths_file: str | None,
    from_out: str | None,
    mean_tokens: float | None,
    sigma: float,
    prompt_tokens: int,
) -> tuple[Lengths, str]:
    """(lengths, where they are from), by the first that is given; last the spec's own `input.length_prior`."""
    given = [
        name
        for name, value in (("--lengths", lengths_file), ("--from", from_out), ("--mean-tokens", mean_tokens))
        if value
    ]
    if len(given) > 1:
        raise InputError(f"{given[0]} and {given[1]}: lengths come from one place; leave one out")
    if lengths_file is not None:
        return read_lengths(lengths_file, prompt_tokens), lengths_file
    if mean_tokens is not None:
        stated = f"stated: lognormal, mean {mean_tokens:g} tokens, sigma {sigma:g}"
        return make_lognormal(mean_tokens, sigma, prompt_tokens), stated
    out = from_out or spec.input.length_prior
    if out is None:
        raise InputError(NOTHING)
    return read_earlier_run(spec, out, prompt_tokens), out


def read_lengths(path: str, prompt_tokens: int) -> Lengths:
    """Of a local Parquet file: `completion_tokens`, and `prompt_tokens` where there is such a column."""
    try:
        names = pq.read_schema(path).names
        if "completion_tokens" not in names:
            raise InputError(f"{path}: has no column completion_tokens; name it so (a run's data/*.parquet have it)")
        table = read_table(path, columns=[name for name in ("prompt_tokens", "completion_tokens") if name in names])
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(
            f"{path}: can't be read as Parquet ({type(error).__name__}); give a local Parquet file"
        ) from error
    return count_pairs(table, path, prompt_tokens)


def count_pairs(table: pa.Table, path: str, prompt_tokens: int) -> Lengths:
    for name in table.column_names:
        if not pa.types.is_integer(table[name].type):
            raise InputError(f"{path}: {name} is {table[name].type}; it must be a whole number of tokens")
    table = table.filter(pc.greater(table["completion_tokens"], 0))
    if table.num_rows == 0:
        raise InputError(f"{path}: no row has completion_tokens above 0; give a file with lengths")
    prompts = table["prompt_tokens"].to_pylist() if "prompt_tokens" in table.column_names else [None] * table.num_rows
    pairs: Counter[tuple[int, int]] = Counter()
    for prompt, completion in zip(prompts, table["completion_tokens"].to_pylist(), strict=True):
        pairs[prompt or prompt_tokens, completion] += 1
    return make_lengths(pairs)


def read_earlier_run(spec: JobSpec, out: str, prompt_tokens: int) -> Lengths:
    # The spec is only asked where it may read; another run's folder is named the same way as a prior's.
    asked = spec.model_copy(update={"input": spec.input.model_copy(update={"length_prior": out})})
    prior = read_prior(asked)
    assert prior is not None  # it raises where there is nothing
    return make_histogram_lengths(Counter(dict(prior.counts)), prompt_tokens)
