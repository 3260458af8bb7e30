"""Figures of the endpoint on shared engines: `python jobs/bench_serve.py [--rows N] [--asks N] [--at-once N]`."""

import argparse
import json

from batchgen.bench.serving import run_all


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--asks", type=int, default=300)
    parser.add_argument("--at-once", type=int, default=1000)
    args = parser.parse_args()
    print(json.dumps(run_all(args.rows, args.asks, args.at_once)))


if __name__ == "__main__":
    main()
