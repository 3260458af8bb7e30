"""The command line. Parses, calls, prints; what is decided elsewhere is not decided here.

Exit codes: 0 all rows done and the error rate within `retry.max_error_rate`; 1 done with too many errors; 2 refused
before anything was started; 3 stopped and resumable; 4 a gate failed. People read standard error; `--json` ends standard
output with one JSON line for programs, also on a refusal. A traceback is shown only with `--debug`.
"""

import sys

# Each of these adds its commands to the app, in the order of the help.
import batchgen.cli.jobs  # isort: skip
import batchgen.cli.outputs  # isort: skip
import batchgen.cli.reports  # isort: skip
import batchgen.cli.replay  # isort: skip
import batchgen.cli.nodes  # isort: skip
import batchgen.cli.models  # isort: skip
import batchgen.cli.evaluate  # isort: skip
import batchgen.cli.pipelines  # isort: skip
import batchgen.cli.simulate  # isort: skip
import batchgen.cli.chaos  # isort: skip
import batchgen.cli.serve  # isort: skip  # noqa: F401
from batchgen.cli.base import app

__all__ = ["app", "main"]


def main() -> None:
    sys.exit(app())
