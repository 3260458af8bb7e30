"""How well a whole job keeps simulated engines busy, and what CPU its own work takes: measured, beside exact oracles.

`measure_slots` runs a job whose rows have known service times (`workload`) and says how busy the slots were between the
first row's start and the last one's end, as the engines' own record has it; the oracles are what first come first served
and longest first make of the same times on as many slots, exactly, with no overhead at all. `measure_cpu` runs a job on
an engine without latency, all in this process, and takes from its CPU time what the engine alone takes for as many rows.
"""

import asyncio
import math
import random
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.bench.oracle import find_fifo_s, find_longest_first_s, find_saturation
from batchgen.bench.workload import Workload
from batchgen.driver.run import run_job
from batchgen.engines import create_engine
from batchgen.engines.simulated import read_spans
from batchgen.prompt import make_sampling_params
from batchgen.records import Request, RowId
from batchgen.spec import JobSpec
from batchgen.specs.load import make_spec
from batchgen.storage import Storage

# A token of an answer is a millisecond of its slot.
TOKENS_PER_S = 1000.0
HINTS = ("none", "exact", "noisy", "random", "constant", "reversed")


class SilentView:
    """Takes a run's messages; warnings are raised, for a run that warns is no measurement."""

    def say(self, message: str) -> None: ...

    def warn(self, message: str) -> None:
        raise RuntimeError(message)

    def show(self, progress: Any) -> None: ...


# ---- what is asked for -----------------------------------------------------------------------------------------------


def make_hints(services: Sequence[float], kind: str, seed: int) -> list[float | None]:
    """Expected tokens of each row: 'noisy' ones are wrong by a factor of 1.6 (one sigma), 'random' ones are those of other
    rows, 'reversed' ones promise short answers where they are long."""
    rng, exact = random.Random(seed + 1), [service * TOKENS_PER_S for service in services]
    made: dict[str, list[float | None]] = {
        "none": [None] * len(exact),
        "exact": [*exact],
        "noisy": [tokens * rng.lognormvariate(0, 0.5) for tokens in exact],
        "random": [*rng.sample(exact, len(exact))],
        "constant": [sum(exact) / len(exact)] * len(exact),
        "reversed": [1e6 / tokens for tokens in exact],
    }
    return made[kind]


# ---- how busy the slots are ------------------------------------------------------------------------------------------


def measure_slots(folder: str, work: Workload, hints: str, *, shards: int, cluster: dict[str, Any]) -> dict[str, float]:
    """Run the job below `folder` (local or any URL) and say what came of it. `hints`: one of HINTS. `cluster`: that section
    of its spec; each worker has the workload's slots."""
    services, slots = work.list_services_s(), work.slots
    table = pa.table(
        {
            "prompt": ["x"] * len(services),
            "own": [{"max_tokens": round(service * TOKENS_PER_S)} for service in services],
            "hint": pa.array(make_hints(services, hints, work.seed), pa.float64()),
        }
    )
    rows_per_shard = math.ceil(len(services) / shards)
    write_input(folder, table, rows_per_shard)
    with tempfile.TemporaryDirectory() as calls:
        engine = {"kind": "simulated", "length": "max_tokens", "slots": slots, "max_inflight": slots + slots // 4}
        spec = make_spec(
            {
                "input": {"paths": [f"{folder}/in.parquet"], "length_hint": "hint"},
                "prompt": {"column": "prompt", "chat": False, "sampling": "own"},
                "engine": {
                    **engine,
                    "decode_tokens_per_s": TOKENS_PER_S,
                    "prefill_tokens_per_s": 1e9,
                    "call_log": calls,
                },
                "output": {"path": f"{folder}/out", "rows_per_shard": rows_per_shard, "journal_interval_s": 5},
                "cluster": cluster,
            }
        )
        started = time.perf_counter()
        check(run_job(spec, SilentView()), len(services))
        wall_s = time.perf_counter() - started
        spans = read_spans(calls)
    window_s = max(end for _, end in spans) - min(start for start, _ in spans)
    num_slots = slots * spec.cluster.workers.max
    fifo_s, longest_s = find_fifo_s(services, num_slots), find_longest_first_s(services, num_slots)
    return {
        "saturation": find_saturation(services, num_slots, window_s),
        "fifo_oracle": find_saturation(services, num_slots, fifo_s),
        "longest_first_oracle": find_saturation(services, num_slots, longest_s),
        "over_fifo": window_s / fifo_s,
        "over_longest_first": window_s / longest_s,
        "window_s": window_s,
        "outside_s": wall_s - window_s,
    }


# ---- what a row costs ------------------------------------------------------------------------------------------------


def measure_cpu(
    folder: str,
    num_rows: int,
    prompt_tokens: int,
    *,
    has_text: bool,
    row_fingerprints: bool = True,
    is_greedy: bool = False,
) -> dict[str, float]:
    """CPU microseconds a row of a job with one worker, from Parquet to Parquet: all of this process, the engine alone, the
    tokenizer alone (0 where the input holds token ids), and the rest, which is ours."""
    rng = random.Random(0)
    prompts = [[rng.randrange(97, 123) for _ in range(prompt_tokens)] for _ in range(num_rows)]
    column = pa.array([bytes(ids).decode() for ids in prompts]) if has_text else pa.array(prompts, pa.list_(pa.int32()))
    write_input(folder, pa.table({"prompt": column}), 10_000)
    spec = make_spec(
        {
            "input": {"paths": [f"{folder}/in.parquet"]},
            "prompt": {"column": "prompt", "chat": False} if has_text else {"prompt_token_ids": "prompt"},
            "engine": {"kind": "simulated", "has_latency": False, "mean_tokens": 32},
            "sampling": {"temperature": 0.0 if is_greedy else 1.0},
            "output": {
                "path": f"{folder}/out",
                "rows_per_shard": 10_000,
                "journal_interval_s": 5,
                "row_fingerprints": row_fingerprints,
            },
            "cluster": {"pool": "inline"},
        }
    )
    some = prompts[: max(1, num_rows // 10)]
    engine_us = asyncio.run(time_engine(spec, some))
    tokenizer_us = time_tokenizer(spec, some) if has_text else 0.0
    started, wall = time.process_time(), time.perf_counter()
    check(run_job(spec, SilentView()), num_rows)
    all_us = (time.process_time() - started) / num_rows * 1e6
    return {
        "rows_per_s": num_rows / (time.perf_counter() - wall),
        "all_us": all_us,
        "engine_us": engine_us,
        "tokenizer_us": tokenizer_us,
        "ours_us": all_us - engine_us - tokenizer_us,
    }


async def time_engine(spec: JobSpec, prompts: Sequence[list[int]]) -> float:
    """CPU microseconds of one `generate`."""
    engine, sampling = create_engine(spec), make_sampling_params(spec.sampling)
    await engine.open()
    requests = [Request(RowId("/in.parquet", row, 0), tuple(ids), sampling) for row, ids in enumerate(prompts)]
    started = time.process_time()
    for request in requests:
        await engine.generate(request)
    return (time.process_time() - started) / len(requests) * 1e6


def time_tokenizer(spec: JobSpec, prompts: Sequence[list[int]]) -> float:
    """CPU microseconds of one `encode`."""
    tokenizer = create_engine(spec).tokenizer
    assert tokenizer is not None
    texts = [bytes(ids).decode() for ids in prompts]
    started = time.process_time()
    for text in texts:
        tokenizer.encode(text)
    return (time.process_time() - started) / len(texts) * 1e6


# ---- both ------------------------------------------------------------------------------------------------------------


def write_input(folder: str, table: pa.Table, row_group_rows: int) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=row_group_rows)
    Storage(folder).put("in.parquet", sink.getvalue().to_pybytes())


def check(report: dict[str, Any], num_rows: int) -> None:
    """Raises RuntimeError for a run that did not do all of its rows."""
    if report["rows"]["ok"] != num_rows or report["exit_code"] != 0:
        raise RuntimeError(f"{report['rows']['ok']} of {num_rows} rows are ok: {report['message']}")
