"""What `generate_async` returns, and how responses become it: stop sequences cut by token ids, stop strings by a scan of
the text that leaves the token ids as they are."""

import asyncio
import os
import queue
import time
from dataclasses import dataclass, field
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, Literal

from tensorrt_llm.executor.utils import RequestError

REASONS = {"end_id": "stop", "stop_words": "stop", "length": "length", "cancelled": "cancelled", "timeout": "timeout"}


@dataclass(slots=True)
class Logprob:
    """Of one token at one place."""

    logprob: float
    rank: int | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One sequence."""

    index: int
    text: str = ""
    token_ids: list[int] | None = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[Any] | None = field(default_factory=list)
    prompt_logprobs: list[Any] | None = field(default_factory=list)
    finish_reason: Literal["stop", "length", "timeout", "cancelled"] | None = None
    stop_reason: int | str | None = None
    generation_logits: Any = None
    additional_context_outputs: Any = None
    additional_generation_outputs: Any = None
    disaggregated_params: Any = None
    request_perf_metrics: Any = None
    _last_text_len: int = field(default=0, init=False, repr=False)
    _last_token_ids_len: int = field(default=0, init=False, repr=False)
    _last_logprobs_len: int = field(default=0, init=False, repr=False)

    @property
    def length(self) -> int:
        return len(self.token_ids)

    @property
    def text_diff(self) -> str:
        return self.text[self._last_text_len :]

    @property
    def token_ids_diff(self) -> list[int]:
        return self.token_ids[self._last_token_ids_len :]

    @property
    def logprobs_diff(self) -> list[Any]:
        return self.logprobs[self._last_logprobs_len :]


class RequestOutput:
    """Awaitable and async-iterable only if an event loop ran when it was made. `result` ignores its timeout."""

    def __init__(self, llm: Any, request_id: int, prompt: str | None, token_ids: list[int], sampling: Any) -> None:
        self._llm, self._sampling = llm, sampling
        self.request_id, self.prompt, self.prompt_token_ids = request_id, prompt, token_ids
        self.outputs = [CompletionOutput(0)]
        self.finished = self._aborted = False
        self.context_logits = self.mm_embedding_handle = self.disaggregated_params = None
        self.cached_tokens = 0
        self.decoding_iter = 0
        self.avg_decoded_tokens_per_iter: float | None = None
        self.metrics_dict: dict[Any, Any] = {}
        self._arrived_at = time.monotonic()
        self.queue: queue.Queue[dict[str, Any]] = queue.Queue()
        try:
            self._loop: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
        except RuntimeError:
            self._loop = None
        self.aqueue: asyncio.Queue[dict[str, Any]] | None = asyncio.Queue() if self._loop else None

    def abort(self) -> None:
        self._llm._abort(self.request_id)
        self._aborted = True

    def aborted(self) -> bool:
        return self._aborted

    def result(self, timeout: float | None = None) -> "RequestOutput":
        del timeout  # as the real one does
        while not self.finished:
            self._handle(self.queue.get())
        return self

    async def aresult(self) -> "RequestOutput":
        while not self.finished:
            await self._aresult_step()
        return self

    def __await__(self) -> Any:
        return self.aresult().__await__()

    def __aiter__(self) -> "RequestOutput":
        return self

    async def __anext__(self) -> "RequestOutput":
        if self.finished:
            raise StopAsyncIteration
        await self._aresult_step()
        return self

    async def _aresult_step(self) -> None:
        assert self.aqueue is not None, (
            "The asyncio event loop was not present during initialization, so async operations are not available."
        )
        self._handle(await self.aqueue.get())

    def _put(self, event: dict[str, Any]) -> None:
        if self._loop is None or self.aqueue is None:
            self.queue.put(event)
        elif not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.aqueue.put_nowait, event)

    def _handle(self, event: dict[str, Any]) -> None:
        if "error" in event:
            raise RequestError(event["error"])
        output = self.outputs[0]
        output._last_token_ids_len = len(output.token_ids)
        output._last_logprobs_len = len(output.logprobs)
        output.token_ids.extend(event["tokens"])
        output.logprobs += [to_logprobs(pairs) for pairs in event.get("logprobs", [])]
        self.cached_tokens = event.get("cached_tokens", 0)
        self.decoding_iter = len(output.token_ids)
        self.finished = event["reason"] is not None
        if self.finished:
            output.finish_reason = REASONS[event["reason"]]
            self._end(output, event)
        self._detokenize(output)

    def _end(self, output: CompletionOutput, event: dict[str, Any]) -> None:
        if event["reason"] == "stop_words":
            for reason, ids in self._sampling._get_stop_reasons_and_words():
                if output.token_ids[-len(ids) :] == ids:
                    output.stop_reason = reason
                    if not self._sampling.include_stop_str_in_output:
                        output.token_ids = output.token_ids[: -len(ids)]
                    break
        if self._sampling.return_perf_metrics:
            output.request_perf_metrics = make_perf_metrics(self._arrived_at, event)

    def _detokenize(self, output: CompletionOutput) -> None:
        if not self._sampling.detokenize or self._llm.tokenizer is None:
            return
        output._last_text_len = len(output.text)
        output.text = self._llm.tokenizer.decode(
            output.token_ids, skip_special_tokens=self._sampling.skip_special_tokens
        )
        if os.environ.get("STAND_IN_OLD") == "1" or output.finish_reason not in (None, "stop", "length"):
            return
        for reason, _ in self._sampling._get_stop_reasons_and_words():
            if isinstance(reason, str) and reason in output.text:
                end = output.text.find(reason)
                output.text = output.text[: end + len(reason) * self._sampling.include_stop_str_in_output]
                output.finish_reason, output.stop_reason = "stop", reason
                self.abort()
                self.finished = True
                return


def to_logprobs(pairs: list[list[float]]) -> dict[int, Logprob]:
    return {int(token): Logprob(logprob, rank + 1) for rank, (token, logprob) in enumerate(pairs)}


def make_perf_metrics(arrived_at: float, event: dict[str, Any]) -> Any:
    first_at = event.get("first_at") or time.monotonic()
    times = {
        "arrival_time": arrived_at,
        "first_scheduled_time": event.get("scheduled_at") or first_at,
        "first_token_time": first_at,
        "last_token_time": time.monotonic(),
    }
    timing = SimpleNamespace(**{name: timedelta(seconds=value) for name, value in times.items()})
    return SimpleNamespace(timing_metrics=timing, first_iter=0, iter=None, last_iter=0)
