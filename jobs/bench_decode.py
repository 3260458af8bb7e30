"""Tokens/s of our decode loop, of `generate` and of the library's continuous batching, each in turn, several times."""

import argparse
import statistics

from batchgen.bench.decode import WAYS, make_model, make_workload


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="tiny", choices=["tiny", "1b"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--mean", type=float, default=74.0, help="mean answer length, tokens")
    parser.add_argument("--sigma", type=float, default=0.9, help="sigma of its lognormal distribution")
    parser.add_argument("--max-tokens", type=int, default=600)
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 32, 64])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ways", nargs="+", default=list(WAYS))
    options = parser.parse_args()
    model = make_model(options.size, options.device)
    work = make_workload(options.requests, options.mean, options.sigma, options.max_tokens)
    print(f"{options.requests} requests, {sum(work.lengths)} tokens, longest {max(work.lengths)}", flush=True)
    for rows in options.rows:
        for way in options.ways:
            WAYS[way](model, make_workload(rows, 16, 0.1, 32), rows)  # warms up kernels and allocator
        # In turn, so that whatever else the machine does meets all of them.
        runs = [[WAYS[way](model, work, rows) for way in options.ways] for _ in range(options.repeats)]
        for same in zip(*runs, strict=True):
            rates = sorted(run.tokens_per_s for run in same)
            cpu = statistics.median(run.num_tokens / run.cpu_s for run in same)
            roofline = [run.roofline_s / run.wall_s for run in same if run.roofline_s]
            share = f", {statistics.median(roofline):.1%} of the roofline" if roofline else ""
            spread = f"({rates[0]:,.0f} to {rates[-1]:,.0f}; {cpu:,.0f} a CPU second)"
            print(f"{same[0].name}: {statistics.median(rates):,.0f} tokens/s {spread}{share}", flush=True)


if __name__ == "__main__":
    main()
