"""What a run will take, said before it starts: time, GPU-hours, cost, and what that is known from.

Best first: what earlier runs of this very folder measured (a trial with `--limit` is enough), what the runs at
`input.length_prior` measured with the same engine and model on as many GPUs a worker, and for `tensorrt_llm` the model that
`batchgen simulate` runs, with the prior's lengths or the plan's stated assumption. Anything else is unknown, and said to
be. Cost is GPU-hours times `cluster.gpu_hour_cost`.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from batchgen.driver.job import Job
from batchgen.errors import BatchgenError
from batchgen.plan import expected_tokens
from batchgen.report.figures import RunRecord, show, show_time
from batchgen.report.records import read_records
from batchgen.simulate.estimate import estimate
from batchgen.simulate.from_spec import Asked, make_scenario
from batchgen.simulate.record import Surroundings
from batchgen.simulate.sources import read_earlier_run
from batchgen.simulate.workload import make_lognormal
from batchgen.spec import JobSpec
from batchgen.storage import Storage

# A run that finished fewer rows than this says nothing of a rate.
MIN_ROWS = 20
TRIAL_ROWS = 100
# For the model: so many virtual runs, and what nobody has measured yet.
NUM_RUNS = 3
# A trial's time is its start-up: seconds of modelling would say nothing of it.
MIN_MODELLED_ROWS = 1000
STARTUP_S = 900.0
PROMPT_TOKENS = 1000
SIGMA = 1.0

Interval = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Foresight:
    """(low, middle, high) of time and of GPU-hours; the three are alike where nothing is known of the spread. None is
    unknown: GPU-hours of workers that reserve none, and all where `source` says why."""

    num_rows: int
    source: str
    time_s: Interval | None = None
    gpu_hours: Interval | None = None
    gpu_hour_cost: float | None = None

    @property
    def cost(self) -> Interval | None:
        if self.gpu_hours is None or self.gpu_hour_cost is None:
            return None
        low, middle, high = (hours * self.gpu_hour_cost for hours in self.gpu_hours)
        return low, middle, high

    def to_json(self) -> dict[str, Any]:
        named = {"time_s": self.time_s, "gpu_hours": self.gpu_hours, "cost": self.cost}
        return {"rows": self.num_rows, "source": self.source, **{k: v and list(v) for k, v in named.items()}}

    def describe(self) -> str:
        """One line for people."""
        if self.time_s is None:
            return f"estimate for {self.num_rows:,} rows: unknown; {self.source}"
        parts = [_between(self.time_s, show_time)]
        if self.gpu_hours is not None:
            parts.append(f"{_between(self.gpu_hours, show)} GPU-hours")
            cost = self.cost
            told = f"cost {_between(cost, show)}" if cost else "cost unknown: set cluster.gpu_hour_cost"
            parts.append(told)
        return f"estimate for {self.num_rows:,} rows: {', '.join(parts)} ({self.source})"


def _between(values: Interval, shown: Any) -> str:
    low, middle, high = (shown(value) for value in values)
    return f"about {middle}" if low == high else f"{low} to {high}"


def foresee(job: Job) -> Foresight:
    """Of what is left to do. Reads records of runs, writes nothing."""
    found = _foresee(job)
    if not job.spec.input.reuse_from or found.time_s is None:
        return found
    return replace(found, source=f"{found.source}, as if nothing could be reused")


def _foresee(job: Job) -> Foresight:
    spec, num_rows = job.spec, sum(queued.shard.num_rows for queued in job.todo)
    price = spec.cluster.gpu_hour_cost
    for records, source in _iter_measured(job):
        if (rate := measure_rate(records)) is not None:
            time_s, worker_s = extrapolate(rate, num_rows, min(spec.cluster.workers.max, max(1, len(job.todo))))
            hours = worker_s * spec.cluster.gpus_per_worker / 3600 or None
            spread = None if hours is None else (hours, hours, hours)
            return Foresight(num_rows, source, (time_s, time_s, time_s), spread, price)
    if spec.engine.kind != "tensorrt_llm" or num_rows < MIN_MODELLED_ROWS:
        mend = "; try --limit 100 first, and it is known" if num_rows > TRIAL_ROWS else ""
        return Foresight(num_rows, f"nothing was measured yet{mend}", None, None, price)
    return _model(spec, num_rows, price)


def _iter_measured(job: Job) -> Iterator[tuple[Sequence[RunRecord], str]]:
    spec = job.spec
    yield [one for one in read_records(job.storage) if is_alike(one, spec)], "as earlier runs of this folder went"
    if (prior := spec.input.length_prior) is not None:
        yield [one for one in read_records(Storage(prior)) if is_alike(one, spec)], f"as the runs of {prior} went"


def is_alike(record: Mapping[str, Any], spec: JobSpec) -> bool:
    """Did that run's workers do what this one's will: the same model, by the same kind of engine, on as many GPUs each?"""
    model = record.get("spec", {}).get("model", {}).get("path")
    theirs = (record.get("engine"), model, record.get("cluster", {}).get("gpus_per_worker"))
    return theirs == (spec.engine.kind, spec.model.path, spec.cluster.gpus_per_worker)


@dataclass(frozen=True, slots=True)
class Rate:
    """`rows_per_s` of one worker that is up; `startup_s` of one."""

    rows_per_s: float
    startup_s: float


def measure_rate(records: Sequence[Mapping[str, Any]]) -> Rate | None:
    """Over all of them, tails included; None where too little was done."""
    rows = sum(record["total"]["rows"] for record in records)
    ready_s = sum(record["total"]["ready_s"] for record in records)
    if rows < MIN_ROWS or ready_s <= 0:
        return None
    workers = sum(len(record.get("workers", [])) for record in records)
    return Rate(rows / ready_s, sum(record["startup_s"] for record in records) / max(1, workers))


def extrapolate(rate: Rate, num_rows: int, num_workers: int) -> tuple[float, float]:
    """(seconds, worker-seconds) of so many rows."""
    work_s = num_rows / rate.rows_per_s
    if num_rows == 0:
        return 0.0, 0.0
    return rate.startup_s + work_s / num_workers, num_workers * rate.startup_s + work_s


def _model(spec: JobSpec, num_rows: int, price: float | None) -> Foresight:
    """Modelled, not measured. What has no model is unknown, with the reason."""
    mean = expected_tokens(spec) / spec.sampling.n
    try:
        if spec.input.length_prior is not None:
            lengths, source = read_earlier_run(spec, spec.input.length_prior, PROMPT_TOKENS), "the prior's lengths"
        else:
            lengths = make_lognormal(mean, SIGMA, PROMPT_TOKENS)
            source = f"answers of {mean:,.0f} tokens on average assumed, sigma {SIGMA:g}"
        asked = Asked(num_rows, Surroundings(STARTUP_S, 0.2, 0.0), None, time.time())
        found = estimate(make_scenario(spec, lengths, asked), num_runs=NUM_RUNS, seed=0, is_exact=False)
    except BatchgenError as error:
        return Foresight(num_rows, str(error), None, None, price)
    hours = found.gpu_hours if spec.cluster.gpus_per_worker else None
    return Foresight(num_rows, f"modelled, not measured: {source}", found.makespan_s, hours, price)
