"""Seeded worlds and the crash-point matrix (`fault_sim`), in processes of their own: virtual time must be there before
anything of batchgen is loaded. A seed that fails prints itself and its story here too."""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
NUM_SEEDS = 200
NUM_PROCESSES = 2


@contextmanager
def running(*args: str) -> Iterator["subprocess.Popen[str]"]:
    env = {**os.environ, "PYTHONHASHSEED": "0"}
    with (
        tempfile.TemporaryFile("w+") as out,
        subprocess.Popen([sys.executable, "-m", *args], cwd=TESTS, env=env, stdout=out, stderr=out, text=True) as child,
    ):
        try:
            yield child
            child.wait()
            out.seek(0)
            child.told = out.read()  # type: ignore[attr-defined]
        finally:
            child.kill()


def run(*args: str) -> str:
    with running(*args) as child:
        pass
    told: str = child.told  # type: ignore[attr-defined]
    assert child.returncode == 0, told[-20_000:]
    return told


def split(first: int, num_seeds: int, num_parts: int) -> Sequence[str]:
    ends = [first + num_seeds * part // num_parts for part in range(num_parts + 1)]
    return [f"{start}:{end}" for start, end in zip(ends, ends[1:], strict=False)]


@pytest.mark.parametrize("seeds", split(0, NUM_SEEDS, NUM_PROCESSES))
def test_worlds_hold(seeds: str) -> None:
    told = run("fault_sim", seeds)
    assert f"{NUM_SEEDS // NUM_PROCESSES} seeds, 0 violations" in told
    # All that may strike did.
    assert len(re.findall(r"\d+ (?:kill|freeze|cut|second|ask)_\w+", told)) == 10


def test_a_world_is_its_seed() -> None:
    """Alone, and after others: the same story."""

    def read(seeds: str) -> str:
        return (
            run("fault_sim", seeds, "--story").partition("seed 3:")[2].partition("1 seeds")[0].partition("2 seeds")[0]
        )

    alone = read("3")
    assert len(alone.splitlines()) > 10
    assert read("2:4") == alone


def test_every_broken_promise_is_found() -> None:
    told = run("fault_sim", "--mutants")
    assert "not found" not in told
    assert len(re.findall(r"^\w+: found by seed", told, re.MULTILINE)) == 11


def test_every_crash_point_leaves_the_same_output() -> None:
    told = run("fault_sim.matrix")
    found = re.search(r"(\d+) cells, 0 failed, (\d+) that can't be", told)
    assert found is not None, told[-5000:]
    assert int(found[1]) >= 80
    assert int(found[2]) == len(re.findall(r"^no cell: \w+ \w+:\w+: .+", told, re.MULTILINE))


# ---- soak: `make soak` ------------------------------------------------------------------------------------------------


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_every_crash_point_at_every_time() -> None:
    print(run("fault_sim.matrix", "--all").splitlines()[-1])


@pytest.mark.soak
@pytest.mark.timeout(100_000)
def test_many_worlds_hold() -> None:
    """`BATCHGEN_SOAK=FIRST:END` chooses the seeds; both halves run at once. A violation ends it with its story."""
    first, _, end = os.environ.get("BATCHGEN_SOAK", "0:100000").partition(":")
    num_seeds, started = int(end) - int(first), time.monotonic()
    parts = split(int(first), num_seeds, NUM_PROCESSES)
    with running("fault_sim", parts[0]) as one, running("fault_sim", parts[1]) as other:
        pass
    told = [child.told for child in (one, other)]  # type: ignore[attr-defined]
    assert one.returncode == other.returncode == 0, "\n".join(told)[-50_000:]
    print(f"{num_seeds} seeds, 0 violations, {num_seeds / (time.monotonic() - started):.1f} seeds/s", *told, sep="\n")
