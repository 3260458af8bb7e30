"""Tokens/s of one `transformers` engine through our worker, Parquet to Parquet, beside the same fed all at once."""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from batchgen.bench.decode import make_workload
from batchgen.bench.worker import Setup, compare, describe_device, write_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="1b", choices=["tiny", "1b"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--mean", type=float, default=128.0, help="mean answer length, tokens")
    parser.add_argument("--sigma", type=float, default=0.9, help="sigma of its lognormal distribution")
    parser.add_argument("--max-tokens", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=128, help="requests decoded together")
    parser.add_argument("--cache-gib", type=float, default=16.0)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    work = make_workload(given.requests, given.mean, given.sigma, given.max_tokens)
    with tempfile.TemporaryDirectory(prefix="batchgen-bench-") as folder:
        setup = Setup(Path(folder), given.device, given.rows, given.cache_gib)
        write_checkpoint(setup, given.size)
        fed = compare(setup, work, given.repeats, lambda line: print(line, flush=True))
    rates = {name: sorted(run.tokens_per_s for run in fed if run.name == name) for name in {run.name for run in fed}}
    worker, at_once = (statistics.median(rates[name]) for name in ("through the worker", "fed all at once"))
    facts = {**vars(given), **describe_device(given.device), "num_tokens": sum(work.lengths)}
    print(json.dumps({**facts, "tokens_per_s": rates, "ratio": worker / at_once}))


if __name__ == "__main__":
    main()
