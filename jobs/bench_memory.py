"""`jobs/bench_memory.py`: does memory stay flat over a long run? Many rows through an engine without latency, one worker.

Prints the resident memory of driver and worker while rows go by, and one JSON line.
"""

import sys

from batchgen.bench.memory import main

if __name__ == "__main__":
    sys.exit(main())
