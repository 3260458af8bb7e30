"""The part of the contract that is about what is in an answer. See `contract`."""

import asyncio
from dataclasses import replace

from batchgen.engines import get_engine_kind, list_refused, make_facts
from batchgen.engines.base import Engine
from batchgen.engines.contract_subject import Subject, check_answer, opened
from batchgen.errors import RequestRejected
from batchgen.records import Partial, Request


async def check_answers_are_not_mixed_up(subject: Subject) -> None:
    """Prompts of several lengths are answered the same alone and together, in any order of their answers. Half of the
    texts may differ, for a GPU rounds another way in another batch."""
    async with opened(subject) as engine:
        requests = [subject.make_request(number, engine) for number in range(7)]
        alone = [await engine.generate(request) for request in requests]
        together = await asyncio.gather(*(engine.generate(request) for request in requests))
        counts = [[answer.usage.prompt_tokens for answer in each] for each in (together, alone)]
        assert counts[0] == counts[1], "an answer is another request's"
        num_same = sum(one.text == other.text for one, other in zip(alone, together, strict=True))
        assert 2 * num_same >= len(requests), "an answer's text is another request's"


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
    capabilities, refused = get_engine_kind(kind).capabilities, list_refused(subject.spec.engine)
    async with opened(subject) as engine:
        if capabilities.has_logprobs:
            requests = [subject.make_request(number, engine, logprobs=1) for number in range(8)]
            answers = [await engine.generate(request) for request in requests]
            for request, answer in zip(requests, answers, strict=True):
                check_answer(request, answer)
            given = [token.logprob for answer in answers for token in answer.logprobs or ()]
            assert given, "has_logprobs, and none were given"
            assert max(given) <= 1e-6, "a logprob above 0"
        if capabilities.has_sampling:
            penalties = {"repetition_penalty": 1.1, "presence_penalty": 0.1, "frequency_penalty": 0.1}
            heeded = {name: value for name, value in (penalties | {"min_p": 0.1}).items() if name not in refused}
            await engine.generate(subject.make_request(4, engine, temperature=1.0, top_k=5, **heeded))
            greedy = [subject.make_request(number, engine, top_k=1, temperature=1.0) for number in range(8)]
            best = [subject.make_request(number, engine) for number in range(8)]
            num_same = sum(
                [await ask(engine, one) == await ask(engine, two) for one, two in zip(greedy, best, strict=True)]
            )
            assert num_same >= 4, "has_sampling, and top_k: 1 is not greedy"
        assert ("logprobs" in refused) != capabilities.has_logprobs, "list_refused and the table disagree"


async def check_seeds_decide(subject: Subject) -> None:
    """Where the engine takes seeds, the same one gives the same answer, and others give others."""
    if not get_engine_kind(subject.spec.engine.kind).capabilities.is_seeded:
        return
    async with opened(subject) as engine:
        hot = [subject.make_request(3, engine, seed=seed, temperature=5.0, top_p=1.0) for seed in (5, 5, 6, 7, 8)]
        first, again, *others = [await ask(engine, request) for request in hot]
        assert first == again, "is_seeded, and the same seed gave another answer"
        assert {first} != set(others), "is_seeded, and every seed gave the same answer"


async def check_partial_answers_go_on(subject: Subject) -> None:
    """Where the engine is resumable, half of an answer goes on as the whole one did. Half of them may differ: see above."""
    async with opened(subject) as engine:
        facts = make_facts(subject.spec.engine, engine.version)
        capabilities = get_engine_kind(subject.spec.engine.kind).capabilities
        assert capabilities.is_resumable or not facts.is_resumable, "the facts say is_resumable, and the table does not"
        if not facts.is_resumable:
            return
        assert engine.tokenizer is not None, "is_resumable, and requests have no token ids"
        num_same = num_tried = 0
        thinking = engine.tokenizer.think_end is not None  # makes answers longer
        for number in range(8):
            request = subject.make_request(number, engine, thinking=thinking)
            whole = (await engine.generate(request)).token_ids
            assert whole is not None, "is_resumable, and an answer does not name its tokens"
            half = whole[: len(whole) // 2]
            if half:
                left = replace(request.sampling, max_tokens=request.sampling.max_tokens - len(half))
                answer = await engine.generate(replace(request, sampling=left, partial=Partial(half)))
                assert answer.token_ids is not None, "is_resumable, and a continued answer does not name its tokens"
                assert len(answer.token_ids) <= left.max_tokens, "a continued answer repeats what was there before"
                num_tried += 1
                num_same += (half + answer.token_ids)[: len(whole)] == whole
        assert num_tried, "is_resumable, and no answer has two tokens"
        assert 2 * num_same >= num_tried, "is_resumable, and half an answer does not go on as the whole one did"


async def check_ranks_are_there(subject: Subject) -> None:
    """Every rank takes requests that are pinned to it, and there are no more than the facts say."""
    async with opened(subject) as engine:
        facts = make_facts(subject.spec.engine, engine.version)
        assert facts.num_ranks >= 1, "an engine without a rank"
        if not get_engine_kind(subject.spec.engine.kind).capabilities.has_ranks:
            assert facts.num_ranks == 1, "ranks, and not has_ranks"
            return
        pinned = [replace(subject.make_request(each, engine), rank=each) for each in range(facts.num_ranks)]
        for request, answer in zip(pinned, await asyncio.gather(*map(engine.generate, pinned)), strict=True):
            check_answer(request, answer)
        try:
            await engine.generate(replace(pinned[0], rank=facts.num_ranks))
        except RequestRejected:
            return
        raise AssertionError("has_ranks, and a rank that is not there took a request")


async def ask(engine: Engine, request: Request) -> str:
    return (await engine.generate(request)).text
