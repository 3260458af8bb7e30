"""Seeded worlds and the crash-point matrix (`fault_sim`), in processes of their own: virtual time must be there before
anything of batchgen is loaded. A seed that fails prints itself and its story here too."""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
NUM_SEEDS = 200
NUM_PROCESSES = 2
SEEDS_A_ROUND = 1000


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


def split(first: int, num_seeds: int) -> Sequence[str]:
    ends = [first + num_seeds * part // NUM_PROCESSES for part in range(NUM_PROCESSES + 1)]
    return [f"{start}:{end}" for start, end in pairwise(ends)]


def run_parts(module: str, parts: Sequence[Sequence[str]]) -> list[str]:
    """What each of them told; at once, one a core."""
    with ExitStack() as stack:
        children = [stack.enter_context(running(module, *part)) for part in parts]
    told: list[str] = [child.told for child in children]  # type: ignore[attr-defined]
    assert [child.returncode for child in children] == [0] * len(parts), "\n".join(told)[-50_000:]
    return told


@pytest.mark.timeout(300)
def test_worlds_hold() -> None:
    told = run_parts("fault_sim", [[seeds] for seeds in split(0, NUM_SEEDS)])
    for part in told:
        assert f"{NUM_SEEDS // NUM_PROCESSES} seeds, 0 violations" in part
        # All that may strike did.
        assert len(re.findall(r"\d+ (?:kill|freeze|cut|second|ask)_\w+", part)) == 10


def test_a_world_is_its_seed() -> None:
    """Alone, and after others: the same story."""

    def read(seeds: str) -> str:
        (told,) = run_parts("fault_sim", [[seeds, "--story"]])
        return re.split(r"\n\d seeds", told.partition("seed 3:")[2])[0]

    alone = read("3")
    assert len(alone.splitlines()) > 10
    assert read("2:4") == alone


@pytest.mark.parametrize("seed", ["102717", "153020"])
def test_a_world_that_was_told_wrong_holds(seed: str) -> None:
    """102717: 80 runs were refused before its store calmed down, which was taken for a job that never ends. 153020: a
    worker that is cut off, and given up for it, was no death."""
    (told,) = run_parts("fault_sim", [[seed]])
    assert "1 seeds, 0 violations" in told


@pytest.mark.timeout(300)
def test_every_crash_point_leaves_the_same_output() -> None:
    parts = [["--part", f"{part}/{NUM_PROCESSES}"] for part in range(1, NUM_PROCESSES + 1)]
    num_cells = 0
    for told in run_parts("fault_sim.matrix", parts):
        found = re.search(r"(\d+) cells, 0 failed, (\d+) that can't be", told)
        assert found is not None, told[-5000:]
        num_cells += int(found[1])
        assert int(found[2]) == len(re.findall(r"^no cell: \w+ \w+:\w+: .+", told, re.MULTILINE))
    assert num_cells > 150


@pytest.mark.timeout(300)
def test_every_broken_promise_is_found_by_a_crash_point() -> None:
    (told,) = run_parts("fault_sim.matrix", [["--mutants"]])
    assert "not found" not in told
    assert len(re.findall(r"^\w+: found", told, re.MULTILINE)) == 7


# ---- soak: `make soak` ------------------------------------------------------------------------------------------------


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_every_broken_promise_is_found_by_a_seed() -> None:
    (told,) = run_parts("fault_sim", [["--mutants"]])
    assert "not found" not in told
    print(told)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_every_crash_point_at_every_time() -> None:
    for told in run_parts("fault_sim.matrix", [["--all", "--part", f"{part}/2"] for part in (1, 2)]):
        print(told.splitlines()[-1])


@pytest.mark.soak
@pytest.mark.timeout(100_000)
def test_many_worlds_hold() -> None:
    """`BATCHGEN_SOAK=FIRST:END` chooses the seeds; both halves of a round run at once. A violation ends it with its story;
    whoever cuts it was told by the last round where to go on."""
    first, end = map(int, os.environ.get("BATCHGEN_SOAK", "0:100000").split(":"))
    started = time.monotonic()
    for start in range(first, end, SEEDS_A_ROUND):
        done = min(start + SEEDS_A_ROUND, end)
        told = run_parts("fault_sim", [[seeds] for seeds in split(start, done - start)])
        rate = (done - first) / (time.monotonic() - started)
        print(
            f"seeds {first}:{done}: 0 violations, {rate:.1f} seeds/s; the rest: make soak SEEDS={done}:{end}",
            flush=True,
        )
    print(*told, sep="\n")
