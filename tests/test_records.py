"""All that crosses a process pickles, means the same there, and can't be changed on the way."""

import dataclasses
import inspect
import pickle
from typing import Any, get_args

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from makers import make_error, make_file, make_job_spec, make_lease, make_ok, make_request, make_shard, make_worker_info

from batchgen import batches, errors, records
from batchgen.batches import BatchStats, FileFooter, GateCounts
from batchgen.errors import BatchgenError, RowError
from batchgen.names import make_batch_id, make_data_path, parse_batch_id
from batchgen.queue import events, orders
from batchgen.queue.events import (
    ClaimsMade,
    EngineRestarted,
    Heartbeat,
    JournalFlushed,
    PoolEvent,
    RowsGiven,
    ShardCommitted,
    ShardFailed,
    ShardReturned,
    ShareEnded,
    WorkerLeaving,
    WorkerLost,
    WorkerStarted,
    WorkerStartFailed,
    WorkerWarned,
)
from batchgen.queue.orders import ClaimsDecided, DropShare, GiveRows, HelpShare, JournalSoon, LookAt, TakeIn
from batchgen.records import Guided, JournalRef, Partial, Prompt, RowId, ShardProgress, Share, TokenLogprob
from batchgen.storage import Storage
from batchgen.worker.worker import WorkerSetup

STATS = BatchStats("shard-000000001-e1-a1", "shard-000000001", 1, 1, "committed", latency={"a": None}, sketches={})
FOOTER = FileFooter(1, "f", 1, 1, 1, STATS.batch_id, 1, 2, 3, (STATS,))
REF = JournalRef("_batchgen/journal/x.parquet", 2)
SHARE = Share(make_lease(attempt=2), "w2", "shard-000000001-e1-a1")
VALUES: list[Any] = [
    make_request(1, 2, seed=3, stop=("a",), guided=Guided(regex="a+")),
    Prompt(messages=({"role": "user", "content": "é"},), tools=({"type": "function"},)),
    make_ok(1),
    make_error(1),
    TokenLogprob(1, -0.5, ((1, -0.5),)),
    Partial((1, 2), ttft_s=0.5),
    make_file(row_group_rows=(1, 2)),
    make_shard(3),
    make_lease(journal=(REF,), replaces="etag", is_last_resort=True, reason="lost"),
    make_worker_info(),
    FOOTER,
    GateCounts("a", 1, 2, refused=3),
    WorkerStarted(make_worker_info()),
    WorkerStartFailed("w", "why"),
    WorkerLost("w", "why", ((3, ((0, 2), (5, 6))),)),
    WorkerLeaving("w", "why"),
    EngineRestarted("w", "why", ((3, ((0, 2),)),), ("b",)),
    ShardReturned("w", "b", 3),
    WorkerWarned("w", "why"),
    Heartbeat("w", 1, 2, 3.5, (ShardProgress("b", 1, 2),)),
    JournalFlushed("w", ((3, REF),)),
    ShardCommitted("w", "b", STATS, 10, "v", FOOTER, "d" * 64),
    ShardFailed("w", "b", 3, "why", True),
    GiveRows(SHARE, 5),
    HelpShare(SHARE),
    TakeIn("b", (REF,), (SHARE,)),
    DropShare(SHARE),
    RowsGiven("w", SHARE, 5),
    ShareEnded("w", SHARE, STATS, None),
    ClaimsMade("w", 1, b"k" * 8, b"p" * 8, bytes(8), (3,)),
    ClaimsDecided(1, b"p" * 8, (LookAt(3, ((REF, (5,)),), is_open=True),)),
    JournalSoon(3),
]


def list_types(module: Any) -> list[type]:
    found = inspect.getmembers(module, inspect.isclass)
    return [kind for _, kind in found if kind.__module__ == module.__name__ and dataclasses.is_dataclass(kind)]


def list_parts(value: Any) -> list[Any]:
    if dataclasses.is_dataclass(value):
        parts = [getattr(value, field.name) for field in dataclasses.fields(value)]
        return [value, *(part for inner in parts for part in list_parts(inner))]
    return [part for inner in value for part in list_parts(inner)] if isinstance(value, tuple) else []


def list_errors(kind: type[BatchgenError] = BatchgenError) -> list[type[BatchgenError]]:
    """Of the tree in `errors`: what a way in adds below it (`serve.errors`) is tested beside that."""
    below = [each for each in kind.__subclasses__() if each.__module__ == errors.__name__]
    return [kind, *(deeper for each in below for deeper in list_errors(each))]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_a_record_pickles_and_is_frozen(value: Any) -> None:
    for protocol in (2, pickle.HIGHEST_PROTOCOL):
        assert pickle.loads(pickle.dumps(value, protocol)) == value
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, dataclasses.fields(value)[0].name, None)
    assert not hasattr(value, "__dict__")


def test_no_record_is_left_out() -> None:
    tried = {type(part) for value in VALUES for part in list_parts(value)}
    modules = (records, batches, events, orders)
    assert {kind for module in modules for kind in list_types(module)} == tried
    assert set(get_args(PoolEvent)) <= tried
    assert set(get_args(PoolEvent)) == set(list_types(events))


@pytest.mark.parametrize("kind", list_errors(), ids=lambda kind: kind.__name__)
def test_an_error_pickles_with_its_words(kind: type[BatchgenError]) -> None:
    error = kind("bad_type", "é: what to mend") if issubclass(kind, RowError) else kind("é: what to mend")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert (str(again), again.args, again.is_retryable) == ("é: what to mend", error.args, kind.is_retryable)
    if isinstance(again, RowError):
        assert (again.error_type, again.message) == ("bad_type", "é: what to mend")


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    assert errors.__doc__ is not None
    drawn = [line.split("──")[1].split()[0] for line in errors.__doc__.splitlines() if "──" in line]
    ours = [kind.__name__ for kind in list_errors() if kind.__module__ == "batchgen.errors"]
    assert ["BatchgenError", *drawn] == ours


def test_all_that_a_worker_needs_pickles() -> None:
    storage = Storage("memory://bucket/out", can_replace=False)
    storage.put("a", b"x")  # a client is open now; it must not cross
    passthrough = pa.schema([("a", pa.list_(pa.struct([("b", pa.timestamp("us", "UTC"))]))), ("c", pa.string_view())])
    spec = make_job_spec(sampling={"stop": ["a"]}, cluster={"resources_per_worker": {"b200": 8.0}})
    setup = WorkerSetup("w1", spec, 3, storage, passthrough)
    again = pickle.loads(pickle.dumps(setup))
    assert (again.worker_id, again.spec, again.epoch, again.passthrough) == ("w1", spec, 3, passthrough)
    assert again.spec.fingerprint() == spec.fingerprint()
    assert (again.storage.root, again.storage.can_replace_exclusively) == (storage.root, False)
    assert again.storage.read_bytes("a") == b"x"
    storage.delete("a")


# ---- names and orders


@given(st.integers(0, 10**9 - 1), st.integers(1, 10**6), st.integers(1, 10**4))
def test_a_batch_id_says_shard_epoch_and_attempt(number: int, epoch: int, attempt: int) -> None:
    batch_id = make_batch_id(number, epoch, attempt)
    assert parse_batch_id(batch_id) == (number, epoch, attempt)
    assert batch_id.startswith(make_shard(number).id + "-")


def test_names_of_shards_sort_by_number() -> None:
    paths = [make_data_path(number) for number in (0, 9, 10, 199_999, 200_000)]
    assert paths == sorted(paths)
    assert make_shard(42).data_path == make_data_path(42) == "data/shard-000000042.parquet"
    assert make_lease(make_shard(42), attempt=2, epoch=3).batch_id == "shard-000000042-e3-a2"


def test_rows_are_ordered_by_file_row_and_sample() -> None:
    ids = [RowId("a", 0, 0), RowId("a", 0, 1), RowId("a", 2, 0), RowId("a", 10, 0), RowId("b", 0, 0)]
    assert sorted({*ids}) == ids


def test_a_request_in_memory_is_counted_by_its_tokens() -> None:
    request = dataclasses.replace(make_request(), token_ids=tuple(range(1000)))
    assert request.num_bytes == 36_000
