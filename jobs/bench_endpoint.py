"""The endpoint accepts a large batch: seconds and memory; and its rows beside the same rows through `batchgen run`."""

import argparse
import json
from dataclasses import asdict

from batchgen.bench.endpoint import measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=50_000)
    parser.add_argument("--body-bytes", type=int, default=500, help="length of each prompt")
    parser.add_argument("--run", action="store_true", help="run the rows as well, and again by batchgen run")
    options = parser.parse_args()
    figures = asdict(measure(options.requests, options.body_bytes, is_run=options.run))
    for name, value in figures.items():
        print(f"{name:16} {value}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
