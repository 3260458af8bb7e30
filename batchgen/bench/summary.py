"""Runs of the benchmark as a table for people and one JSON value for programs. Pure.

Spread is the smallest and the largest of a way's runs beside their median. A way that failed in every run shows why; one
that failed in some shows how often.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from batchgen.bench.oracle import find_bound_s, find_fifo_s, find_longest_first_s, find_saturation
from batchgen.bench.runs import Run
from batchgen.bench.ways import Way
from batchgen.bench.workload import Workload

COLUMNS = [
    "way",
    "runs",
    "in flight",
    "saturation",
    "of FIFO",
    "of longest first",
    "before",
    "after",
    "CPU/row",
    "note",
]
ZERO_COLUMNS = ["way", "runs", "rows/s", "job", "CPU/row", "worker CPU/row", "note"]


def make_oracles(work: Workload) -> dict[str, float]:
    """Exact makespans of this workload (s) and what they keep busy."""
    services_s = work.list_services_s()
    fifo_s, longest_s = find_fifo_s(services_s, work.slots), find_longest_first_s(services_s, work.slots)
    return {
        "bound_s": find_bound_s(services_s, work.slots),
        "fifo_s": fifo_s,
        "longest_first_s": longest_s,
        "fifo_saturation": find_saturation(services_s, work.slots, fifo_s),
        "longest_first_saturation": find_saturation(services_s, work.slots, longest_s),
    }


def spread(runs: Iterable[Run], read: Callable[[Run], float | None]) -> dict[str, float] | None:
    """Median, smallest and largest of what is known; None where nothing is."""
    values = [value for run in runs if run.failure is None and (value := read(run)) is not None]
    return {"median": statistics.median(values), "min": min(values), "max": max(values)} if values else None


def summarise(way: Way, runs: Sequence[Run], work: Workload) -> dict[str, Any]:
    """One line of the table as plain values. `work`: what the way was given, which may be fewer rows than the others."""
    oracles = make_oracles(work)
    failures = [run.failure for run in runs if run.failure is not None]
    return {
        "way": way.name,
        "kind": way.kind,
        "note": way.note,
        "settings": {**way.settings, **way.env},
        "versions": next((run.versions for run in reversed(runs) if run.versions), {}),
        "num_runs": len(runs),
        "num_failed": len(failures),
        "failure": failures[-1] if failures else None,
        "num_rows": work.num_rows,
        "saturation": spread(runs, lambda run: run.saturation),
        "window_s": spread(runs, lambda run: run.window_s),
        "of_fifo": spread(runs, lambda run: _divide(run.saturation, oracles["fifo_saturation"])),
        "of_longest_first": spread(runs, lambda run: _divide(run.window_s, oracles["longest_first_s"])),
        "max_inflight": max((run.max_inflight or 0 for run in runs), default=0) or None,
        "num_again": sum(run.num_again or 0 for run in runs),
        "before_s": spread(runs, lambda run: run.before_s),
        "after_s": spread(runs, lambda run: run.after_s),
        "job_s": spread(runs, lambda run: run.job_s),
        "rows_per_s": spread(runs, lambda run: run.num_rows / run.job_s if run.job_s else None),
        "cpu_s_per_row": spread(runs, lambda run: sum(run.cpu_s.values()) / run.num_rows),
        "worker_cpu_s_per_row": spread(runs, lambda run: find_worker_cpu_s(run.cpu_s) / run.num_rows),
        "max_load": max((run.load or 0.0 for run in runs), default=None),
    }


def _divide(value: float | None, by: float) -> float | None:
    return None if value is None else value / by


def find_worker_cpu_s(cpu_s: Mapping[str, float]) -> float:
    """Of the one busiest of Ray's actors: what runs the rows."""
    return max((used for name, used in cpu_s.items() if name.startswith("ray::")), default=0.0)


# ---- for people ------------------------------------------------------------------------------------------------------


def make_result_text(result: Mapping[str, Any]) -> str:
    """The machine, the workload, the oracles and a table of each kind of way."""
    work, oracles, machine = result["workload"], result["oracles"], result["machine"]
    head = (
        f"{machine['num_cores']} cores of {machine['cpu']}, Python {machine['python']}, batchgen {result['build']}\n"
        f"{work['num_rows']:,} rows, {work['slots']} slots, lognormal service, mean {work['mean_s']} s, sigma "
        f"{work['sigma']}; server on one core, what is measured on the others; a simulated engine: this measures "
        f"orchestration, not generation\n"
        f"oracles: FIFO {oracles['fifo_s']:.2f} s, saturation {oracles['fifo_saturation']:.3f}; longest first "
        f"{oracles['longest_first_s']:.2f} s, {oracles['longest_first_saturation']:.3f}; no schedule ends before "
        f"{oracles['bound_s']:.2f} s"
    )
    versions = {name: version for way in result["ways"] for name, version in way["versions"].items() if version}
    named = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    loads = [way["max_load"] for way in result["ways"] if way["max_load"] is not None]
    beside = f"{named}; load average before a run at most {max(loads, default=0.0):.1f}"
    served = [make_served_row(line) for line in result["ways"] if line["kind"] == "served"]
    zero = [make_zero_row(line) for line in result["ways"] if line["kind"] == "zero"]
    tables = [make_text(COLUMNS, served) if served else "", make_text(ZERO_COLUMNS, zero) if zero else ""]
    units = (
        "median (smallest to largest); in flight: the most the server saw; of FIFO: saturation over that oracle's; of "
        "longest first: makespan over that oracle's; before, after: seconds of the job outside the serving window, "
        "cluster up; CPU: microseconds a row, cluster and all"
    )
    return "\n\n".join(part for part in [f"{head}\n{beside}", *tables, units] if part)


def make_served_row(line: Mapping[str, Any]) -> list[str]:
    return [
        line["way"],
        _count_runs(line),
        _show(line["max_inflight"], 0),
        _spread(line["saturation"], 3),
        _show_median(line["of_fifo"], 3),
        _show_median(line["of_longest_first"], 3),
        _spread(line["before_s"], 1),
        _spread(line["after_s"], 1),
        _show_median(line["cpu_s_per_row"], 0, 1e6),
        line["failure"] or line["note"],
    ]


def make_zero_row(line: Mapping[str, Any]) -> list[str]:
    return [
        line["way"],
        _count_runs(line),
        _spread(line["rows_per_s"], 0),
        _spread(line["job_s"], 1),
        _show_median(line["cpu_s_per_row"], 1, 1e6),
        _show_median(line["worker_cpu_s_per_row"], 1, 1e6),
        line["failure"] or line["note"],
    ]


def make_text(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in plain text; the first and the last column to the left."""
    widths = [max(len(row[index]) for row in [columns, *rows]) for index in range(len(columns))]
    last = len(columns) - 1

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if index in (0, last) else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    return "\n".join(line(cells) for cells in [columns, *rows])


def _count_runs(line: Mapping[str, Any]) -> str:
    failed = f" ({line['num_failed']} failed)" if line["num_failed"] else ""
    return f"{line['num_runs']}{failed}"


def _show(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _show_median(values: Mapping[str, float] | None, digits: int, scale: float = 1.0) -> str:
    return "-" if values is None else f"{values['median'] * scale:,.{digits}f}"


def _spread(values: Mapping[str, float] | None, digits: int) -> str:
    if values is None:
        return "-"
    middle, low, high = (f"{values[name]:,.{digits}f}" for name in ("median", "min", "max"))
    return middle if low == high else f"{middle} ({low} to {high})"
