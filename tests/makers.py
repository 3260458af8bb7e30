"""Small values that more than one test file needs. Every field that a test doesn't name has a plain default."""

from typing import Any

import pyarrow as pa

from batchgen.records import (
    Failure,
    Generation,
    InputFile,
    Lease,
    Request,
    Result,
    RowId,
    SamplingParams,
    Shard,
    Timing,
    Usage,
    WorkerInfo,
)
from batchgen.spec import JobSpec
from batchgen.specs.load import make_spec
from batchgen.worker.result_batch import make_result_batch
from batchgen.write import make_result_schema


def make_tree(**sections: Any) -> dict[str, Any]:
    """A valid spec as plain values; each section given replaces the whole one here."""
    tree: dict[str, Any] = {
        "input": {"paths": ["/data/in.parquet"]},
        "prompt": {"column": "prompt"},
        "engine": {"kind": "simulated"},
        "output": {"path": "/data/out"},
    }
    return {**tree, **sections}


def make_job_spec(**sections: Any) -> JobSpec:
    return make_spec(make_tree(**sections))


def make_file(path: str = "/data/in.parquet", row_group_rows: tuple[int, ...] = (10,)) -> InputFile:
    return InputFile(path, 1000, "v1", sum(row_group_rows), row_group_rows)


def make_shard(number: int = 0, row_start: int = 0, row_end: int = 10, file: InputFile | None = None) -> Shard:
    return Shard(number, file or make_file(row_group_rows=(max(10, row_end),)), row_start, row_end)


def make_lease(shard: Shard | None = None, **fields: Any) -> Lease:
    return Lease(**{"shard": shard or make_shard(), "attempt": 1, "epoch": 1, "worker_id": "w1", **fields})


def make_worker_info(worker_id: str = "w1", window: int = 4, **fields: Any) -> WorkerInfo:
    plain = {"build": "b", "node": "n", "engine_kind": "simulated", "engine_version": "1", "num_gpus": 8.0}
    return WorkerInfo(worker_id=worker_id, window=window, startup_s=1.0, **{**plain, **fields})


def make_request(row: int = 0, sample: int = 0, *, attempt: int = 1, **sampling: Any) -> Request:
    return Request(RowId("/data/in.parquet", row, sample), (1, 2, 3), SamplingParams(**sampling), attempt)


def make_ok(row: int, sample: int = 0, text: str = "fine", **fields: Any) -> Result:
    answer = Generation(text, (7, 8), "stop", Usage(3, 2, 0))
    known = {"num_attempts": 1, "timing": Timing(0.1, 0.2, 0.4), "generation": answer, "text": text}
    return Result(RowId("/data/in.parquet", row, sample), **{**known, **fields})


def make_error(row: int, sample: int = 0, *, is_retryable: bool = False, num_attempts: int = 1) -> Result:
    failure = Failure("rejected", "too hard", is_retryable)
    return Result(RowId("/data/in.parquet", row, sample), num_attempts, Timing(), failure=failure, prompt_tokens=3)


def make_rows(*results: Result, batch_id: str = "shard-000000000-e1-a1", spec: JobSpec | None = None) -> pa.Table:
    """Results as a journal or a shard file holds them."""
    schema = make_result_schema(spec or make_job_spec())
    return pa.Table.from_batches([make_result_batch(results, batch_id, schema)], schema=schema)
