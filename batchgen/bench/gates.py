"""How long the final gate takes to look for duplicates: from samples in the files' footers, and from their rows.

Files are made as a worker makes them, but of texts alone: nothing else is looked at.
"""

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from batchgen.batches import FileFooter
from batchgen.gates.scan import make_scan
from batchgen.gates.texts import digest_texts, make_text_sample
from batchgen.manifest import load_committed
from batchgen.spec import JobSpec
from batchgen.specs.gates import FinalGate
from batchgen.specs.load import make_spec
from batchgen.storage import Storage
from batchgen.write import FORMAT_VERSION, make_shard_file

WORDS = [f"word{number}" for number in range(5000)]


def measure_gate(folder: Path, num_rows: int, rows_per_file: int, num_words: int, repeated: float) -> dict[str, Any]:
    """`repeated`: share of answers whose text another one has, half of them in the same file. Seconds of the gate both
    ways, and a worker's CPU for the samples."""
    found: dict[str, Any] = {"rows": num_rows, "files": -(-num_rows // rows_per_file)}
    spec = make_spec(
        {
            "input": {"paths": str(folder)},
            "prompt": {"column": "prompt"},
            "engine": {"kind": "simulated"},
            "output": {"path": str(folder)},
        }
    )
    sampling_s = 0.0
    for number, table in enumerate(make_tables(num_rows, rows_per_file, num_words, repeated)):
        started = time.process_time()
        sample = make_text_sample([digest_texts(table)])
        sampling_s += time.process_time() - started
        footer = FileFooter(FORMAT_VERSION, spec.fingerprint(), number, 1, 1, "b", table.num_rows, 0, 0, ())
        for name, texts in (("footers", sample), ("rows", None)):
            path = folder / name / "data" / f"shard-{number:09d}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(make_shard_file(table, footer, compression_level=3, texts=texts))
    found["worker_cpu_us_a_row"] = round(1e6 * sampling_s / num_rows, 2)
    for name in ("rows", "footers"):
        found[name] = look(Storage(str(folder / name)), spec)
    return found


def make_tables(num_rows: int, rows_per_file: int, num_words: int, repeated: float) -> Iterator[pa.Table]:
    rng, known = random.Random(0), list[str]()
    for start in range(0, num_rows, rows_per_file):
        texts: list[str] = []
        for _ in range(min(rows_per_file, num_rows - start)):
            if (texts or known) and rng.random() < repeated:
                texts.append(rng.choice((texts or known) if rng.random() < 0.5 else (known or texts)))
            else:
                texts.append(" ".join(rng.choices(WORDS, k=num_words)))
        known = [*known[-10_000:], *texts[:: max(1, len(texts) // 500)]]
        yield pa.table({"status": ["ok"] * len(texts), "text": texts})


def look(storage: Storage, spec: JobSpec) -> dict[str, Any]:
    shards = load_committed(storage, spec.fingerprint()).values()
    num_bytes = sum(shard.info.num_bytes for shard in shards)
    started, started_cpu = time.perf_counter(), time.process_time()
    counts = make_scan(storage, shards, spec, FinalGate(max_duplicate_rate=0.0)).run()
    return {
        "seconds": round(time.perf_counter() - started, 2),
        "cpu_s": round(time.process_time() - started_cpu, 2),
        "megabytes": num_bytes // 10**6,
        "duplicate_rate": counts.num_repeated / counts.num_hashed,
    }
