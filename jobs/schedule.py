"""`ray job submit -- python jobs/schedule.py PIPELINE.yaml...`: keeps them going. Takes what `batchgen schedule` takes."""

import sys

from batchgen.cli import app

if __name__ == "__main__":
    sys.exit(app(["schedule", *sys.argv[1:]], prog_name="schedule.py"))
