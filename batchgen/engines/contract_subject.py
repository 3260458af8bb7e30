"""The engine under test, and how a check of the contract uses it. See `contract`."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from batchgen.engines import create_engine
from batchgen.engines.base import Engine
from batchgen.records import Generation, Prompt, Request, RowId, SamplingParams
from batchgen.spec import JobSpec
from batchgen.worker.prepare import encode

PROMPTS = tuple(f"{'please ' * (number % 7)}say {number}" for number in range(64))
SHORT = SamplingParams(temperature=0.0, max_tokens=24)
LONG = SamplingParams(max_tokens=800, seed=1)


@dataclass(frozen=True, slots=True)
class Subject:
    """The engine under test. `spec`: a whole job spec; only its engine, model and prompt sections are read.

    `long_sampling`: makes an answer that takes a second or more, to be cut short. `rejected`: a prompt that the engine
    refuses for good, where it has one. `read_max_inflight`: the most requests the vendor ever had at once, where that
    can be known. `create`: how the engine is made, where it takes more than its spec.
    """

    spec: JobSpec
    sampling: SamplingParams = SHORT
    long_sampling: SamplingParams = LONG
    rejected: Prompt | None = None
    read_max_inflight: Callable[[], int] | None = None
    create: Callable[[JobSpec], Engine] = create_engine

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
    engine = subject.create(subject.spec)
    await engine.open()
    try:
        yield engine
    finally:
        await engine.close()


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
