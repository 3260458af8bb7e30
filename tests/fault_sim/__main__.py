"""Run worlds by their seeds: `python -m fault_sim 0:300`. Prints what was met and ends with a count; a seed that fails
prints itself and its story. Exit code 1 where one failed."""

import argparse
import gc
import logging
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable

import pytest

from .world import Outcome, run_world  # isort: skip  # before anything of batchgen
from .mutants import MUTANTS
from .reuse_mutants import REUSE_MUTANTS

MAX_SEEDS = 1000
# A soak that is cut goes on behind the last seed that it told.
TELL_SEEDS = 100


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("seeds", nargs="?", default="0:300", help="FIRST:END, or one seed")
    parser.add_argument("--story", action="store_true", help="Tell the story of each seed.")
    parser.add_argument("--mutants", action="store_true", help="Break each promise in turn, and see that it is found.")
    arguments = parser.parse_args()
    first, _, end = arguments.seeds.partition(":")
    quieten()
    if arguments.mutants:
        return int(False in [find(mutant, int(first)) for mutant in [*MUTANTS, *REUSE_MUTANTS]])
    started, totals, strikes, num_failed = time.perf_counter(), Counter[str](), Counter[str](), 0
    seeds = range(int(first), int(end or int(first) + 1))
    for number, seed in enumerate(seeds, 1):
        outcome = run_world(seed)
        add(outcome, totals, strikes)
        if arguments.story or outcome.violation is not None:
            print(outcome.tell(), flush=True)
        num_failed += outcome.violation is not None
        if number % TELL_SEEDS == 0:
            rate = number / (time.perf_counter() - started)
            print(f"seeds {first} to {seed}: {num_failed} violations, {rate:.1f} seeds/s", flush=True)
    elapsed_s = time.perf_counter() - started
    print(f"{len(seeds)} seeds, {num_failed} violations, {len(seeds) / elapsed_s:.1f} seeds/s")
    print(", ".join(f"{count} {name}" for name, count in totals.items()))
    print(", ".join(f"{count} {name}" for name, count in sorted(strikes.items())))
    return 1 if num_failed else 0


def find(mutant: Callable[[pytest.MonkeyPatch], None], first: int) -> bool:
    """Does a seed find it?"""
    for seed in range(first, first + MAX_SEEDS):
        with pytest.MonkeyPatch.context() as patch:
            mutant(patch)
            outcome = run_world(seed)
        if outcome.violation is not None:
            print(
                f"{mutant.__name__}: found by seed {seed}, number {seed - first + 1}: {outcome.violation}", flush=True
            )
            return True
    print(f"{mutant.__name__}: not found by {MAX_SEEDS} seeds", flush=True)
    return False


def add(outcome: Outcome, totals: Counter[str], strikes: Counter[str]) -> None:
    totals["runs"] += outcome.num_runs
    totals["rows"] += outcome.num_rows
    totals["generated"] += outcome.num_generated
    totals["reused"] += outcome.num_reused
    totals["copied"] += outcome.num_copied
    totals["duplicates sent again after faults"] += outcome.num_sent_again
    totals["commits"] += outcome.num_commits
    totals["replaced files"] += outcome.num_replaced
    totals["store operations"] += outcome.num_operations
    totals["virtual s"] += round(outcome.seconds)
    begun = [
        words for _, _, words in outcome.story if words.startswith("GiveRows") and words.endswith("that are begun")
    ]
    totals["asked for begun rows"] += len(begun)
    totals["shares of shards"] += sum(words.startswith("HelpShare") for _, _, words in outcome.story)
    strikes.update(outcome.strikes)


def quieten() -> None:
    """Processes that are killed leave coroutines and futures behind, of which Python would complain; worlds collect them
    when they have ended, and nothing looks through all that is loaded in the midst of one."""
    logging.getLogger("asyncio").setLevel(logging.CRITICAL + 1)
    warnings.simplefilter("ignore")
    sys.unraisablehook = lambda _: None
    gc.collect()
    gc.freeze()
    gc.disable()


if __name__ == "__main__":
    sys.exit(main())
