"""What watching a run costs: `python jobs/bench_progress.py [--rows N] [--tokens-per-s R]`. One JSON line."""

import argparse
import json
import tempfile

from batchgen.bench.progress import measure_progress


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--tokens-per-s", type=float, help="of each request; without it the engine answers at once")
    parser.add_argument("--page-s", type=float, default=60.0, help="a live page so often, at most")
    parser.add_argument("--no-metrics", dest="has_metrics", action="store_false", help="without a Ray to tell them to")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure_progress(
            folder,
            options.rows,
            tokens_per_s=options.tokens_per_s,
            page_s=options.page_s,
            has_metrics=options.has_metrics,
        )
    print(json.dumps({**vars(options), **{name: round(value, 5) for name, value in found.items()}}))


if __name__ == "__main__":
    main()
