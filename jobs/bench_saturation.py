"""Slots kept busy, order and tail against exact oracles (`slots`); our CPU a row (`cpu`). One JSON line a run."""

import argparse
import json
import tempfile

from batchgen.bench.saturation import HINTS, measure_cpu, measure_slots
from batchgen.bench.workload import Workload


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["slots", "cpu"])
    parser.add_argument("--folder", help="where input and output go, new: local or s3://; else a temporary one")
    for name, default in (("rows", 3000), ("workers", 1), ("shards", 24), ("seed", 7), ("prompt-tokens", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--slots", type=int, default=64, help="of each worker; 1.25 times as many are in flight")
    parser.add_argument("--pool", choices=["inline", "ray"], default="inline")
    parser.add_argument("--sigma", type=float, default=0.8, help="of the lognormal service times, mean 0.5 s")
    parser.add_argument("--hints", choices=HINTS, default="none")
    parser.add_argument("--text", action="store_true", help="cpu: prompts are text and tokenised here")
    parser.add_argument("--no-fingerprints", action="store_true", help="cpu: without output.row_fingerprints")
    parser.add_argument("--greedy", action="store_true", help="cpu: temperature 0, so that duplicates are looked for")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or temporary
        if options.what == "cpu":
            is_marked = not options.no_fingerprints
            kind = {"has_text": options.text, "row_fingerprints": is_marked, "is_greedy": options.greedy}
            found = measure_cpu(folder, options.rows, options.prompt_tokens, **kind)
        else:
            work, num = Workload(options.rows, options.slots, sigma=options.sigma, seed=options.seed), options.workers
            cluster = {"pool": options.pool, "workers": {"min": num, "max": num}, "cpus_per_worker": 0.1}
            found = measure_slots(folder, work, options.hints, shards=options.shards, cluster=cluster)
    print(json.dumps({**vars(options), **{name: round(value, 4) for name, value in found.items()}}))


if __name__ == "__main__":
    main()
