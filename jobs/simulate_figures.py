#!/usr/bin/env python
"""The policies' figures in virtual time: budgets, tail, workers, ranks, scale, coverage; all without a name.

python jobs/simulate_figures.py [NAME...]
"""

import sys
import time

from batchgen.simulate.figures import FIGURES


def main() -> None:
    names = sys.argv[1:] or list(FIGURES)
    if unknown := sorted({*names} - {*FIGURES}):
        sys.exit(f"simulate_figures: no figure '{unknown[0]}'; give one of {', '.join(FIGURES)}")
    for name in names:
        started = time.perf_counter()
        print(f"== {name}: {FIGURES[name].__doc__}", flush=True)
        for line in FIGURES[name]():
            print(line, flush=True)
        print(f"({time.perf_counter() - started:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
