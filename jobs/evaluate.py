"""`ray job submit -- python jobs/evaluate.py SPEC.yaml`: one benchmark. Takes what `batchgen evaluate run` takes."""

import sys

from batchgen.cli import app

if __name__ == "__main__":
    sys.exit(app(["evaluate", "run", *sys.argv[1:]], prog_name="evaluate.py"))
