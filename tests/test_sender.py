"""What the sender does with an engine that has no room, over an engine that is a script."""

import asyncio
from collections.abc import Callable
from typing import Any, cast

import pytest
from makers import make_job_spec, make_lease, make_request, make_shard

from batchgen import sender
from batchgen.engines.base import Engine
from batchgen.errors import BatchgenError, EngineUnavailable, RequestFailed
from batchgen.open_shard import OpenShard
from batchgen.records import Generation, Request, Result, Usage
from batchgen.sender import Sender, choose_delay_s
from batchgen.spec import RetrySpec
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
        sending = Sender(cast(Engine, engine), 4, retry, pytest.fail)
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
        sending = Sender(cast(Engine, Script(busy)), 4, RetrySpec(backoff_s=1000.0, max_backoff_s=1000.0), pytest.fail)

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
