#!/usr/bin/env python
"""How closely the simulator's engine model meets published throughput; with --fit, find its three constants anew.

python jobs/calibrate_simulator.py [--fit]
"""

import sys

from batchgen.simulate.calibration import Fitted, fit, repeat_all


def main() -> None:
    if "--fit" in sys.argv[1:]:
        found = fit(lambda point, loss: print(f"{describe(point)}  sum of squares {loss:.4f}", flush=True))
        print(f"fitted: {describe(found)}; frozen: {describe(Fitted())}")
    print(f"{'run':32} {'published':>9} {'model':>7} {'error':>7} {'TTFT':>8} {'latency':>8}")
    for met in repeat_all():
        note = "" if met.run.is_fitted else "  not fitted"
        figures = f"{met.run.tokens_per_s:9,.0f} {met.tokens_per_s:7,.0f} {met.error:+7.1%}"
        print(f"{met.run.name:32} {figures} {met.ttft_s:7.1f}s {met.latency_s:7.1f}s{note}", flush=True)


def describe(point: Fitted) -> str:
    step, token = f"{point.fixed_s * 1e3:.2f} ms a step", f"{point.token_s * 1e6:.1f} us a token"
    return f"{step}, {token}, {point.context_s * 1e9:.2f} ns a context token"


if __name__ == "__main__":
    main()
