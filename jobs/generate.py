"""`ray job submit -- python jobs/generate.py SPEC.yaml`: one batch run. Takes what `batchgen run` takes."""

import sys

from batchgen.cli import app

if __name__ == "__main__":
    sys.exit(app(["run", *sys.argv[1:]], prog_name="generate.py"))
