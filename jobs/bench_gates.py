"""The final gate's search for duplicates, from the files' footers and from their rows."""

import argparse
import json
import tempfile
from pathlib import Path

from batchgen.bench.gates import measure_gate

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rows-per-file", type=int, default=20_000)
    parser.add_argument("--words", type=int, default=120, help="of an answer")
    parser.add_argument("--repeated", type=float, default=0.05, help="share of answers whose text another one has")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure_gate(Path(folder), args.rows, args.rows_per_file, args.words, args.repeated)))
