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
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from batchgen.engines import create_engine, create_tokenizer, get_engine_kind, list_refused
from batchgen.engines.base import Engine
from batchgen.errors import EngineDied, RequestRejected
from batchgen.prepare import encode
from batchgen.records import Generation, Prompt, Request, RowId, SamplingParams
from batchgen.spec import JobSpec

PROMPTS = tuple(f"{'please ' * (number % 7)}say {number}" for number in range(64))
SHORT = SamplingParams(temperature=0.0, max_tokens=24)
LONG = SamplingParams(max_tokens=800, seed=1)
# What an engine may take to end what it was told to end.
END_S = 20.0
# An event loop that stood still for longer would miss heartbeats and look dead to the driver.
MAX_STALL_S = 1.0


@dataclass(frozen=True, slots=True)
class Subject:
    """The engine under test. `spec`: a whole job spec; only its engine, model and prompt sections are read.

    `long_sampling`: makes an answer that takes a second or more, to be cut short. `rejected`: a prompt that the engine
    refuses for good, where it has one. `read_max_inflight`: the most requests the vendor ever had at once, where that
    can be known.
    """

    spec: JobSpec
    sampling: SamplingParams = SHORT
    long_sampling: SamplingParams = LONG
    rejected: Prompt | None = None
    read_max_inflight: Callable[[], int] | None = None

    def make_request(self, number: int, engine: Engine, **sampling: Any) -> Request:
        """The request of one prompt of ours, as the worker would send it to this engine."""
        text = PROMPTS[number % len(PROMPTS)]
        form = self.spec.prompt.form
        prompt = Prompt(messages=({"role": "user", "content": text},)) if form == "messages" else Prompt(text=text)
        return self.wrap(prompt, number, engine, replace(self.sampling, **sampling))

    def wrap(self, prompt: Prompt, number: int, engine: Engine, sampling: SamplingParams) -> Request:
        row_id = RowId("contract", number, 0)
        if engine.tokenizer is None:
            return Request(row_id, None, sampling, prompt=prompt)
        return Request(row_id, encode(prompt, sampling, engine.tokenizer), sampling)


@asynccontextmanager
async def opened(subject: Subject) -> AsyncIterator[Engine]:
    engine = create_engine(subject.spec)
    await engine.open()
    try:
        yield engine
    finally:
        await engine.close()


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


async def check_answers_are_not_mixed_up(subject: Subject) -> None:
    """Prompts of several lengths are counted the same alone and together, in any order of their answers."""
    async with opened(subject) as engine:
        requests = [subject.make_request(number, engine) for number in range(7)]
        alone = [(await engine.generate(request)).usage.prompt_tokens for request in requests]
        together = await asyncio.gather(*(engine.generate(request) for request in requests))
        assert [answer.usage.prompt_tokens for answer in together] == alone, "an answer is another request's"


def check_answer(request: Request, answer: Generation) -> None:
    """What holds for every generation."""
    usage, max_tokens = answer.usage, request.sampling.max_tokens
    assert answer.finish_reason, "no finish_reason"
    assert answer.text.encode() is not None, "the text is no UTF-8"
    if usage.completion_tokens is not None:
        assert 0 <= usage.completion_tokens <= max_tokens, "completion_tokens is above max_tokens"
    if usage.prompt_tokens is not None and request.token_ids is not None:
        assert usage.prompt_tokens == len(request.token_ids), "prompt_tokens is another prompt's"
    for seconds in (answer.ttft_s, answer.queued_s):
        assert seconds is None or seconds >= 0, "a negative latency"
    assert (answer.logprobs is not None) == (request.sampling.logprobs is not None), "logprobs: given is not asked"


async def check_limits_of_length(subject: Subject) -> None:
    """max_tokens cuts, and says so."""
    async with opened(subject) as engine:
        request = subject.make_request(1, engine, max_tokens=1)
        answer = await engine.generate(request)
        check_answer(request, answer)
        assert answer.finish_reason == "length" or answer.usage.completion_tokens in (None, 0, 1), "max_tokens: 1"


async def check_stop_strings(subject: Subject) -> None:
    """A stop string ends the answer and is no part of it."""
    async with opened(subject) as engine:
        for number in range(8):
            free = (await engine.generate(subject.make_request(number, engine))).text
            mark = free[len(free) // 2 :][:2]
            if mark.strip():
                answer = await engine.generate(subject.make_request(number, engine, stop=(mark,)))
                assert mark not in answer.text, "the stop string is in the text"


async def check_capabilities_are_honest(subject: Subject) -> None:
    """What the table says the engine can do, it does; what it can't is refused before it gets there."""
    kind = subject.spec.engine.kind
    capabilities, refused = get_engine_kind(kind).capabilities, list_refused(kind)
    async with opened(subject) as engine:
        if capabilities.has_logprobs:
            requests = [subject.make_request(number, engine, logprobs=1) for number in range(8)]
            answers = [await engine.generate(request) for request in requests]
            for request, answer in zip(requests, answers, strict=True):
                check_answer(request, answer)
            given = [token.logprob for answer in answers for token in answer.logprobs or ()]
            assert given, "has_logprobs, and none were given"
            assert max(given) <= 1e-6, "a logprob above 0"
        if capabilities.is_seeded:
            hot = [subject.make_request(3, engine, seed=seed, temperature=1.0) for seed in (5, 5)]
            first, again = [await engine.generate(request) for request in hot]
            assert first.text == again.text, "is_seeded, and the same seed gave another answer"
        if capabilities.has_sampling:
            asked = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1}
            await engine.generate(subject.make_request(4, engine, temperature=1.0, **asked))
        assert ("logprobs" in refused) != capabilities.has_logprobs, "list_refused and the table disagree"


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
    engine = create_engine(subject.spec)
    await engine.close()
    engine = create_engine(subject.spec)
    await expect_death(engine, Request(RowId("contract", 0, 0), (1,), subject.sampling, prompt=Prompt(text="x")))
    await engine.open()
    request = subject.make_request(8, engine)
    await engine.generate(request)
    await engine.close()
    await engine.close()
    await expect_death(engine, request)


async def check_close_ends_what_is_in_flight(subject: Subject) -> None:
    """Nobody is left waiting, those beyond the window included."""
    engine = create_engine(subject.spec)
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
    check_a_cancelled_request_is_gone,
    check_errors_are_ours,
    check_it_never_blocks_the_loop,
    check_it_must_be_open,
    check_close_ends_what_is_in_flight,
    check_close_leaves_nothing_behind,
)
