"""Every crash point in turn: `python -m fault_sim.matrix`. A fault at each durable step, before it, after it, torn and with
its reply lost, in the driver and in a worker; then the job is submitted again, and its output must be that of a run that
nothing befell. `--all`: at every time that the step is taken, not at the first, a middle and the last one only.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from . import patches  # isort: skip  # noqa: F401 - before anything of batchgen
from batchgen.chaos.faults import STEPS, WHENS, Fault, FaultClient, FaultEngine, Step, Striker, When, find_impossible
from batchgen.errors import RequestFailed
from batchgen.records import Generation, Request
from batchgen.spec import JobSpec
from batchgen.specs.load import make_spec
from batchgen.stores.base import Client

from .__main__ import quieten
from .checker import Violation, get_key
from .faults import CALM, Weather
from .kernel import Kernel, Process
from .mutants import MUTANTS
from .world import IN, OUT, World

Role = Literal["driver", "worker"]
# Longer than any lease, shorter than what a world waits for its zombies.
FREEZE_S = 30.0
ROLES: tuple[Role, ...] = ("driver", "worker")
QUIET = Weather(CALM, (), 1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
# What a run that was struck may not change. Times, and the batch that made a row, are another's then.
STABLE = ["custom_id", "topic", "text", "reasoning", "finish_reason", "prompt_tokens", "completion_tokens", "status"]
STABLE += ["error_type", "error_message", "is_retryable"]


@dataclass(frozen=True, slots=True)
class Cell:
    """`is_zombie`: the process does not die there: it is frozen, taken for dead, and goes on when others have."""

    role: Role
    fault: Fault
    is_zombie: bool = False

    def __str__(self) -> str:
        return f"{self.role} {self.fault}{' as a zombie' if self.is_zombie else ''}"


class RoleStriker(Striker):
    """Strikes in processes of one role; counts the steps of each role."""

    def __init__(self, cell: Cell | None, kernel: Kernel, on_freeze: Callable[[], None]) -> None:
        super().__init__(cell and cell.fault)
        self._cell, self._kernel, self._on_freeze = cell, kernel, on_freeze
        self.taken: Counter[tuple[str, str]] = Counter()
        self.has_struck = False

    def _me(self) -> Process:
        process = self._kernel.process
        assert process is not None
        return process

    def die(self) -> None:
        if self._cell is not None and self._cell.is_zombie:
            self._kernel.tell(f"frozen at {self._cell}")
            self._me().frozen_until = self._kernel.now + FREEZE_S
            self._on_freeze()
            self._kernel.sleep(0.001)
        else:
            self._kernel.kill(self._me(), str(self._cell))

    def choose(self, step: Step | None) -> When | None:
        name = self._me().name
        role: Role = "worker" if "/" in name else "driver"
        if step is not None and name != "verify":
            self.taken[role, step] += 1
        if self._cell is None or role != self._cell.role or name == "verify":
            return None
        when = super().choose(step)
        self.has_struck = self.has_struck or when is not None
        return when


class CellWorld(World):
    """The same small job for each cell: two files, five shards, a row without a prompt, and rows that fail when they are
    first generated, so that a later run replaces a file."""

    def __init__(self, cell: Cell | None) -> None:
        super().__init__(0)
        self.striker = RoleStriker(cell, self.kernel, self._submit_again)

    def _make_earlier(self) -> None:
        return None

    def _make_weather(self) -> Weather:
        return QUIET

    def _make_job(self) -> JobSpec:
        self._failed: set[Any] = set()
        self._plant_rows(f"{IN}/part-0.parquet", [False, False, True, False, False, False, False], 1)
        self._plant_rows(f"{IN}/part-1.parquet", [False, False, False, False], 1)
        engine = {"kind": "simulated", "mean_tokens": 12, "sigma": 0.5, "slots": 2, "max_inflight": 3}
        return make_spec(
            {
                "input": {"paths": [IN], "custom_id": "key", "passthrough": ["topic"]},
                "prompt": {"column": "prompt"},
                "engine": {**engine, "decode_tokens_per_s": 6.0},
                "sampling": {"max_tokens": 30},
                "output": {"path": OUT, "rows_per_shard": 3, "journal_interval_s": 1.0},
                "cluster": {"workers": {"min": 2, "max": 2}, "lease_ttl_s": 6, "worker_timeout_s": 6, "drain_s": 1},
                "retry": {"max_attempts": 1, "max_error_rate": 1.0, "backoff_s": 0.1},
            }
        )

    def _open_client(self) -> Client:
        return FaultClient(self.store, OUT, self.striker)

    def _wrap_engine(self, engine: Any) -> Any:
        return FaultEngine(FirstFails(engine, self._failed), self.striker)

    def read_stable(self) -> list[tuple[Any, ...]]:
        """The output rows, and the frozen plan to the byte."""
        rows = sorted(self.checker.list_rows(), key=get_key)
        frozen = [(name, held.data) for name, held in sorted(self.store.held.items()) if "/_batchgen/plan/" in name]
        return [*((get_key(row), *(row[name] for name in STABLE)) for row in rows), *frozen]


class FirstFails:
    """Of every fourth row the first request fails."""

    def __init__(self, engine: Any, failed: set[Any]) -> None:
        self._engine, self._failed = engine, failed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def generate(self, request: Request) -> Generation:
        row = request.row_id.source_row
        if row % 4 == 1 and request.row_id not in self._failed:
            self._failed.add(request.row_id)
            raise RequestFailed("engine_error", "fails the first time")
        answer: Generation = await self._engine.generate(request)
        return answer


# ---- the cells -------------------------------------------------------------------------------------------------------


def find_why_not(role: Role, step: Step, when: When, taken: Counter[tuple[str, str]]) -> str | None:
    """Why there is no such cell, or None."""
    if not taken[role, step]:
        return "a worker never does this" if role == "worker" else "only workers do this"
    return find_impossible(step, when)


def list_cells(taken: Counter[tuple[str, str]], *, is_whole: bool) -> tuple[list[Cell], list[str]]:
    """(the cells, those that can't be with their reasons)."""
    cells, impossible = [], []
    for role in ROLES:
        for step in STEPS:
            for when in WHENS:
                if (reason := find_why_not(role, step, when, taken)) is not None:
                    impossible.append(f"{role} {step}:{when}: {reason}")
                    continue
                last = taken[role, step]
                times = range(1, last + 1) if is_whole else sorted({1, (last + 1) // 2, last})
                cells += [Cell(role, Fault(step, when, nth)) for nth in times]
                if when in ("before", "after") and step not in ("list", "read"):
                    cells += [Cell(role, Fault(step, when, nth), is_zombie=True) for nth in times]
    return cells, impossible


def run_cell(cell: Cell | None) -> CellWorld:
    """Raises Violation where the job did not come through."""
    world = CellWorld(cell)
    outcome = world.run()
    if outcome.violation is None and cell is not None and not world.striker.has_struck:
        outcome.violation = "the fault never struck"
    if outcome.violation is not None:
        raise Violation(f"{cell}: {outcome.tell()}")
    return world


def find_failures(cells: Iterable[Cell], expected: list[Any]) -> Iterator[str]:
    for cell in cells:
        try:
            if run_cell(cell).read_stable() != expected:
                yield f"{cell}: the output differs from that of a run that nothing befell"
        except Violation as error:
            yield str(error)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--all", action="store_true", help="Strike at every time that each step is taken.")
    parser.add_argument("--part", default="1/1", help="The n-th of so many parts of the cells.")
    parser.add_argument("--mutants", action="store_true", help="Break each promise in turn, and see that it is found.")
    arguments = parser.parse_args()
    quieten()
    started, num_failed = time.perf_counter(), 0
    reference = run_cell(None)
    cells, impossible = list_cells(reference.striker.taken, is_whole=arguments.all)
    if arguments.mutants:
        return int(False in [find(mutant, cells, reference.read_stable()) for mutant, step in MUTANTS.items() if step])
    part, _, num_parts = arguments.part.partition("/")
    cells = cells[int(part) - 1 :: int(num_parts)]
    for failure in find_failures(cells, reference.read_stable()):
        num_failed += 1
        print(failure, flush=True)
    for line in impossible:
        print(f"no cell: {line}")
    elapsed_s = time.perf_counter() - started
    print(f"{len(cells)} cells, {num_failed} failed, {len(impossible)} that can't be, {elapsed_s:.1f} s")
    return 1 if num_failed else 0


def find(mutant: Callable[[pytest.MonkeyPatch], None], cells: Sequence[Cell], expected: list[Any]) -> bool:
    """Does a cell find it? Those of its step first."""
    step = MUTANTS[mutant]
    with pytest.MonkeyPatch.context() as patch:
        mutant(patch)
        ordered = sorted(cells, key=lambda cell: (cell.fault.step != step, not cell.is_zombie))
        for number, failure in enumerate(find_failures(ordered, expected), 1):
            print(f"{mutant.__name__}: found, the {number}. failure: {failure.splitlines()[0][:300]}", flush=True)
            return True
    print(f"{mutant.__name__}: not found by {len(cells)} cells", flush=True)
    return False


if __name__ == "__main__":
    sys.exit(main())
