"""(spec, files, what is planned already) -> shards. Pure and deterministic; the plan is written once and then holds.

A shard is a contiguous range of rows of one file, cut at row-group borders where that does not make it much smaller or
larger than wanted. A limit plans a prefix of the rows; a later run without it extends the plan and keeps every shard.

A row group can't be decoded in part from its middle: each shard that lies in it decodes it from its start, or fetches it
whole from a remote store. So one large row group is cut into few pieces (`choose_min_rows`), whatever else is wanted.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from batchgen.errors import InputError
from batchgen.records import InputFile, Shard
from batchgen.spec import JobSpec

MAX_SHARDS = 200_000
SHARDS_PER_WORKER = 4
# A shard's target: what DESIGN calls 64 to 256 MB or 10 to 30 engine-minutes, the middle of both.
TARGET_BYTES = 128 * 2**20
TARGET_S = 20 * 60
BYTES_PER_TOKEN = 4.5
# A row group is cut into this many shards: 2.5 times decoded on a local disk, 4 times fetched from a remote store ...
PIECES_PER_GROUP = 4
MAX_AMPLIFICATION = 4.0
# ... unless they came out larger than this: a worker holds a shard's file in memory when it commits.
MAX_BYTES = 2**30
# Until a run has measured lengths: an answer takes about this share of max_tokens, and never more than EXPECTED_TOKENS.
EXPECTED_SHARE = 0.25
EXPECTED_TOKENS = 4_000
# One engine's assumed rate, order of magnitude only: it decides shard size, nothing else.
ENGINE_TOKENS_PER_S = {"simulated": 3_000.0, "transformers": 2_000.0}
OTHER_TOKENS_PER_S = 5_000.0


@dataclass(frozen=True, slots=True)
class Plan:
    """All files and the shards of the rows planned so far, in input order."""

    files: tuple[InputFile, ...]
    shards: tuple[Shard, ...]

    @property
    def num_rows(self) -> int:
        """Rows in the files, planned or not."""
        return sum(file.num_rows for file in self.files)

    @property
    def num_planned_rows(self) -> int:
        return sum(shard.num_rows for shard in self.shards)


def expected_tokens(spec: JobSpec, mean_tokens: float | None = None) -> float:
    """Expected completion tokens of one row, its n samples together. `mean_tokens`: of an answer, where it was measured."""
    one = min(max(1.0, spec.sampling.max_tokens * EXPECTED_SHARE), EXPECTED_TOKENS)
    if mean_tokens is not None:
        one = min(max(1.0, mean_tokens), spec.sampling.max_tokens)
    return one * spec.sampling.n


def choose_rows_per_shard(spec: JobSpec, num_rows: int, mean_tokens: float | None = None) -> int:
    """Rows a shard should have: by bytes and minutes, at least 4 a worker, at most 200,000 a job."""
    if spec.output.rows_per_shard is not None:
        wanted = spec.output.rows_per_shard
    else:
        tokens = expected_tokens(spec, mean_tokens)
        by_bytes = TARGET_BYTES / (tokens * BYTES_PER_TOKEN)
        by_time = TARGET_S * ENGINE_TOKENS_PER_S.get(spec.engine.kind, OTHER_TOKENS_PER_S) / tokens
        by_workers = num_rows // (SHARDS_PER_WORKER * spec.cluster.workers.max)
        wanted = max(1, min(int(by_bytes), int(by_time), by_workers))
    return max(wanted, math.ceil(num_rows / MAX_SHARDS))


def choose_min_rows(spec: JobSpec, num_rows: int, group_rows: int, mean_tokens: float | None = None) -> int:
    """Rows that a shard within a row group of `group_rows` has at least, of a job of `num_rows`.

    A quarter of the row group, which bounds read amplification at about 4. That gives up on 4 shards a worker, never
    on one: with few shards a worker, there are as many for each, so that none waits for the last one of another. It
    also gives way to memory (`MAX_BYTES`) and to an explicit `output.rows_per_shard`; `describe_amplification` warns.
    """
    if spec.output.rows_per_shard is not None:
        return 0
    workers = spec.cluster.workers.max
    shards_each = PIECES_PER_GROUP * num_rows // (max(1, group_rows) * workers)
    if shards_each >= SHARDS_PER_WORKER:
        rows = math.ceil(group_rows / PIECES_PER_GROUP)
    else:
        rows = _share(num_rows, max(1, shards_each) * workers)
    return min(rows, int(MAX_BYTES / (expected_tokens(spec, mean_tokens) * BYTES_PER_TOKEN)))


def _share(num_rows: int, num_shards: int) -> int:
    """Rows of the largest of that many equal shards; of the smallest where the largest would make fewer shards."""
    rows = max(1, math.ceil(num_rows / num_shards))
    return rows if math.ceil(num_rows / rows) >= num_shards else max(1, num_rows // num_shards)


def cut_file(
    row_group_rows: Sequence[int], start: int, end: int, wanted: int, min_rows: Callable[[int], int] = lambda _: 0
) -> list[int]:
    """Row numbers that end each shard of rows start..end of a file: equal pieces of at most `wanted` rows, or of
    `min_rows` of the row group they start in where that is more. A row-group border near a piece's end is taken instead,
    so that no row group is decoded twice for a few rows: no shard gets less than half its piece or, beyond `min_rows`,
    more than half of `wanted` on top of it."""
    borders = list(accumulate(row_group_rows))
    ends: list[int] = []
    while start < end:
        size = max(wanted, min_rows(row_group_rows[bisect_right(borders, start)]))
        piece = math.ceil((end - start) / math.ceil((end - start) / size))
        most = max(size, piece + wanted / 2)
        goal = start + piece
        after = bisect_left(borders, goal)
        around = borders[max(0, after - 1) : after + 1]
        near = [border for border in around if piece / 2 <= border - start <= most and border < end]
        start = min(near, key=lambda border: abs(border - goal)) if near and goal < end else goal
        ends.append(start)
    return ends


def make_plan(
    spec: JobSpec,
    files: Sequence[InputFile],
    planned: Sequence[Shard] = (),
    group_bytes: Mapping[str, Sequence[int]] | None = None,
    mean_tokens: float | None = None,
) -> Plan:
    """The plan for the first `input.limit` rows (all without one), keeping the shards planned before. `group_bytes`: what
    the prompts of each row group of a file take, by its path, where known. `mean_tokens`: of an answer, where an
    earlier run measured it.

    Raises InputError when the input holds no rows, or more files than a job may have shards.
    """
    num_rows = sum(file.num_rows for file in files)
    if num_rows == 0:
        raise InputError(f"input.paths: {len(files)} files with no rows; give one that has some")
    wanted = choose_rows_per_shard(spec, num_rows, mean_tokens)
    limit = num_rows if spec.input.limit is None else min(spec.input.limit, num_rows)

    def min_rows(group_rows: int) -> int:
        return choose_min_rows(spec, num_rows, group_rows, mean_tokens)

    # The rows of a canary are shards of their own, so that they are committed, and looked at, soon.
    first = min(limit, spec.gates.canary.rows) if spec.gates.canary is not None and not planned else 0
    kept = cut_files(files, planned, first, wanted, min_rows) if first else planned
    shards = cut_files(files, kept, limit, wanted, min_rows)
    # Whole files and whole row groups make more shards than rows / wanted: larger ones, until they fit.
    while len(shards) > MAX_SHARDS and wanted < num_rows:
        wanted *= 2
        shards = cut_files(files, kept, limit, wanted, min_rows)
    if len(shards) > MAX_SHARDS:
        raise InputError(
            f"input.paths: {len(files)} files make {len(shards)} shards, more than {MAX_SHARDS}; merge small files first"
        )
    new = add_prompt_bytes(shards[len(planned) :], group_bytes or {})
    return Plan(files=tuple(files), shards=(*planned, *new))


def cut_files(
    files: Sequence[InputFile], planned: Sequence[Shard], limit: int, wanted: int, min_rows: Callable[[int], int]
) -> list[Shard]:
    """The planned shards, and after them those of the rows up to `limit` that they don't cover."""
    shards = list(planned)
    remaining = limit - sum(shard.num_rows for shard in shards)
    done = {shard.file.path: shard.row_end for shard in shards}
    for file in files:
        start = done.get(file.path, 0)
        end = min(file.num_rows, start + max(0, remaining))
        for row_end in cut_file(file.row_group_rows, start, end, wanted, min_rows):
            shards.append(Shard(number=len(shards), file=file, row_start=start, row_end=row_end))
            start = row_end
        remaining -= max(0, end - done.get(file.path, 0))
    return shards


def add_prompt_bytes(shards: Sequence[Shard], group_bytes: Mapping[str, Sequence[int]]) -> list[Shard]:
    """The shards with what their prompts take: of each row group their share of its rows."""
    files = {shard.file.path: shard.file for shard in shards if shard.file.path in group_bytes}
    sums = {path: _sum_bytes(file, group_bytes[path]) for path, file in files.items()}
    return [
        replace(shard, prompt_bytes=_interpolate(*sums[shard.file.path], shard)) if shard.file.path in sums else shard
        for shard in shards
    ]


def _sum_bytes(file: InputFile, group_bytes: Sequence[int]) -> tuple[list[int], list[int]]:
    """(rows, bytes) before each row group that has rows, and behind the last."""
    pairs = [(rows, size) for rows, size in zip(file.row_group_rows, group_bytes, strict=True) if rows]
    return (
        list(accumulate((rows for rows, _ in pairs), initial=0)),
        list(accumulate((size for _, size in pairs), initial=0)),
    )


def _interpolate(rows: Sequence[int], sizes: Sequence[int], shard: Shard) -> float:
    def before(row: int) -> float:
        group = min(bisect_right(rows, row), len(rows) - 1)
        share = (row - rows[group - 1]) / (rows[group] - rows[group - 1])
        return sizes[group - 1] + share * (sizes[group] - sizes[group - 1])

    return before(shard.row_end) - before(shard.row_start)


def read_amplification(shards: Sequence[Shard]) -> float:
    """Rows read for each row used. A shard decodes from the start of the row group that holds its first row; from a
    remote store it fetches each of its row groups whole."""
    used = sum(shard.num_rows for shard in shards)
    files = {shard.file.path: shard.file for shard in shards}
    borders = {path: list(accumulate(file.row_group_rows)) for path, file in files.items()}
    read = sum(_rows_read(shard, borders[shard.file.path], is_remote="://" in shard.file.path) for shard in shards)
    return read / used if used else 1.0


def _rows_read(shard: Shard, borders: Sequence[int], *, is_remote: bool) -> int:
    """`borders`: where each row group of the file ends."""
    first = bisect_right(borders, shard.row_start)
    start = borders[first - 1] if first else 0
    end = borders[bisect_left(borders, shard.row_end)] if is_remote else shard.row_end
    return end - start


def describe_amplification(shards: Sequence[Shard]) -> str | None:
    """One sentence with the mend when the input is read far more often than once; None when it isn't."""
    amplification = read_amplification(shards)
    if amplification <= MAX_AMPLIFICATION:
        return None
    rows = round(sum(shard.num_rows for shard in shards) / len(shards))
    return (
        f"the input is read {amplification:.1f} times over, because its row groups are much larger than a shard; "
        f"write it with smaller row groups (about {rows:,} rows each)"
    )


def list_changes(
    planned: Sequence[InputFile], found: Sequence[tuple[str, str]]
) -> tuple[list[str], list[str], list[str]]:
    """(missing, changed, new) paths of a later listing, given as (path, version), against the planned files."""
    versions = dict(found)
    known = {file.path for file in planned}
    missing = [file.path for file in planned if file.path not in versions]
    changed = [file.path for file in planned if versions.get(file.path, file.version) != file.version]
    return missing, changed, [path for path, _ in found if path not in known]
