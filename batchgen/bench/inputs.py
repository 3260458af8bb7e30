"""The input files of the benchmark: the same Parquet files for every way, written once."""

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.bench.workload import Workload, count_tokens, make_prompt

# What the ways call a row's key in their output.
ID_COLUMNS = ("custom_id", "id")
ZERO_TOKENS = 32
ZERO_ROWS_PER_FILE = 25_000


def write_rows(folder: Path, work: Workload) -> Path:
    """Files of prompts, with the rows' lengths as an exact and as a useless hint; as they are where they are there."""
    exact = [count_tokens(service_s) for service_s in work.list_services_s()]
    useless = [count_tokens(service_s) for service_s in work.list_useless_hints_s()]
    for first in range(0, work.num_rows, work.rows_per_file):
        rows = range(first, min(work.num_rows, first + work.rows_per_file))
        columns: dict[str, Any] = {
            "id": [str(row) for row in rows],
            "prompt": [make_prompt(row) for row in rows],
            "expected_tokens": [exact[row] for row in rows],
            "useless": [useless[row] for row in rows],
        }
        write_table(folder / f"part-{first:07d}.parquet", columns)
    return folder


def write_token_ids(folder: Path, num_rows: int) -> Path:
    """Files of prompts as token ids, for an engine that answers at once."""
    for first in range(0, num_rows, ZERO_ROWS_PER_FILE):
        rng = random.Random(first)
        rows = range(first, min(num_rows, first + ZERO_ROWS_PER_FILE))
        columns: dict[str, Any] = {
            "id": [str(row) for row in rows],
            "prompt_token_ids": [rng.choices(range(32, 127), k=ZERO_TOKENS) for _ in rows],
        }
        write_table(folder / f"part-{first:07d}.parquet", columns)
    return folder


def write_table(path: Path, columns: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        pq.write_table(pa.table(columns), path)
