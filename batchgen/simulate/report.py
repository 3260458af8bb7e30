"""What a simulation says: lines for people, one value for programs. Pure.

Every figure is a model's. Money is GPU-hours times a price that somebody gave, else it is not told.
"""

from typing import Any

from batchgen.simulate.estimate import Estimate, count_slots
from batchgen.simulate.plot import make_text_plot
from batchgen.simulate.scenario import Scenario

# Nothing below this is told of a policy: two sets of runs differ by as much.
NOISE = 0.005


def describe(found: Estimate, scenario: Scenario, source: str, price_per_gpu_hour: float | None) -> list[str]:
    how = "row by row" if found.is_exact else "aggregated by shards"
    rate = found.tokens / found.makespan_s[1]
    lines = [
        f"modelled, not measured: {found.num_runs} virtual runs, {how}; nine in ten lie in the interval",
        f"lengths             {source}",
        f"rows                {scenario.num_rows:,}, {found.tokens:,.0f} completion tokens",
        f"time                {_hours(found.makespan_s)}",
        f"GPU-hours           {_interval(found.gpu_hours, ',.1f')}",
    ]
    if price_per_gpu_hour is not None:
        costs = tuple(price_per_gpu_hour * hours for hours in found.gpu_hours)
        lines.append(f"cost                {_interval(costs, ',.0f')} at {price_per_gpu_hour:g} a GPU-hour")
    lines += [
        f"tokens/s            {rate:,.0f} over the whole run",
        f"utilisation         {found.utilisation:.0%} of {count_slots(scenario):,} slots a worker in work while it is up",
        f"workers             {found.num_workers:.1f} asked for, {found.num_losses:.1f} lost",
        f"generated again     {found.lost_tokens / max(1.0, found.tokens):.2%} of the tokens",
    ]
    if found.stop is not None:
        lines.append(f"stopped             {found.stop}")
    return [*lines, *make_text_plot(found.first)]


def _hours(seconds: tuple[float, ...]) -> str:
    if seconds[1] < 7200:
        return _interval(tuple(value / 60 for value in seconds), ",.1f") + " minutes"
    return _interval(tuple(value / 3600 for value in seconds), ",.2f") + " hours"


def _interval(values: tuple[float, ...], form: str) -> str:
    low, middle, high = (format(value, form) for value in values)
    return f"{middle} ({low} to {high})"


def describe_policy(name: str, is_on: bool, other: Estimate, found: Estimate) -> str:
    """One that was turned round: what it does to time and GPUs."""
    change = other.makespan_s[1] / found.makespan_s[1] - 1
    gpus = other.gpu_hours[1] / found.gpu_hours[1] - 1
    verdict = "no difference" if max(abs(change), abs(gpus)) < NOISE else f"time {change:+.1%}, GPU-hours {gpus:+.1%}"
    return f"{('with ' if is_on else 'without ') + name:28} {verdict}"


def make_value(
    found: Estimate, scenario: Scenario, source: str, price_per_gpu_hour: float | None, policies: dict[str, Any]
) -> dict[str, Any]:
    low, middle, high = found.makespan_s
    gpu_low, gpu_middle, gpu_high = found.gpu_hours
    return {
        "state": "modelled",
        "rows": scenario.num_rows,
        "lengths": source,
        "runs": found.num_runs,
        "is_exact": found.is_exact,
        "time_s": {"low": round(low, 1), "middle": round(middle, 1), "high": round(high, 1)},
        "gpu_hours": {"low": round(gpu_low, 3), "middle": round(gpu_middle, 3), "high": round(gpu_high, 3)},
        "cost": None if price_per_gpu_hour is None else round(price_per_gpu_hour * gpu_middle, 2),
        "completion_tokens": round(found.tokens),
        "tokens_again": round(found.lost_tokens),
        "utilisation": round(found.utilisation, 4),
        "workers": round(found.num_workers, 1),
        "workers_lost": round(found.num_losses, 2),
        "stopped": found.stop,
        "policies": policies,
    }


def make_policy_value(is_on: bool, other: Estimate, found: Estimate) -> dict[str, Any]:
    """Beside the job as it is, in the same runs."""
    return {
        "is_on": is_on,
        "time_s": round(other.makespan_s[1], 1),
        "gpu_hours": round(other.gpu_hours[1], 3),
        "time_change": round(other.makespan_s[1] / found.makespan_s[1] - 1, 4),
        "gpu_hours_change": round(other.gpu_hours[1] / found.gpu_hours[1] - 1, 4),
    }
