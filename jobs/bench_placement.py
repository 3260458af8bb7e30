"""Rank placement beside routing that knows no prefixes: prefix tokens served from cache, imbalance and idle slots."""

import argparse
import json

from batchgen.bench.placement import POLICIES, Workload, make_row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--prefixes", type=int, nargs="+", default=[8, 64, 512, 4096])
    parser.add_argument("--mean", type=float, default=128.0, help="mean answer length, tokens")
    parser.add_argument("--sigma", type=float, default=0.0, help="sigma of its lognormal distribution; 0: all alike")
    parser.add_argument("--inflight", type=int, default=1152, help="requests in flight; 8 ranks decode 128 each")
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), choices=POLICIES)
    options = parser.parse_args()
    lengths = {"mean_tokens": options.mean, "sigma": options.sigma, "inflight": options.inflight}
    rows = []
    for prefixes in options.prefixes:
        for policy in options.policies:
            rows.append(make_row(Workload(num_rows=options.rows, num_prefixes=prefixes, **lengths), policy))
            print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    print(json.dumps({"workload": lengths | {"rows": options.rows}, "figures": rows}))


if __name__ == "__main__":
    main()
