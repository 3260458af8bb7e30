"""`ray job submit -- python jobs/quantize.py SPEC.yaml`: `batchgen quantize` on a node with GPUs, as one Ray task."""

import json
import sys

import ray

from batchgen.errors import BatchgenError
from batchgen.quantize.job import quantize
from batchgen.quantize.spec_load import load_quantize_spec


def main() -> int:
    try:
        spec = load_quantize_spec(sys.argv[1], sys.argv[2:])
        ray.init(ignore_reinit_error=True)
        run = ray.remote(num_gpus=spec.gpus, max_retries=2)(quantize)
        report = ray.get(run.remote(spec, print))
    except BatchgenError as error:
        print(f"batchgen: {error}", file=sys.stderr)
        return 2
    except ray.exceptions.RayTaskError as error:
        print(f"batchgen: {error.cause}", file=sys.stderr)
        return 2
    print(json.dumps({name: value for name, value in report.items() if name != "layers"}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
