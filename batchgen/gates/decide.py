"""Do rows pass a gate? Pure: counts and limits in, what was exceeded out."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from batchgen.records import Shard
from batchgen.spec import JobSpec
from batchgen.specs.gates import CanaryGate, FinalGate, GatesSpec, RateLimits

EXIT_CODE = 4
# Fields of `Counts` that only the rows themselves tell, and the limits that are about them.
IN_ROWS = {
    "truncated": ("max_truncation_rate",),
    "refused": ("max_refusal_rate",),
    "unfit": ("max_schema_failure_rate",),
    "tokens": ("min_mean_tokens", "max_mean_tokens"),
    "num_hashed": ("max_duplicate_rate",),
    "num_repeated": ("max_duplicate_rate",),
}


@dataclass(frozen=True, slots=True)
class Counts:
    """Of output rows. All but the first two of answers alone; `num_hashed` of them were looked at for duplicates."""

    rows: int = 0
    errors: int = 0
    truncated: int = 0
    refused: int = 0
    unfit: int = 0
    tokens: int = 0
    num_hashed: int = 0
    num_repeated: int = 0

    def add(self, other: "Counts") -> "Counts":
        return Counts(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(Counts)))

    @property
    def num_ok(self) -> int:
        return self.rows - self.errors


@dataclass(frozen=True, slots=True)
class Failed:
    """A limit that was exceeded. `found` is None where there is no row to look at."""

    gate: str
    what: str
    limit: float
    found: float | None

    def __str__(self) -> str:
        return f"gates.{self.gate}.{self.what}: {_show(self.found)} where the limit is {_show(self.limit)}"


def judge_canary(gate: CanaryGate, counts: Counts) -> list[Failed]:
    return _judge_rates("canary", gate, counts)


def judge_final(
    gate: FinalGate, counts: Counts, p50_tokens: float | None = None, p99_tokens: float | None = None
) -> list[Failed]:
    """`p50_tokens` and `p99_tokens`: of all answers, None where there are none."""
    failed = _judge_rates("final", gate, counts)
    mean = counts.tokens / counts.num_ok if counts.num_ok else None
    lows = {"min_rows_ok": float(counts.num_ok), "min_mean_tokens": mean, "min_p50_tokens": p50_tokens}
    highs = {"max_mean_tokens": mean, "max_p99_tokens": p99_tokens}
    highs |= {"max_duplicate_rate": _share(counts.num_repeated, counts.num_hashed)}
    for name, found in lows.items():
        if (limit := getattr(gate, name)) is not None and (found is None or found < limit):
            failed.append(Failed("final", name, limit, found))
    for name, found in highs.items():
        if (limit := getattr(gate, name)) is not None and found is not None and found > limit:
            failed.append(Failed("final", name, limit, found))
    return failed


def _judge_rates(name: str, gate: RateLimits, counts: Counts) -> list[Failed]:
    rates = {
        "max_error_rate": counts.errors,
        "max_truncation_rate": counts.truncated,
        "max_refusal_rate": counts.refused,
        "max_schema_failure_rate": counts.unfit,
    }
    found = [(what, getattr(gate, what), _share(number, counts.rows)) for what, number in rates.items()]
    return [
        Failed(name, what, limit, share)
        for what, limit, share in found
        if limit is not None and share is not None and share > limit
    ]


def _share(number: int, total: int) -> float | None:
    return number / total if total else None


def _show(value: float | None) -> str:
    return "nothing" if value is None else f"{value:.6g}"


def list_unasked(gate: RateLimits) -> set[str]:
    """Fields of `Counts` that no limit of the gate is about."""
    return {name for name, limits in IN_ROWS.items() if all(getattr(gate, limit, None) is None for limit in limits)}


def list_canary(spec: JobSpec, shards: Sequence[Shard]) -> list[Shard]:
    """Those that hold the first rows."""
    if (gate := spec.gates.canary) is None:
        return []
    chosen, position = [], 0
    for shard in shards:
        if position >= gate.rows:
            break
        chosen.append(shard)
        position += shard.num_rows
    return chosen


def make_gate_report(gates: GatesSpec, failed: Sequence[Failed], seen: dict[str, Counts]) -> dict[str, Any]:
    """What is written down: `seen` has the counts of each gate that was looked at, None for what it does not ask about."""
    counts = {}
    for name, found in seen.items():
        unasked = list_unasked(getattr(gates, name))
        counts[name] = {
            each.name: None if each.name in unasked else getattr(found, each.name) for each in fields(Counts)
        }
    return {
        "failed": [
            {"gate": one.gate, "what": one.what, "limit": one.limit, "found": one.found, "told": str(one)}
            for one in failed
        ],
        "seen": counts,
    }
