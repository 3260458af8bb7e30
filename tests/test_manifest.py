"""The frozen plan: written once, by one driver. What is committed and counted is tested with whole runs."""

from pathlib import Path

import pyarrow as pa
import pytest
from makers import make_file

from batchgen.errors import LeaseLost
from batchgen.manifest import read_plan, write_plan_files, write_plan_shards
from batchgen.records import Shard
from batchgen.storage import Storage

FILES = [make_file("/in/a", (10, 10)), make_file("/in/b", (5,))]
SCHEMA = pa.schema([("topic", pa.string())])


def cut(rows: int) -> list[Shard]:
    return [Shard(start // rows, FILES[0], start, start + rows) for start in range(0, FILES[0].num_rows, rows)]


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "out"))


def test_a_plan_written_again_after_a_lost_reply_is_our_own(storage: Storage) -> None:
    for _ in range(2):
        write_plan_files(storage, FILES, SCHEMA)
        write_plan_shards(storage, FILES, cut(5))
    assert read_plan(storage) == (FILES, SCHEMA, cut(5))


@pytest.mark.parametrize("is_exclusive", [True, False], ids=["exclusive", "look-and-write"])
def test_two_drivers_never_mix_two_plans(storage: Storage, is_exclusive: bool) -> None:
    other = Storage(storage.root, is_exclusive=is_exclusive, can_replace=is_exclusive)
    write_plan_files(storage, FILES, SCHEMA)
    write_plan_shards(storage, FILES, cut(5))
    with pytest.raises(LeaseLost, match="another run planned this folder"):
        write_plan_shards(other, FILES, cut(10))
    with pytest.raises(LeaseLost, match="another run planned this folder"):
        write_plan_files(other, FILES[:1], SCHEMA)
    assert read_plan(storage) == (FILES, SCHEMA, cut(5))
