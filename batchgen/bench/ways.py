"""Every way of running the rows, with its settings: batchgen's and the peers', each at its default and at its best. Pure.

The budget of requests in flight is 1.25 x the server's slots for all; a peer that does better with more, or knows no such
budget, is also run so, and what it really had in flight is measured at the server. 'Best' means the best that we found
among the settings that the peer documents, and where its knob is only an environment variable, that too: see `note`.

A script lies in jobs/peers and reads its settings as JSON; `env` goes into its environment.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from batchgen.bench.workload import Workload

ZERO_ROWS = 200_000
# How many batches of one block Ray Data runs at a time; its own default is 4, and no argument sets it.
RAY_BATCHES = "RAY_DATA_DEFAULT_ASYNC_BATCH_UDF_MAX_CONCURRENCY"
DAFT: Mapping[str, Any] = {"options": {}}


@dataclass(frozen=True, slots=True)
class Way:
    """`kind`: served (the simulated server), or zero (an engine that answers at once, in the worker itself). `needs`: ray
    for a cluster that is up before, s3 for a store of its own. `home`: the environment it runs in; ours unless named.
    `num_rows`: fewer than all, where all would take too long."""

    name: str
    script: str
    note: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    kind: Literal["served", "zero"] = "served"
    needs: frozenset[str] = frozenset()
    home: str = ""
    num_rows: int | None = None
    timeout_s: float = 150.0


def make_ways(work: Workload, *, zero_rows: int = ZERO_ROWS) -> list[Way]:
    """All of them, in the order they are run and shown; those that want a Ray cluster last."""
    budget = work.slots * 5 // 4
    return [*make_clients(budget), *make_ours(budget), *make_ray(budget), *make_zero(zero_rows)]


def make_quick_ways(work: Workload) -> list[Way]:
    """What needs no cluster, no store and no peer: a few seconds."""
    budget = work.slots * 5 // 4
    client = make_clients(budget)[0]
    return [client, make_batchgen("batchgen", budget, "inline", pool="inline", hint=None)]


# ---- clients without a cluster -----------------------------------------------------------------------------------------


def make_clients(budget: int) -> list[Way]:
    asyncio = Way("asyncio client", "run_asyncio.py", f"semaphore of {budget}", {"max_inflight": budget})
    return [
        asyncio,
        *(
            Way(f"datatrove {limit}", "run_datatrove.py", note, {"config": config})
            for limit, note, config in [
                (budget, f"max_concurrent_generations={budget}", {"max_concurrent_generations": budget}),
                ("default", "its defaults (500 at a time)", {}),
            ]
        ),
        # It sends every row at once: neither `concurrency` nor `into_batches` bounds that (977 and 938 of 1,000 rows were
        # in flight), and above the 1,000 connections of its client's pool each request costs a walk over all others.
        Way("Daft default", "run_daft.py", "prompt, native runner", DAFT, home="daft", timeout_s=90.0),
        Way("Daft 1,000 rows", "run_daft.py", "as many rows as its pool has room", DAFT, home="daft", num_rows=1000),
    ]


# ---- batchgen ----------------------------------------------------------------------------------------------------------


def make_batchgen(
    name: str, budget: int, note: str, *, pool: str, hint: str | None, workers: int = 1, needs: Sequence[str] = ()
) -> Way:
    spec = {
        "input": {"custom_id": "id", "length_hint": hint},
        "prompt": {"column": "prompt"},
        "model": {"path": "simulated"},
        "engine": {"kind": "openai", "max_inflight": budget},
        "sampling": {"max_tokens": 4096},
        "output": {"journal_interval_s": 5.0},
        "cluster": {"pool": pool, "workers": {"min": workers, "max": workers}},
    }
    return Way(name, "run_batchgen.py", note, {"spec": spec}, needs=frozenset(needs))


def make_ours(budget: int) -> list[Way]:
    """Parquet from S3 to S3, journal on, a shard a file. Several workers share the server and the budget."""
    note, needs = f"one Ray actor, S3 to S3, max_inflight={budget}", ("ray", "s3")
    return [
        make_batchgen("batchgen", budget, note, pool="ray", hint=None, needs=needs),
        make_batchgen("batchgen, hints", budget, f"{note}, exact", pool="ray", hint="expected_tokens", needs=needs),
        make_batchgen("batchgen, bad hints", budget, f"{note}, useless", pool="ray", hint="useless", needs=needs),
        *(
            make_batchgen(
                f"batchgen, {workers} workers",
                budget // workers,
                f"{workers} actors, S3 to S3, exact hints, max_inflight={budget // workers} each",
                pool="ray",
                hint="expected_tokens",
                workers=workers,
                needs=needs,
            )
            for workers in (2, 4)
        ),
    ]


# ---- Ray Data ----------------------------------------------------------------------------------------------------------


def make_ray(budget: int) -> list[Way]:
    ray = frozenset({"ray"})

    def map_batches(name: str, note: str, batch_size: int, calls: int, blocks: int | None, batches: int) -> Way:
        settings = {"batch_size": batch_size, "calls": calls, "blocks": blocks}
        return Way(name, "run_ray_data.py", note, settings, {RAY_BATCHES: str(batches)}, needs=ray)

    def http(name: str, note: str, config: Mapping[str, Any], batches: int, num_rows: int | None = None) -> Way:
        env = {RAY_BATCHES: str(batches)}
        return Way(name, "run_ray_data_llm.py", note, {"config": config}, env, needs=ray, num_rows=num_rows)

    return [
        map_batches("Ray Data default", "batch_size=32, max_concurrency=8, as its LLM stages", 32, 8, None, 4),
        map_batches(f"Ray Data {budget}", f"batch_size=1, {RAY_BATCHES}={budget}", 1, 1, None, budget),
        map_batches("Ray Data 512", "batch_size=32, max_concurrency=16, repartition(94)", 32, 16, 94, 4),
        http("ray.data.llm default", "HTTP processor, its defaults, 250 rows", {}, 4, num_rows=250),
        http(f"ray.data.llm {budget}", f"batch_size=1, {RAY_BATCHES}={budget}", {"batch_size": 1}, budget),
    ]


# ---- no latency --------------------------------------------------------------------------------------------------------


def make_zero(num_rows: int) -> list[Way]:
    engine = {"kind": "simulated", "has_latency": False, "mean_tokens": 16, "sigma": 0}
    spec = {
        "input": {"custom_id": "id"},
        "prompt": {"prompt_token_ids": "prompt_token_ids"},
        "engine": engine,
        "cluster": {"pool": "ray"},
    }
    ray = frozenset({"ray"})
    peers: list[tuple[str, str, dict[str, Any]]] = [
        ("Ray Data map", "one actor, an async call a row that returns a constant", {"batch_size": None}),
        ("Ray Data map, our engine", "the same with a call of batchgen's engine", {"engine": engine}),
        ("Ray Data map_batches", "calls as the first, gathered by 1,024 (its default)", {"batch_size": 1024}),
    ]
    return [
        Way("pyarrow copy", "run_copy.py", "read and write, no engine", kind="zero", num_rows=num_rows),
        Way(
            "batchgen",
            "run_batchgen.py",
            "one Ray actor, local disk, journal on",
            {"spec": spec},
            kind="zero",
            needs=ray,
            num_rows=num_rows,
        ),
        *(
            Way(name, "run_ray_zero.py", note, settings, kind="zero", needs=ray, num_rows=num_rows)
            for name, note, settings in peers
        ),
    ]
