"""What every engine must do, as checks that run on any: `docs/engines.md` says how to put a new engine through them.

A check takes a `Subject`, makes a fresh engine, opens it, uses it through the `Engine` protocol alone, closes it, and
raises AssertionError with a sentence where the engine breaks its contract. Each runs alone and in any order, under
pytest or `asyncio.run(check(subject))`. They need an engine that really generates, with a small `max_inflight`; no check
takes an answer's text for right or wrong.
"""

import asyncio
import pickle
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

from batchgen.engines import create_tokenizer
from batchgen.engines.base import Engine
from batchgen.engines.contract_answers import (
    check_answers_are_not_mixed_up,
    check_capabilities_are_honest,
    check_limits_of_length,
    check_partial_answers_go_on,
    check_ranks_are_there,
    check_seeds_decide,
    check_stop_strings,
)
from batchgen.engines.contract_subject import Subject, check_answer, opened
from batchgen.errors import EngineDied, RequestRejected
from batchgen.records import Generation, Prompt, Request, RowId
from batchgen.spec import JobSpec

__all__ = ["CHECKS", "Subject"]

# What an engine may take to end what it was told to end.
END_S = 20.0
# An event loop that stood still for longer would miss heartbeats and look dead to the driver.
MAX_STALL_S = 1.0


async def check_it_says_what_it_is(subject: Subject) -> None:
    """Kind, version, limits, tokenizer and counters are there, and true before the first request."""
    section = subject.spec.engine
    async with opened(subject) as engine:
        assert engine.kind == section.kind, "engine.kind is not the spec's kind"
        assert engine.version, "engine.version is empty"
        assert isinstance(engine.version, str), "engine.version is no text"
        assert engine.max_model_len is None or engine.max_model_len >= 2, "max_model_len is no length"
        assert engine.total_tokens == 0, "total_tokens is not 0 before the first request"
        has_tokenizer = engine.tokenizer is not None
        assert has_tokenizer == section.has_tokenizer, "the section's has_tokenizer is not what the engine has"
        assert (create_tokenizer(subject.spec) is not None) == has_tokenizer, "create_tokenizer and engine disagree"


async def check_what_crosses_processes_pickles(subject: Subject) -> None:
    """Specs are pickled to workers, and written to the output folder as JSON."""
    spec = subject.spec
    assert pickle.loads(pickle.dumps(spec)) == spec, "the spec changes when it is pickled"
    assert JobSpec.model_validate(spec.model_dump(mode="json")) == spec, "the spec changes as JSON"
    fields = spec.engine.fingerprint_fields()
    assert fields.get("kind") == spec.engine.kind, "fingerprint_fields leaves out the kind"


async def check_each_request_is_answered_once(subject: Subject) -> None:
    """Three windows at once: all are answered, each with its own answer, and no more go to the vendor than may."""
    window = subject.spec.engine.max_inflight
    async with opened(subject) as engine:
        requests = [subject.make_request(number, engine) for number in range(3 * window)]
        answers = await asyncio.gather(*(engine.generate(request) for request in requests))
        for request, answer in zip(requests, answers, strict=True):
            check_answer(request, answer)
        counted = [answer.usage.completion_tokens for answer in answers]
        if None not in counted:
            assert engine.total_tokens == sum(filter(None, counted)), "total_tokens is not the sum of the answers'"
    if subject.read_max_inflight is not None:
        assert subject.read_max_inflight() <= window, "more requests in flight than max_inflight"


async def check_a_cancelled_request_is_gone(subject: Subject) -> None:
    """Cancelling one of two ends it soon, and the other one is answered as if nothing had been."""
    async with opened(subject) as engine:
        long = subject.make_request(5, engine)
        doomed = asyncio.ensure_future(engine.generate(replace(long, sampling=subject.long_sampling)))
        other = asyncio.ensure_future(engine.generate(subject.make_request(6, engine)))
        await asyncio.sleep(0.05)
        doomed.cancel()
        await wait_for(asyncio.wait([doomed]), "a cancelled request did not end")
        assert doomed.cancelled() or doomed.exception() is None, "a cancelled request raised something else"
        check_answer(subject.make_request(6, engine), await other)
        window = subject.spec.engine.max_inflight
        again = [subject.make_request(number, engine) for number in range(window + 1)]
        await wait_for(asyncio.gather(*map(engine.generate, again)), "its place was not given back")


async def check_the_cancelled_is_not_worked_on(subject: Subject) -> None:
    """The vendor stops, too: a cancelled request makes fewer tokens than one that is left alone."""
    async with opened(subject) as engine:
        tried = [replace(subject.make_request(n, engine), sampling=subject.long_sampling) for n in range(6)]
        answers = await asyncio.gather(*(engine.generate(request) for request in tried))
        long = max(zip(tried, answers, strict=True), key=lambda pair: len(pair[1].text))[0]
        before, started = engine.total_tokens, time.monotonic()
        await engine.generate(long)
        seconds, whole = time.monotonic() - started, engine.total_tokens - before
        doomed = asyncio.ensure_future(engine.generate(long))
        await asyncio.sleep(min(0.05, seconds / 10))
        doomed.cancel()
        await wait_for(asyncio.wait([doomed]), "a cancelled request did not end")
        await asyncio.sleep(1.5 * seconds)
        grown = engine.total_tokens - before - whole
        assert grown < whole or not whole, "a cancelled request was generated to its end"


async def check_errors_are_ours(subject: Subject) -> None:
    """A request the engine can't take is refused for good, and costs the others nothing."""
    async with opened(subject) as engine:
        if subject.rejected is None:
            return
        bad = subject.wrap(subject.rejected, 0, engine, subject.sampling)
        good = subject.make_request(7, engine)
        refusal, answer = await asyncio.gather(engine.generate(bad), engine.generate(good), return_exceptions=True)
        assert isinstance(refusal, RequestRejected), f"a bad request raised {type(refusal).__name__}"
        assert refusal.error_type.strip(), "RequestRejected without an error_type"
        assert isinstance(answer, Generation), f"a good request beside a bad one raised {type(answer).__name__}"


async def check_it_never_blocks_the_loop(subject: Subject) -> None:
    """Heartbeats must go out while it works."""
    async with opened(subject) as engine:
        requests = [subject.make_request(number, engine) for number in range(subject.spec.engine.max_inflight)]
        work = asyncio.gather(*(engine.generate(request) for request in requests))
        longest, last = 0.0, time.monotonic()
        while not work.done():
            await asyncio.sleep(0.01)
            longest, last = max(longest, time.monotonic() - last), time.monotonic()
        await work
        assert longest < MAX_STALL_S, f"the event loop stood still for {longest:.1f} s"


async def check_it_must_be_open(subject: Subject) -> None:
    """Before `open` and after `close` every request gets EngineDied; close may come twice, and without open."""
    engine = subject.create(subject.spec)
    await engine.close()
    engine = subject.create(subject.spec)
    await expect_death(engine, Request(RowId("contract", 0, 0), (1,), subject.sampling, prompt=Prompt(text="x")))
    await engine.open()
    request = subject.make_request(8, engine)
    await engine.generate(request)
    await engine.close()
    await engine.close()
    await expect_death(engine, request)


async def check_close_ends_what_is_in_flight(subject: Subject) -> None:
    """Nobody is left waiting, those beyond the window included."""
    engine = subject.create(subject.spec)
    await engine.open()
    window = subject.spec.engine.max_inflight
    requests = [replace(subject.make_request(n, engine), sampling=subject.long_sampling) for n in range(window + 2)]
    tasks = [asyncio.ensure_future(engine.generate(request)) for request in requests]
    await asyncio.sleep(0.1)
    await engine.close()
    ended = await wait_for(asyncio.gather(*tasks, return_exceptions=True), "close left a request waiting")
    strange = [type(end).__name__ for end in ended if not isinstance(end, Generation | EngineDied)]
    assert not strange, f"close ended requests with {strange}"


async def check_close_leaves_nothing_behind(subject: Subject) -> None:
    """No task, no thread and no socket more than before."""
    async with opened(subject):  # what a vendor makes once and keeps for the process is no leak
        pass
    before = list_leftovers()
    async with opened(subject) as engine:
        requests = [subject.make_request(number, engine) for number in range(3)]
        await asyncio.gather(*(engine.generate(request) for request in requests))
    give_up_at = time.monotonic() + END_S
    while (more := list_leftovers() - before) and time.monotonic() < give_up_at:
        await asyncio.sleep(0.05)
    assert not more, f"close left behind: {sorted(more)}"


def list_leftovers() -> set[str]:
    """Tasks of this loop, threads but the loop's own pool, and this process' sockets where the system lists them."""
    tasks = {f"task {task.get_name()} {id(task)}" for task in asyncio.all_tasks()}
    threads = {f"thread {t.name} {t.ident}" for t in threading.enumerate() if not t.name.startswith("asyncio_")}
    folder = Path("/proc/self/fd")
    return tasks | threads | {f"socket {link.name}" for link in folder.glob("*") if link.is_socket()}


async def expect_death(engine: Engine, request: Request) -> None:
    try:
        await engine.generate(request)
    except EngineDied:
        return
    raise AssertionError("a closed engine answered")


async def wait_for(work: Awaitable[object], what: str) -> list[object]:
    try:
        done = await asyncio.wait_for(work, END_S)
    except TimeoutError:
        raise AssertionError(f"{what} within {END_S:g} s") from None
    return list(done) if isinstance(done, list | tuple) else []


CHECKS: tuple[Callable[[Subject], Awaitable[None]], ...] = (
    check_it_says_what_it_is,
    check_what_crosses_processes_pickles,
    check_each_request_is_answered_once,
    check_answers_are_not_mixed_up,
    check_limits_of_length,
    check_stop_strings,
    check_capabilities_are_honest,
    check_seeds_decide,
    check_partial_answers_go_on,
    check_ranks_are_there,
    check_a_cancelled_request_is_gone,
    check_the_cancelled_is_not_worked_on,
    check_errors_are_ours,
    check_it_never_blocks_the_loop,
    check_it_must_be_open,
    check_close_ends_what_is_in_flight,
    check_close_leaves_nothing_behind,
)
