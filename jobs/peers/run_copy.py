"""pyarrow reads the files and writes them again: what no system can beat."""

from pathlib import Path

import pyarrow.dataset as ds
import pyarrow.parquet as pq

from batchgen.bench.child import Child


def main() -> None:
    child = Child()
    with child.job():
        Path(child["output"]).mkdir(parents=True)
        for path in ds.dataset(child["input"]).files:
            pq.write_table(pq.read_table(path), f"{child['output']}/{Path(path).name}")
    child.close("pyarrow")


if __name__ == "__main__":
    main()
