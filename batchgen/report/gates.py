"""What the gates found, limit by limit: those that were met too. Pure.

Verdicts are the gates' own (`failed`); figures are made of what they counted (`seen`). A gate that nobody came to look at
(the run stopped before, or still runs) has neither.
"""

from collections.abc import Mapping
from typing import Any

from batchgen.report.figures import divide, show, show_share

GATES = ("canary", "final")
LABELS = {
    "max_error_rate": "errors",
    "max_truncation_rate": "answers cut off by max_tokens",
    "max_refusal_rate": "refusals",
    "max_schema_failure_rate": "no JSON of the schema",
    "min_rows_ok": "generations",
    "min_mean_tokens": "mean completion, tokens",
    "max_mean_tokens": "mean completion, tokens",
    "max_duplicate_rate": "answers that another row has, too",
}
VERDICTS = {True: "met", False: "not met", None: "not looked at"}


def make_gate_checks(gates: Mapping[str, Any], told: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """One value a limit of the spec's `gates`: gate, what, limit, found, is_met. `told`: what the run said of its gates
    (`failed`, `seen`); None for a run that has not."""
    seen = (told or {}).get("seen", {})
    failed = {(one["gate"], one["what"]): one["found"] for one in (told or {}).get("failed", ())}
    checks = []
    for gate, what, limit in _iter_limits(gates):
        counts = seen.get(gate)
        is_met = None if counts is None else (gate, what) not in failed
        found = None if counts is None else _measure(what, counts)
        checks.append({"gate": gate, "what": what, "limit": limit, "found": found, "is_met": is_met})
    return checks


def _iter_limits(gates: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    found = [(name, what, (gates.get(name) or {}).get(what)) for name in GATES for what in LABELS]
    return [(gate, what, limit) for gate, what, limit in found if limit is not None]


def _measure(what: str, counts: Mapping[str, Any]) -> float | None:
    num_ok = counts["rows"] - counts["errors"]
    rates = {
        "max_error_rate": "errors",
        "max_truncation_rate": "truncated",
        "max_refusal_rate": "refused",
        "max_schema_failure_rate": "unfit",
    }
    if what in rates:
        return divide(counts[rates[what]], counts["rows"])
    if what == "max_duplicate_rate":
        return divide(counts["num_repeated"], counts["num_hashed"])
    return float(num_ok) if what == "min_rows_ok" else divide(counts["tokens"], num_ok)


def show_check(check: Mapping[str, Any]) -> list[str]:
    """What, found, limit and verdict, in words."""
    what = check["what"]
    shown = show_share if what.endswith("_rate") else _show_count
    bound = "at least" if what.startswith("min_") else "at most"
    found = "nothing" if check["is_met"] is not None and check["found"] is None else shown(check["found"])
    return [LABELS[what], found, f"{bound} {shown(check['limit'])}", VERDICTS[check["is_met"]]]


def _show_count(value: float | None) -> str:
    return show(int(value) if value is not None and value == int(value) else value)


def tell_gate(gate: str, checks: list[dict[str, Any]], told: Mapping[str, Any] | None) -> tuple[str, str]:
    """(verdict, how many rows it looked at) of one gate."""
    counts = (told or {}).get("seen", {}).get(gate)
    if counts is None:
        return "not looked at", "its rows are not there yet"
    is_met = all(check["is_met"] for check in checks if check["gate"] == gate)
    return "passed" if is_met else "failed", f"{counts['rows']:,} output rows looked at"
