"""A run that reuses yesterday's output, and one of duplicates: engine calls and seconds, on a simulated engine."""

import argparse
import json
import tempfile
from pathlib import Path

from batchgen.bench.delta import measure_delta, measure_duplicates

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["delta", "duplicates"])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--changed", type=float, default=0.05, help="share of the rows that were changed")
    parser.add_argument("--times", type=int, default=10, help="how often each prompt is there")
    parser.add_argument("--workers", type=int, default=1, help="duplicates: threads of this process")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.what == "delta":
            found = measure_delta(Path(folder), args.rows, args.changed)
        else:
            found = measure_duplicates(Path(folder), args.rows, args.times, args.workers)
    print(json.dumps(found))
