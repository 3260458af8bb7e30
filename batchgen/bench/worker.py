"""What our worker costs an engine: the same rows through a whole job and fed all at once to the same kind of engine.

The engine is `transformers` over random weights, because speed doesn't depend on what the weights say, and every answer
has exactly the length that its row asks for. Through the worker, rows come from Parquet and go to Parquet, with window,
journal and commits; fed at once, they are in memory, all are sent in the same order before the first is answered, and
the answers are thrown away. Loading the model is left out of both.
"""

import asyncio
import gc
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from batchgen.bench.decode import VOCAB, Workload, make_model
from batchgen.driver.run import run_job
from batchgen.driver.view import LineView
from batchgen.engines import create_engine
from batchgen.records import Request, RowId, SamplingParams
from batchgen.spec import JobSpec
from batchgen.specs.load import make_spec

# Requests in flight, in batches: from what waits at it the engine chooses prompts of like lengths to begin together. With
# 1.25 it was measured a sixth slower on an H100, through the worker and fed directly alike.
WINDOW_SHARE = 4.0
SHARDS = 8


@dataclass(frozen=True, slots=True)
class Fed:
    """One run. `wall_s` is of the serving alone; `job_s`, of the worker's only, of all that `run_job` did, the model's
    loading included."""

    name: str
    num_tokens: int
    wall_s: float
    job_s: float | None = None

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.wall_s


@dataclass(frozen=True, slots=True)
class Setup:
    """`folder` holds checkpoint, input and outputs; `rows` are decoded together."""

    folder: Path
    device: str
    rows: int
    cache_gib: float

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    @property
    def input(self) -> Path:
        return self.folder / "input.parquet"


def write_checkpoint(setup: Setup, size: str) -> None:
    """Random weights, and a tokenizer that gives every id a word; no token ends a text."""
    model = make_model(size, setup.device)
    model.generation_config.eos_token_id = None
    model.save_pretrained(setup.checkpoint)
    words = {f"w{number}": number for number in range(VOCAB)}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"},
    }
    (setup.checkpoint / "tokenizer.json").write_text(json.dumps(tokenizer))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": model.config.max_position_embeddings}
    (setup.checkpoint / "tokenizer_config.json").write_text(json.dumps(kind))
    del model
    release_memory()


def write_input(setup: Setup, work: Workload) -> None:
    sampling = [json.dumps({"max_tokens": length}) for length in work.lengths]
    prompts = pa.array([list(ids) for ids in work.prompts], pa.list_(pa.int32()))
    pq.write_table(pa.table({"prompt_token_ids": prompts, "sampling": sampling}), setup.input)


def make_job(setup: Setup, work: Workload, output: Path) -> JobSpec:
    tree = {
        "input": {"paths": str(setup.input)},
        "prompt": {"prompt_token_ids": "prompt_token_ids", "sampling": "sampling"},
        "model": {"path": str(setup.checkpoint)},
        "engine": {
            "kind": "transformers",
            "device": setup.device,
            "max_batch_size": setup.rows,
            "max_inflight": round(setup.rows * WINDOW_SHARE),
            "cache_gib": setup.cache_gib,
        },
        "output": {"path": str(output), "rows_per_shard": -(-len(work.prompts) // SHARDS)},
        "cluster": {"pool": "inline"},
    }
    return make_spec(tree)


def run_worker(setup: Setup, work: Workload, name: str) -> Fed:
    """From the first lease's arrival to the end of the last commit. Raises RuntimeError when a row is not as wanted."""
    output = setup.folder / name
    started = time.monotonic()
    report = run_job(make_job(setup, work, output), LineView(30.0, write=lambda _: None))
    job_s = time.monotonic() - started
    if report["exit_code"] != 0:
        raise RuntimeError(f"the job ended with exit code {report['exit_code']}: {report['job']['error_types']}")
    rows = ds.dataset(output / "data").to_table(columns=["completion_tokens"])
    check_lengths(rows["completion_tokens"].to_pylist(), work)
    batches = ds.dataset(output / "batch_stats").to_table(columns=["started_at", "wall_s", "write_s"]).to_pylist()
    began_at = min(batch["started_at"] for batch in batches)
    ended_at = max(batch["started_at"] + batch["wall_s"] + (batch["write_s"] or 0.0) for batch in batches)
    release_memory()
    return Fed("through the worker", sum(work.lengths), ended_at - began_at, job_s)


def run_at_once(setup: Setup, work: Workload) -> Fed:
    """From the first request's sending to the last answer. Raises RuntimeError when a row is not as wanted."""
    wall_s, lengths = asyncio.run(_feed(make_job(setup, work, setup.folder / "unused"), work))
    check_lengths(lengths, work)
    release_memory()
    return Fed("fed all at once", sum(work.lengths), wall_s)


async def _feed(spec: JobSpec, work: Workload) -> tuple[float, list[int | None]]:
    engine = create_engine(spec)
    await engine.open()
    try:
        requests = [make_request(spec, work, row) for row in range(len(work.prompts))]
        started = time.monotonic()
        answers = await asyncio.gather(*(engine.generate(request) for request in requests))
        return time.monotonic() - started, [answer.usage.completion_tokens for answer in answers]
    finally:
        await engine.close()


def make_request(spec: JobSpec, work: Workload, row: int) -> Request:
    """As the worker makes it of the row."""
    defaults = spec.sampling
    sampling = SamplingParams(temperature=defaults.temperature, top_p=defaults.top_p, max_tokens=work.lengths[row])
    return Request(RowId("input.parquet", row, 0), tuple(work.prompts[row]), sampling)


def check_lengths(found: list[int | None], work: Workload) -> None:
    if found != list(work.lengths):
        raise RuntimeError("the answers don't have the lengths that were asked for")


def release_memory() -> None:
    """What the last engine held must not be missing from the next one's."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def compare(setup: Setup, work: Workload, repeats: int, say: Callable[[str], None]) -> list[Fed]:
    """Both ways in turn, each first in every other round, after a short round that counts for nothing: kernels and
    allocator warm up in it."""
    warm = Workload(work.prompts[: setup.rows], [min(length, 16) for length in work.lengths[: setup.rows]])
    write_input(setup, warm)
    run_at_once(setup, warm)
    run_worker(setup, warm, "warm")
    write_input(setup, work)
    fed: list[Fed] = []
    for number in range(repeats):
        for is_worker in (number % 2 == 1, number % 2 == 0):
            one = run_worker(setup, work, f"out-{number}") if is_worker else run_at_once(setup, work)
            job = f", the job {one.job_s:.1f} s" if one.job_s is not None else ""
            say(f"{one.name}: {one.tokens_per_s:,.0f} tokens/s in {one.wall_s:.1f} s{job}")
            fed.append(one)
    return fed


def describe_device(device: str) -> dict[str, Any]:
    import torch
    import transformers

    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"
    return {"device": name, "torch": torch.__version__, "transformers": transformers.__version__}
