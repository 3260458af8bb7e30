"""From file to sender with real files, shards and sender: which rows are made into requests, in which order, and when."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from makers import make_job_spec, make_lease, make_ok, make_rows

from batchgen.engines.base import Engine
from batchgen.engines.simulated import ByteTokenizer
from batchgen.errors import SpecError
from batchgen.read import pick_rows, read_footer
from batchgen.records import Generation, Lease, Request, Shard, Slot, Usage
from batchgen.spec import JobSpec, RetrySpec
from batchgen.storage import list_inputs
from batchgen.worker import feeder, read_ahead
from batchgen.worker.feeder import Feeder, Page
from batchgen.worker.hint_check import HintCheck
from batchgen.worker.open_shard import OpenShard
from batchgen.worker.prepare import Preparer
from batchgen.worker.sender import Sender
from batchgen.write import make_result_schema

NO_PASSTHROUGH = pa.schema([])


class CountingTokenizer(ByteTokenizer):
    """Knows which texts it was asked for."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def encode(self, text: str) -> list[int]:
        self.texts.append(text)
        return super().encode(text)


class Gate:
    """An engine that notes what it is sent, and answers once it is opened."""

    def __init__(self, tokenizer: CountingTokenizer) -> None:
        self.tokenizer, self.requests = tokenizer, list[Request]()
        self.is_open = asyncio.Event()

    async def generate(self, request: Request) -> Generation:
        self.requests.append(request)
        await self.is_open.wait()
        return Generation("fine", (1,), "stop", Usage(1, 1, 0))

    @property
    def rows(self) -> list[int]:
        return [request.row_id.source_row for request in self.requests]


@dataclass
class Parts:
    spec: JobSpec
    tokenizer: CountingTokenizer
    engine: Gate
    feeder: Feeder

    def open_shard(self, lease: Lease, wanted: Sequence[Slot] | None = None) -> OpenShard:
        return OpenShard(lease, self.spec.sampling.n, make_result_schema(self.spec), wanted)


def make_parts(max_inflight: int = 1, **sections: Any) -> Parts:
    plain = {"prompt": {"column": "p", "chat": False}, "input": {"paths": ["x"], "length_hint": "hint"}}
    spec, tokenizer = make_job_spec(**{**plain, **sections}), CountingTokenizer()
    engine = Gate(tokenizer)
    sender = Sender(cast(Engine, engine), max_inflight, RetrySpec(), pytest.fail, pytest.fail)
    made = Feeder(spec, NO_PASSTHROUGH, Preparer(spec, tokenizer, 1000), sender, HintCheck())
    return Parts(spec, tokenizer, engine, made)


def write_leases(tmp_path: Path, table: pa.Table, borders: Sequence[int]) -> list[Lease]:
    """One file, a shard up to each border."""
    path = tmp_path / "in.parquet"
    pq.write_table(table, path, row_group_size=50)
    file = read_footer(list_inputs(str(path))[0]).file
    starts = [0, *borders[:-1]]
    return [make_lease(Shard(i, file, *pair)) for i, pair in enumerate(zip(starts, borders, strict=True))]


def make_table(hints: Sequence[float | None]) -> pa.Table:
    return pa.table({"p": [f"row {row}" for row in range(len(hints))], "hint": pa.array(hints, pa.float64())})


async def feed(parts: Parts, *shards: OpenShard, wanted: Sequence[Slot] | None = None) -> None:
    """Read all of them before anything is sent, then send until each has ended."""
    for shard in shards:
        await parts.feeder.feed(shard, wanted)
    running = asyncio.create_task(parts.feeder.run())
    parts.engine.is_open.set()
    async with asyncio.timeout(20):
        for shard in shards:
            await shard.wait_ended()
    running.cancel()


def test_the_longest_row_goes_first_over_all_open_shards(tmp_path: Path) -> None:
    hints = [(7 * row) % 40 + 1.0 for row in range(40)]
    leases = write_leases(tmp_path, make_table(hints), [10, 25, 40])

    async def main() -> list[int]:
        parts = make_parts()
        await feed(parts, *map(parts.open_shard, leases))
        assert [request.expected_tokens for request in parts.engine.requests] == sorted(hints, reverse=True)
        assert [request.ids for request in parts.engine.requests] == [
            tuple(f"row {row}".encode()) for row in parts.engine.rows
        ]
        return parts.engine.rows

    assert sorted(asyncio.run(main())) == [*range(40)]


def test_without_hints_rows_go_in_order_and_shards_as_they_were_leased(tmp_path: Path) -> None:
    leases = write_leases(tmp_path, make_table([None] * 300), [100, 300])

    async def main() -> list[int]:
        parts = make_parts(max_inflight=1000)
        await feed(parts, *map(parts.open_shard, leases))
        return parts.engine.rows

    assert asyncio.run(main()) == [*range(300)]


def test_finished_rows_are_not_tokenised_again(tmp_path: Path) -> None:
    [lease] = write_leases(tmp_path, make_table([None] * 20), [20])

    async def main() -> list[str]:
        parts = make_parts()
        shard = parts.open_shard(lease)
        shard.recover(make_rows(*(make_ok(row) for row in range(20) if row % 4)), are_copied=False)
        await feed(parts, shard)
        return parts.tokenizer.texts

    assert asyncio.run(main()) == [f"row {row}" for row in range(0, 20, 4)]


def test_only_what_is_wanted_is_sent_for_a_share(tmp_path: Path) -> None:
    [lease] = write_leases(tmp_path, make_table([float(row) for row in range(20)]), [20])
    wanted = [(3, 1), (12, 0), (12, 2), (17, 1)]

    async def main() -> list[Slot]:
        parts = make_parts(sampling={"n": 3})
        await feed(parts, parts.open_shard(lease, wanted), wanted=wanted)
        return [request.row_id.slot for request in parts.engine.requests]

    assert asyncio.run(main()) == [(17, 1), (12, 0), (12, 2), (3, 1)]


@pytest.mark.parametrize("hint", [None, 1.0])
def test_few_rows_are_tokenised_before_they_can_be_sent(tmp_path: Path, hint: float | None) -> None:
    """Prepared: in flight, ready, and one step that waits for room. The rest is Arrow, and its bound is `ReadAhead`'s."""
    [lease] = write_leases(tmp_path, make_table([hint] * 5000), [5000])

    async def main() -> tuple[int, int]:
        parts = make_parts(max_inflight=8)
        shard = parts.open_shard(lease)
        tasks = [asyncio.create_task(parts.feeder.run()), asyncio.create_task(parts.feeder.feed(shard))]
        async with asyncio.timeout(20):
            while len(parts.engine.requests) < 8 or parts.feeder._ahead.num_rows < read_ahead.MAX_ROWS_IN_ORDER:
                await asyncio.sleep(0.01)
            while hint is not None and parts.feeder._ahead.num_rows + len(parts.tokenizer.texts) < 5000:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)  # were there no bound, more would come
        for task in tasks:
            task.cancel()
        return len(parts.tokenizer.texts), parts.feeder._ahead.num_rows

    num_prepared, num_ahead = asyncio.run(main())
    assert num_prepared <= 8 + 64 + 2 * feeder.PREPARED_ROWS
    if hint is None:
        assert num_ahead < read_ahead.MAX_ROWS_IN_ORDER + feeder.STRETCH_ROWS
    else:
        assert num_ahead == 5000 - num_prepared


def test_memory_of_rows_that_were_sent_is_let_go(tmp_path: Path) -> None:
    """Whatever order they go in, and what is left can still be picked."""
    [lease] = write_leases(tmp_path, make_table([None] * 400), [400])
    shard = OpenShard(lease, 1, make_result_schema(make_job_spec()))
    page = Page(shard, 0, pa.RecordBatch.from_pydict({"p": [f"row {row}" for row in range(400)]}), range(400))
    left = [(row * 37) % 400 for row in range(400)]
    while left:
        del left[-60:]
        page.shrink(left)
        assert page.rows.num_rows < max(2 * len(left), 201) or not left
        assert not left or page.pick(left[::-7])["p"].to_pylist() == [f"row {row}" for row in left[::-7]]


def test_what_makes_a_job_unfit_ends_the_shard_with_its_reason(tmp_path: Path) -> None:
    first, second = write_leases(tmp_path, make_table([None] * 20), [10, 20])

    class Picky(CountingTokenizer):
        def encode(self, text: str) -> list[int]:
            if text == "row 3":
                raise SpecError("the model has no template")
            return super().encode(text)

    async def main() -> list[int]:
        parts = make_parts()
        parts.feeder._preparer = Preparer(parts.spec, Picky(), 1000)
        broken, whole = parts.open_shard(first), parts.open_shard(second)
        for shard in (broken, whole):
            await parts.feeder.feed(shard)
        running = asyncio.create_task(parts.feeder.run())
        parts.engine.is_open.set()
        async with asyncio.timeout(20):
            with pytest.raises(SpecError, match="the model has no template"):
                await broken.wait_ended()
            await whole.wait_ended()
        running.cancel()
        return parts.engine.rows

    assert asyncio.run(main()) == [*range(10, 20)]


@pytest.mark.parametrize("kind", [pa.string(), pa.string_view(), pa.list_(pa.string_view()), pa.binary_view()])
def test_rows_of_any_type_can_be_picked(kind: pa.DataType) -> None:
    values: dict[bool, Any] = {True: [["a"], ["b"], ["c"], None], False: ["a", "b", "c", None]}
    column = pa.array(values[pa.types.is_list(kind)], kind)
    batch = pa.RecordBatch.from_arrays([column], names=["p"])
    for places in ([3, 0, 2], [1, 2], [2], [1, 0]):
        assert pick_rows(batch, places)["p"].to_pylist() == [column[place].as_py() for place in places]
