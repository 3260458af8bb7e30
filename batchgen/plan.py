"""(spec, files, what is planned already) -> shards. Pure and deterministic; the plan is written once and then holds.

A shard is a contiguous range of rows of one file, cut at row-group borders where that does not make it much smaller or
larger than wanted. A limit plans a prefix of the rows; a later run without it extends the plan and keeps every shard.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
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


def expected_tokens(spec: JobSpec) -> float:
    """Expected completion tokens of one row, its n samples together."""
    one = min(max(1.0, spec.sampling.max_tokens * EXPECTED_SHARE), EXPECTED_TOKENS)
    return one * spec.sampling.n


def choose_rows_per_shard(spec: JobSpec, num_rows: int) -> int:
    """Rows a shard should have: by bytes and minutes, at least 4 a worker, at most 200,000 a job."""
    if spec.output.rows_per_shard is not None:
        wanted = spec.output.rows_per_shard
    else:
        tokens = expected_tokens(spec)
        by_bytes = TARGET_BYTES / (tokens * BYTES_PER_TOKEN)
        by_time = TARGET_S * ENGINE_TOKENS_PER_S.get(spec.engine.kind, OTHER_TOKENS_PER_S) / tokens
        by_workers = num_rows // (SHARDS_PER_WORKER * spec.cluster.workers.max)
        wanted = max(1, min(int(by_bytes), int(by_time), by_workers))
    return max(wanted, math.ceil(num_rows / MAX_SHARDS))


def cut_file(row_group_rows: Sequence[int], start: int, end: int, wanted: int) -> list[int]:
    """Row numbers that end each shard of rows start..end of a file: equal pieces of at most `wanted` rows. A row-group
    border near a piece's end is taken instead, so that no row group is decoded twice for a few rows: no shard gets less
    than half its piece or more than half of `wanted` on top of it."""
    borders = list(accumulate(row_group_rows))
    ends: list[int] = []
    while start < end:
        piece = math.ceil((end - start) / math.ceil((end - start) / wanted))
        goal = start + piece
        after = bisect_left(borders, goal)
        around = borders[max(0, after - 1) : after + 1]
        near = [border for border in around if piece / 2 <= border - start <= piece + wanted / 2 and border < end]
        start = min(near, key=lambda border: abs(border - goal)) if near and goal < end else goal
        ends.append(start)
    return ends


def make_plan(spec: JobSpec, files: Sequence[InputFile], planned: Sequence[Shard] = ()) -> Plan:
    """The plan for the first `input.limit` rows (all without one), keeping the shards planned before.

    Raises InputError when the input holds no rows, or more files than a job may have shards.
    """
    num_rows = sum(file.num_rows for file in files)
    if num_rows == 0:
        raise InputError(f"input.paths: {len(files)} files with no rows; nothing to generate")
    wanted = choose_rows_per_shard(spec, num_rows)
    limit = num_rows if spec.input.limit is None else min(spec.input.limit, num_rows)
    shards = cut_files(files, planned, limit, wanted)
    # Whole files and whole row groups make more shards than rows / wanted: larger ones, until they fit.
    while len(shards) > MAX_SHARDS and wanted < num_rows:
        wanted *= 2
        shards = cut_files(files, planned, limit, wanted)
    if len(shards) > MAX_SHARDS:
        raise InputError(
            f"input.paths: {len(files)} files make {len(shards)} shards, more than {MAX_SHARDS}; merge small files first"
        )
    return Plan(files=tuple(files), shards=tuple(shards))


def cut_files(files: Sequence[InputFile], planned: Sequence[Shard], limit: int, wanted: int) -> list[Shard]:
    """The planned shards, and after them those of the rows up to `limit` that they don't cover."""
    shards = list(planned)
    remaining = limit - sum(shard.num_rows for shard in shards)
    done = {shard.file.path: shard.row_end for shard in shards}
    for file in files:
        start = done.get(file.path, 0)
        end = min(file.num_rows, start + max(0, remaining))
        for row_end in cut_file(file.row_group_rows, start, end, wanted):
            shards.append(Shard(number=len(shards), file=file, row_start=start, row_end=row_end))
            start = row_end
        remaining -= max(0, end - done.get(file.path, 0))
    return shards


def read_amplification(shards: Sequence[Shard]) -> float:
    """Rows decoded for each row used: a shard decodes from the start of the row group that holds its first row."""
    used = sum(shard.num_rows for shard in shards)
    decoded = sum(_rows_decoded(shard) for shard in shards)
    return decoded / used if used else 1.0


def _rows_decoded(shard: Shard) -> int:
    start = 0
    for rows in shard.file.row_group_rows:
        if start + rows > shard.row_start:
            break
        start += rows
    return shard.row_end - start


def list_changes(
    planned: Sequence[InputFile], found: Sequence[tuple[str, str]]
) -> tuple[list[str], list[str], list[str]]:
    """(missing, changed, new) paths of a later listing, given as (path, version), against the planned files."""
    versions = dict(found)
    known = {file.path for file in planned}
    missing = [file.path for file in planned if file.path not in versions]
    changed = [file.path for file in planned if versions.get(file.path, file.version) != file.version]
    return missing, changed, [path for path, _ in found if path not in known]
