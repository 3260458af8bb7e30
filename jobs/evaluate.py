"""`ray job submit -- python jobs/evaluate.py SPEC.yaml`: `batchgen evaluate run` as a Ray job's driver."""

import sys

from batchgen.cli import app

if __name__ == "__main__":
    sys.exit(app(["evaluate", "run", *sys.argv[1:], "--json"]))
