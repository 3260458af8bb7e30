"""Damage to a job's output folder, seeded: what disks, copies, scripts and people do to files. Pure: a folder is a dict
from path to bytes, and a mutation changes it in place and names the path that verify must name.
"""

import json
import random
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchgen.worker.seal import BODY_KEY, write_sealed

Folder = dict[str, bytes]
Mutation = Callable[[random.Random, Folder, Folder], str]

# Rewritten while a run works, or not written by batchgen's runs at all: nothing vouches for them, and no row is in them.
UNSEALED = ("_batchgen/lease/", "_batchgen/tmp/", "_batchgen/status.json", "_batchgen/probe/", "_batchgen/runs/")


def list_sealed(folder: Folder) -> list[str]:
    return sorted(path for path in folder if not path.startswith(UNSEALED))


def list_data(folder: Folder) -> list[str]:
    return sorted(path for path in folder if path.startswith("data/"))


# ---- bytes


def flip_byte(rng: random.Random, folder: Folder, _: Folder) -> str:
    path = rng.choice(list_sealed(folder))
    return _flip(rng, folder, path)


def flip_data_byte(rng: random.Random, folder: Folder, _: Folder) -> str:
    return _flip(rng, folder, rng.choice(list_data(folder)))


def flip_footer_byte(rng: random.Random, folder: Folder, _: Folder) -> str:
    path = rng.choice(list_data(folder))
    length = int.from_bytes(folder[path][-8:-4], "little") + 8
    return _flip(rng, folder, path, len(folder[path]) - length)


def _flip(rng: random.Random, folder: Folder, path: str, start: int = 0) -> str:
    data = bytearray(folder[path])
    data[rng.randrange(start, len(data))] ^= 1 << rng.randrange(8)
    folder[path] = bytes(data)
    return path


def truncate(rng: random.Random, folder: Folder, _: Folder) -> str:
    path = rng.choice(list_sealed(folder))
    folder[path] = folder[path][: rng.randrange(len(folder[path]))]
    return path


def append(rng: random.Random, folder: Folder, _: Folder) -> str:
    path = rng.choice(list_sealed(folder))
    folder[path] += rng.randbytes(rng.randrange(1, 20))
    return path


def zero_a_block(rng: random.Random, folder: Folder, _: Folder) -> str:
    """What a disk gives back of a block that it lost."""
    path = rng.choice(list_data(folder))
    data = folder[path]
    start = rng.randrange(len(data) - 600)
    folder[path] = data[:start] + bytes(512) + data[start + 512 :]
    return path


# ---- files


def delete_file(rng: random.Random, folder: Folder, _: Folder) -> str:
    # The footers' copy may be deleted at any time.
    path = rng.choice([path for path in list_sealed(folder) if path != "_batchgen/committed.parquet"])
    del folder[path]
    return "_batchgen/plan" if path.startswith("_batchgen/plan") else path


def add_stray(rng: random.Random, folder: Folder, _: Folder) -> str:
    number = rng.randrange(1000)
    path = rng.choice(
        [
            f"data/shard-{number + 100:09d}.parquet",
            f"data/part-{number}.parquet",
            f"data/x/{number}.txt",
            "batch_stats/run-000009.parquet",
            "_batchgen/plan/shards-000777.parquet",
        ]
    )
    source = rng.choice(list_data(folder))
    folder[path] = folder[source] if rng.random() < 0.7 else rng.randbytes(100)
    return path


def swap_files(rng: random.Random, folder: Folder, _: Folder) -> str:
    one, other = rng.sample(list_data(folder), 2)
    folder[one], folder[other] = folder[other], folder[one]
    return one


def copy_over(rng: random.Random, folder: Folder, _: Folder) -> str:
    one, other = rng.sample(list_data(folder), 2)
    folder[one] = folder[other]
    return one


def take_from_other_job(rng: random.Random, folder: Folder, other: Folder) -> str:
    """The other job has the same shards, the same keys and the same columns."""
    path = rng.choice([*list_data(folder), "_batchgen/spec.json", "_batchgen/plan/files.parquet", "manifest.json"])
    folder[path] = other[path]
    return path


# ---- rows


def edit_rows(folder: Folder, path: str, edit: Callable[[pa.Table], pa.Table], *, seals_anew: bool = False) -> str:
    """As a script would: read the file, change its rows, write it with all metadata that it had."""
    old = pq.ParquetFile(pa.BufferReader(folder[path]))
    table = edit(old.read()).replace_schema_metadata(old.schema_arrow.metadata)
    if seals_anew:
        folder[path] = write_sealed(table, row_group_rows=1000, compression_level=3).to_pybytes()
        return path
    sink = pa.BufferOutputStream()
    body = (old.metadata.metadata or {}).get(BODY_KEY)
    with pq.ParquetWriter(sink, table.schema, compression="zstd") as writer:
        writer.write_table(table)
        if body is not None:
            writer.add_key_value_metadata({BODY_KEY: body})
    folder[path] = sink.getvalue().to_pybytes()
    return path


def _take(table: pa.Table, places: list[int]) -> pa.Table:
    return table.take(pa.array(places, pa.int64()))


def drop_row(rng: random.Random, folder: Folder, _: Folder) -> str:
    def edit(table: pa.Table) -> pa.Table:
        places = list(range(table.num_rows))
        del places[rng.randrange(len(places))]
        return _take(table, places)

    return edit_rows(folder, rng.choice(list_data(folder)), edit, seals_anew=rng.random() < 0.5)


def repeat_row(rng: random.Random, folder: Folder, _: Folder) -> str:
    """Once more, or in the place of its neighbour."""

    def edit(table: pa.Table) -> pa.Table:
        places = list(range(table.num_rows))
        at = rng.randrange(1, len(places))
        places[at : at + rng.randrange(2)] = [at - 1]
        return _take(table, places)

    return edit_rows(folder, rng.choice(list_data(folder)), edit, seals_anew=rng.random() < 0.5)


def swap_rows(rng: random.Random, folder: Folder, _: Folder) -> str:
    def edit(table: pa.Table) -> pa.Table:
        places = list(range(table.num_rows))
        one, other = rng.sample(places, 2)
        places[one], places[other] = places[other], places[one]
        return _take(table, places)

    return edit_rows(folder, rng.choice(list_data(folder)), edit, seals_anew=rng.random() < 0.5)


def change_value(rng: random.Random, folder: Folder, _: Folder) -> str:
    name = rng.choice(["text", "completion_tokens", "custom_id", "finish_reason", "batch_id", "latency_s"])

    def edit(table: pa.Table) -> pa.Table:
        values = table[name].to_pylist()
        at = rng.randrange(len(values))
        old = values[at]
        values[at] = f"{old}!" if pa.types.is_string(table.schema.field(name).type) else (old or 0) + 1
        place = table.schema.get_field_index(name)
        return table.set_column(place, table.schema.field(name), pa.array(values, table.schema.field(name).type))

    return edit_rows(folder, rng.choice(list_data(folder)), edit, seals_anew=rng.random() < 0.5)


def edit_stats(rng: random.Random, folder: Folder, _: Folder) -> str:
    """A batch less, a batch twice, or other tokens."""
    path = rng.choice(sorted(path for path in folder if path.startswith("batch_stats/")))

    def edit(table: pa.Table) -> pa.Table:
        at = rng.randrange(table.num_rows)
        kind = rng.randrange(3)
        if kind == 2:
            place = table.schema.get_field_index("completion_tokens")
            more = pc.add(table["completion_tokens"], pa.array([int(i == at) for i in range(table.num_rows)]))
            return table.set_column(place, table.schema.field(place), more)
        return table.slice(at, 1) if kind else pa.concat_tables([table, table.slice(at, 1)])

    return edit_rows(folder, path, edit)


# ---- JSON


def edit_json(folder: Folder, path: str, edit: Callable[[dict[str, Any]], None]) -> str:
    value = json.loads(folder[path])
    edit(value)
    folder[path] = json.dumps(value, ensure_ascii=False).encode()
    return path


def edit_spec(rng: random.Random, folder: Folder, _: Folder) -> str:
    def edit(value: dict[str, Any]) -> None:
        section, name, new = rng.choice(
            [("sampling", "temperature", 0.25), ("prompt", "column", "other"), ("model", "path", "/models/other")]
        )
        value["spec"][section][name] = new

    return edit_json(folder, "_batchgen/spec.json", edit)


def edit_counts(rng: random.Random, folder: Folder, _: Folder) -> str:
    def edit(value: dict[str, Any]) -> None:
        if rng.random() < 0.5:
            value["rows"][rng.choice(["input", "output", "ok", "error"])] += rng.choice([-1, 1])
        else:
            rng.choice(value["files"])[rng.choice(["num_rows", "num_bytes", "num_rows_error"])] += 1

    return edit_json(folder, "manifest.json", edit)


def edit_success(rng: random.Random, folder: Folder, _: Folder) -> str:
    return edit_json(folder, "_SUCCESS", lambda value: value.update(epoch=value["epoch"] + rng.choice([-1, 1])))


BYTES: list[Mutation] = [flip_byte, flip_data_byte, flip_footer_byte, truncate, append, zero_a_block]
FILES: list[Mutation] = [delete_file, add_stray, swap_files, copy_over, take_from_other_job]
ROWS: list[Mutation] = [drop_row, repeat_row, swap_rows, change_value, edit_stats]
JSONS: list[Mutation] = [edit_spec, edit_counts, edit_success]
MUTATIONS = [*BYTES, *FILES, *ROWS, *JSONS]
# Those of which a folder that has no digests shows the traces in its rows, names and counts.
SHOWING: list[Mutation] = [add_stray, swap_files, copy_over, drop_row, repeat_row, swap_rows, edit_spec]
