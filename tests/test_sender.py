"""What the sender does with an engine that has no room, over an engine that is a script."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any, cast

import pytest
from makers import make_job_spec, make_lease, make_ok, make_request, make_shard

from batchgen.engines.base import Engine
from batchgen.errors import BatchgenError, EngineUnavailable, RequestFailed
from batchgen.records import Generation, Request, Result, Usage
from batchgen.spec import RetrySpec
from batchgen.worker import sender
from batchgen.worker.open_shard import OpenShard
from batchgen.worker.sender import Sender, choose_delay_s
from batchgen.write import make_result_schema

NOW = RetrySpec(backoff_s=0.0, max_attempts=3)


class Script:
    """Raises what `answer` returns for a call's number, or answers."""

    tokenizer = None

    def __init__(self, answer: Callable[[int], BatchgenError | None]) -> None:
        self.num_calls, self._answer = 0, answer

    async def generate(self, _: Request) -> Generation:
        self.num_calls += 1
        if (error := self._answer(self.num_calls)) is not None:
            raise error
        return Generation("fine", (1,), "stop", Usage())


class Shard(OpenShard):
    """Notes what it is given."""

    def __init__(self, num_rows: int) -> None:
        super().__init__(make_lease(make_shard(row_end=num_rows)), 1, make_result_schema(make_job_spec()))
        self.results: list[Result] = []

    def add(self, result: Result) -> None:
        self.results.append(result)
        super().add(result)


def run(answer: Callable[[int], BatchgenError | None], num_rows: int = 1, retry: RetrySpec = NOW) -> tuple[Any, Any]:
    """(engine, results) once each row has its result."""
    engine, shard = Script(answer), Shard(num_rows)

    async def main() -> None:
        sending = Sender(cast(Engine, engine), 4, retry, pytest.fail, pytest.fail)
        await sending.push(shard, [make_request(row) for row in range(num_rows)])
        async with asyncio.timeout(10):
            while len(shard.results) < num_rows:
                await asyncio.sleep(0)
        await sending.close()

    asyncio.run(main())
    return engine, shard.results


def busy(_: int) -> EngineUnavailable:
    return EngineUnavailable("unavailable", "no room")


def test_refusals_cost_no_attempt() -> None:
    engine, [result] = run(lambda call: busy(call) if call <= 50 else None)
    assert result.generation is not None
    assert (engine.num_calls, result.num_attempts) == (51, 1)


def test_refusals_and_failures_are_counted_apart() -> None:
    failed = RequestFailed("engine_error", "it broke")
    engine, [result] = run(lambda call: failed if call % 3 == 0 else busy(call))
    assert (result.failure.error_type, result.num_attempts, engine.num_calls) == ("engine_error", 3, 9)


def test_a_request_that_is_refused_for_ever_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender, "MAX_REFUSALS", 20)
    engine, [result] = run(busy)
    assert (result.failure.error_type, result.failure.is_retryable) == ("unavailable", True)
    assert (engine.num_calls, result.num_attempts) == (20 + 3, 3)


def test_no_more_rows_are_read_while_many_wait() -> None:
    """A shard of any size, an engine that takes nothing: what is read ahead stays within its bound."""

    async def main() -> int:
        shard, num_pushed = Shard(10_000), 0
        sending = Sender(
            cast(Engine, Script(busy)), 4, RetrySpec(backoff_s=1000.0, max_backoff_s=1000.0), pytest.fail, pytest.fail
        )

        async def push_all() -> None:
            nonlocal num_pushed
            for row in range(10_000):
                await sending.push(shard, [make_request(row)])
                num_pushed += 1

        pushing = asyncio.create_task(push_all())
        await asyncio.sleep(0.2)
        pushing.cancel()
        await sending.close()
        return num_pushed

    assert asyncio.run(main()) <= 2 * sender.MIN_READY_ROWS + 4


class Slow:
    """Holds every request until it is let go; notes what it has and the most it ever had."""

    tokenizer = None

    def __init__(self) -> None:
        self.held: dict[int, asyncio.Future[None]] = {}
        self.sent: list[int] = []
        self.most = 0

    async def generate(self, request: Request) -> Generation:
        row = request.row_id.source_row
        self.held[row] = asyncio.get_running_loop().create_future()
        self.sent.append(row)
        self.most = max(self.most, len(self.held))
        await self.held[row]
        del self.held[row]
        return Generation("fine", (1,), "stop", Usage())

    async def let_go(self, *rows: int) -> None:
        for row in rows:
            self.held[row].set_result(None)
        for _ in range(2 * len(self.held) + 10):
            await asyncio.sleep(0)


def sending(work: Callable[[Sender, Slow, Shard], Coroutine[Any, Any, None]], max_inflight: int = 4) -> None:
    async def main() -> None:
        engine = Slow()
        made = Sender(cast(Engine, engine), max_inflight, NOW, pytest.fail, pytest.fail)
        await work(made, engine, Shard(100))
        await made.close()

    asyncio.run(main())


def test_the_window_is_full_while_rows_are_ready_and_never_more_than_full() -> None:
    async def work(made: Sender, engine: Slow, shard: Shard) -> None:
        await made.push(shard, [make_request(row) for row in range(20)])
        await engine.let_go()
        for row in range(20):
            assert len(engine.held) == made.window.num_rows == min(4, 20 - row)
            await engine.let_go(row)
        assert engine.sent == [*range(20)]
        assert engine.most == 4
        assert sorted(result.row_id.source_row for result in shard.results) == [*range(20)]
        await made.push(shard, [make_request(row) for row in range(20, 24)])
        await engine.let_go()
        assert [*engine.held] == [20, 21, 22, 23], "lanes that idled are at work again"

    sending(work)


def test_answers_that_come_at_once_keep_one_lane_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each row would wake a lane that finds nothing to send."""
    num_woken, wake = 0, Sender._wake_lane

    def count(self: Sender) -> None:
        nonlocal num_woken
        num_woken += 1
        wake(self)

    monkeypatch.setattr(Sender, "_wake_lane", count)
    shard = Shard(400)

    async def main() -> None:
        made = Sender(cast(Engine, Script(lambda _: None)), 64, NOW, pytest.fail, pytest.fail)
        for first in range(0, 400, 20):
            await made.push(shard, [make_request(row) for row in range(first, first + 20)])
            await asyncio.sleep(0)
        await shard.wait_ended()
        assert num_woken <= 3 * 20, "a few for each push, not one for each row"
        await made.close()

    asyncio.run(main())
    assert len(shard.results) == 400


def test_the_answer_to_a_large_request_makes_room_for_many_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    small = make_request(1).num_bytes
    monkeypatch.setattr(sender, "MAX_INFLIGHT_BYTES", 3 * small)
    large = replace(make_request(0), token_ids=(1,) * 9)

    async def work(made: Sender, engine: Slow, shard: Shard) -> None:
        await made.push(shard, [large, *(make_request(row) for row in range(1, 6))])
        await engine.let_go()
        assert [*engine.held] == [0]
        await engine.let_go(0)
        assert [*engine.held] == [1, 2, 3]

    sending(work)


def test_what_is_finished_or_given_away_meanwhile_is_not_sent() -> None:
    async def work(made: Sender, engine: Slow, shard: Shard) -> None:
        await made.push(shard, [make_request(row) for row in range(10)])
        await engine.let_go()
        shard.give([(5, 0)], "share")
        shard.add(make_ok(6))
        await engine.let_go(0, 1, 2, 3)
        assert [*engine.held] == [4, 7, 8, 9]

    sending(work)


def test_what_was_given_and_taken_back_is_sent_once_even_where_it_waits_twice() -> None:
    async def work(made: Sender, engine: Slow, shard: Shard) -> None:
        await made.push(shard, [make_request(row) for row in range(6)])
        await engine.let_go()
        shard.give([(4, 0), (5, 0)], "share")
        again = shard.take_back(["share"])
        await made.push(shard, [make_request(*slot) for slot in again])
        await engine.let_go(0, 1, 2, 3)
        await engine.let_go(4, 5)
        assert engine.sent == [*range(6)]

    sending(work)


def test_a_sender_that_is_stopped_waits_for_what_is_in_flight_only() -> None:
    async def work(made: Sender, engine: Slow, shard: Shard) -> None:
        await made.push(shard, [make_request(row) for row in range(6)])
        await engine.let_go(*[])
        await engine.let_go(0, 1, 2, 3)
        made.stop()
        settling = asyncio.create_task(made.settle(1000))
        await engine.let_go()
        assert not settling.done()
        await engine.let_go(4, 5)
        await settling
        assert engine.sent == [*range(6)]

    sending(work)


def test_expected_and_actual_lengths_are_told() -> None:
    told: list[tuple[float, int]] = []

    class Counting(Script):
        async def generate(self, request: Request) -> Generation:
            answer = await super().generate(request)
            counted = Usage(completion_tokens=request.row_id.source_row or None)
            return replace(answer, usage=counted)

    async def main() -> None:
        shard = Shard(3)
        made = Sender(
            cast(Engine, Counting(lambda _: None)), 4, NOW, pytest.fail, pytest.fail, lambda *pair: told.append(pair)
        )
        hinted = [replace(make_request(row), expected_tokens=hint) for row, hint in enumerate([3.0, 5.0, None])]
        await made.push(shard, hinted)
        await shard.wait_ended()
        await made.close()

    asyncio.run(main())
    assert told == [(5.0, 1)]


@pytest.mark.parametrize("num_tries", [1, 2, 6, 7, 2000])
def test_delays_have_full_jitter_under_a_bound_that_doubles(num_tries: int) -> None:
    retry = RetrySpec(backoff_s=1.0, max_backoff_s=60.0)
    delays = [choose_delay_s(retry, RequestFailed("x", "y"), num_tries) for _ in range(500)]
    bound = min(60.0, 2.0 ** min(num_tries - 1, 10))
    assert 0 <= min(delays) < 0.1 * bound
    assert 0.9 * bound < max(delays) <= bound


def test_what_the_engine_asks_for_is_honoured_with_a_little_jitter() -> None:
    delays = [choose_delay_s(RetrySpec(), RequestFailed("x", "y", retry_after_s=30.0), 6) for _ in range(500)]
    assert 30 <= min(delays) < max(delays) <= 31
    assert len(set(delays)) == 500
