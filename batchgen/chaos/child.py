"""One run of a job for `batchgen chaos`, in a process of its own that may be told where to die.

`python -m batchgen.chaos.child SPEC [FAULT]`: exit code as of `batchgen run`, or that of SIGKILL.
"""

import sys

from batchgen.chaos.faults import parse_fault, striking
from batchgen.driver.run import run_job
from batchgen.driver.view import LineView
from batchgen.errors import BatchgenError, Refusal
from batchgen.specs.load import load_spec
from batchgen.storage import Storage


def main(spec_path: str, fault: str | None) -> int:
    """The exit code."""
    spec = load_spec(spec_path)
    view = LineView(spec.cluster.log_interval_s, lambda line: print(line, file=sys.stderr, flush=True))
    try:
        with striking(parse_fault(fault) if fault else None, Storage(spec.output.path).root):
            report = run_job(spec, view)
    except BatchgenError as error:
        view.warn(str(error))
        return 2 if isinstance(error, Refusal) else 3
    return int(report["exit_code"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None))
