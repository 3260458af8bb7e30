"""batchgen beside other systems on this machine: one simulated server, the same rows, every way in turn. Prints a table and
one JSON line; start it again to go on where it stopped. Needs the extra: pip install 'batchgen[bench]'."""

import argparse
import json
import sys
from pathlib import Path

from batchgen.bench.benchmark import Options, run_benchmark
from batchgen.bench.summary import make_result_text

REPO = Path(__file__).parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmark"), help="runs are kept here")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=15.0, help="begin no run after this")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="ways with one of these in their name")
    parser.add_argument("--quick", action="store_true", help="ours and a plain client, no peers: a few seconds")
    given = parser.parse_args()
    options = Options(
        folder=given.out,
        scripts=REPO / "jobs" / "peers",
        s3_server=REPO / "tests" / "s3_server.py",
        repeats=1 if given.quick else given.repeats,
        minutes=given.minutes,
        is_quick=given.quick,
        only=given.only,
    )
    result = run_benchmark(options, lambda line: print(line, file=sys.stderr, flush=True))
    print(make_result_text(result), json.dumps(result), sep="\n\n")
    return 1 if any(way["num_failed"] for way in result["ways"]) else 0


if __name__ == "__main__":
    sys.exit(main())
