"""A run that reuses earlier outputs: only what is new or changed is sent, and what comes out is a dataset like any other."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from batchgen.engines.simulated import read_calls
from batchgen.errors import InputError, SpecError
from batchgen.specs.load import make_spec
from batchgen.storage import Storage
from batchgen.verify.verify import verify

from .jobs_util import RecordingView, Tree, check_output, make_prompts, make_tree, read_bytes, read_rows, run_tree, write_file

S3 = pytest.param("s3", marks=pytest.mark.s3)


@pytest.fixture(params=["local", S3])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(request.getfixturevalue("s3_folder")) if request.param == "s3" else str(tmp_path)


def change(table: pa.Table, rows: set[int]) -> pa.Table:
    prompts = [f"{text} changed" if row in rows else text for row, text in enumerate(table["prompt"].to_pylist())]
    return table.set_column(0, "prompt", pa.array(prompts))


def run_days(place: str, calls: Path, table: pa.Table, over: Tree | None = None, **later: Any) -> tuple[Tree, Tree]:
    """Yesterday's run over 60 rows and today's over `table`, which reuses it."""
    write_file(f"{place}/day-1.parquet", make_prompts(60))
    write_file(f"{place}/day-2.parquet", table)
    first = make_tree(f"{place}/day-1.parquet", f"{place}/out-1", calls / "1", **(over or {}))
    second = make_tree(f"{place}/day-2.parquet", f"{place}/out-2", calls / "2", **(over or {}), **later)
    second["input"]["reuse_from"] = f"{place}/out-1"
    assert run_tree(first)["exit_code"] == 0
    return first, second
