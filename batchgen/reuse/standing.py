"""Requests that shards committed by earlier runs of a job answer: a run that goes on need not generate them again.

Read from four columns of the shard files, before any worker starts: of the last shards, up to `MAX_ROWS` rows, which take
three seconds. A damaged file is left out here: `batchgen verify` names it.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat

import pyarrow as pa
import pyarrow.compute as pc

from batchgen.errors import Damaged, NotFound
from batchgen.names import make_data_path
from batchgen.parquet import read_table
from batchgen.queue.claim_table import make_key, make_place
from batchgen.reuse.fingerprint import may_copy
from batchgen.spec import JobSpec
from batchgen.storage import Storage
from batchgen.verify.damage import refusing_damage

MAX_ROWS = 2**21
# Files read at a time.
NUM_THREADS = 32
COLUMNS = ["row_fingerprint", "source_row", "sample_index", "status"]


def read_claims(storage: Storage, spec: JobSpec, numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(key, place) of each generation in these shards (`queue.claim_table`). Raises StorageError."""
    if not may_copy(spec):
        return
    num_rows, left = 0, sorted(numbers)
    with ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="standing") as threads:
        while left and num_rows < MAX_ROWS:
            some, left = left[-NUM_THREADS:], left[:-NUM_THREADS]
            for number, rows in zip(some, threads.map(_read_generations, repeat(storage), some), strict=True):
                num_rows += rows.num_rows
                columns = (rows[name].to_pylist() for name in COLUMNS[:3])
                for fingerprint, row, sample in zip(*columns, strict=True):
                    yield make_key(fingerprint), make_place(number, (row, sample), spec.sampling.n)


def _read_generations(storage: Storage, number: int) -> pa.Table:
    path = make_data_path(number)
    try:
        with refusing_damage(storage.url(path), "is damaged", Damaged), storage.open_read(path) as source:
            rows = read_table(source, columns=COLUMNS)
            return rows.filter(pc.and_(pc.is_valid(rows["row_fingerprint"]), pc.equal(rows["status"], "ok")))
    except (Damaged, NotFound):
        return pa.table({name: [] for name in COLUMNS})
