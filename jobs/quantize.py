"""`ray job submit -- python jobs/quantize.py SPEC.yaml`: `batchgen quantize` on a node with GPUs, as one Ray task."""

import argparse
import json
import sys

import ray

from batchgen.errors import BatchgenError
from batchgen.quantize.job import quantize
from batchgen.quantize.spec_load import load_quantize_spec


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("spec", metavar="SPEC", help="YAML file, see jobs/quantize.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a field")
    options = parser.parse_args()
    try:
        spec = load_quantize_spec(options.spec, options.set)
        ray.init(ignore_reinit_error=True)
        run = ray.remote(num_gpus=spec.gpus, max_retries=2)(quantize)
        report = ray.get(run.remote(spec, print))
    except ray.exceptions.RayTaskError as error:  # first: it is of its cause's class too, and tells the whole traceback
        if not isinstance(error.cause, BatchgenError):
            raise
        print(f"batchgen: {error.cause}", file=sys.stderr)
        return 2
    except BatchgenError as error:
        print(f"batchgen: {error}", file=sys.stderr)
        return 2
    print(json.dumps({name: value for name, value in report.items() if name != "layers"}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
