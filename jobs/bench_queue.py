"""`python jobs/bench_queue.py --shards 200000 --workers 1000`: the driver's time for a lease and a commit, its memory."""

import argparse

from batchgen.bench.queue import run_bench


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=200_000, help="shards of the job")
    parser.add_argument("--workers", type=int, default=1_000, help="workers, all up from the start")
    parser.add_argument("--queue-only", action="store_true", help="leave out the whole run through the driver's loop")
    arguments = parser.parse_args()
    run_bench(arguments.shards, arguments.workers, is_queue_only=arguments.queue_only)


if __name__ == "__main__":
    main()
