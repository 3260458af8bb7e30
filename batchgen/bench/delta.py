"""What a run costs that reuses yesterday's output, and one whose rows are there several times: engine calls and seconds.

The engine is simulated and answers at once, so the seconds are those of our own work.
"""

import random
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.bench.saturation import SilentView
from batchgen.driver.run import run_job
from batchgen.engines.simulated import read_calls
from batchgen.specs.load import make_spec
from batchgen.storage import Storage
from batchgen.verify.verify import verify

PROMPT_BYTES = 200


def measure_delta(folder: Path, num_rows: int, changed: float) -> dict[str, Any]:
    """A run over all rows, and one over the same with a share of them changed, spread evenly by chance."""
    rng = random.Random(0)
    prompts = [make_text(rng) for _ in range(num_rows)]
    first = measure(folder, "first", prompts, {})
    places = set(rng.sample(range(num_rows), round(num_rows * changed)))
    today = [make_text(rng) if row in places else prompt for row, prompt in enumerate(prompts)]
    second = measure(folder, "second", today, {"input": {"reuse_from": [str(folder / "first")]}})
    return {"rows": num_rows, "changed": len(places), "first": first, "second": second}


def measure_duplicates(folder: Path, num_rows: int, times: int, num_workers: int = 1) -> dict[str, Any]:
    """Each prompt so many times, shuffled; copied and generated each."""
    rng = random.Random(0)
    prompts = [make_text(rng) for _ in range(num_rows // times)] * times
    rng.shuffle(prompts)
    cluster = {"pool": "inline", "workers": {"min": num_workers, "max": num_workers}}
    greedy = {"sampling": {"temperature": 0, "max_tokens": 64}, "cluster": cluster}
    return {
        "rows": len(prompts),
        "prompts": len(set(prompts)),
        "copied": measure(folder, "copied", prompts, greedy),
        "generated": measure(folder, "generated", prompts, {**greedy, "input": {"duplicates": "generate"}}),
    }


def make_text(rng: random.Random) -> str:
    return rng.randbytes(PROMPT_BYTES // 2).hex()


def measure(folder: Path, name: str, prompts: list[str], sections: dict[str, Any]) -> dict[str, Any]:
    """Engine calls, seconds, CPU a row, and what `verify` says. Raises RuntimeError where a run did not do all its rows."""
    pq.write_table(pa.table({"prompt": prompts}), folder / f"{name}.parquet", row_group_size=10_000)
    with tempfile.TemporaryDirectory() as calls:
        spec = make_spec(
            {
                "prompt": {"column": "prompt", "chat": False},
                "engine": {"kind": "simulated", "has_latency": False, "mean_tokens": 32, "call_log": calls},
                "cluster": {"pool": "inline"},
                "sampling": {"max_tokens": 64},
                "output": {"path": str(folder / name), "rows_per_shard": 10_000},
                **sections,
                "input": {"paths": [str(folder / f"{name}.parquet")], **sections.get("input", {})},
            }
        )
        started, started_cpu = time.perf_counter(), time.process_time()
        report = run_job(spec, SilentView())
        seconds, cpu_s = time.perf_counter() - started, time.process_time() - started_cpu
        num_calls = len(read_calls(calls))
    if report["rows"]["ok"] != len(prompts):
        raise RuntimeError(f"{report['rows']['ok']} of {len(prompts)} rows are ok: {report['message']}")
    verdict = verify(Storage(str(folder / name)))
    return {
        "calls": num_calls,
        "seconds": round(seconds, 1),
        "cpu_us_a_row": round(1e6 * cpu_s / len(prompts), 1),
        "reused": report["job"]["rows_reused"],
        "verify": verdict.state,
    }
