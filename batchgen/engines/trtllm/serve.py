"""The engine process's requests: each `Submit` ends as one `Finished` or `Failed`. Lives on one event loop; the counters
may be read by any thread.

It knows nothing of the socket, of start-up or of the process: it is given an engine and a way to send.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Any

from batchgen.engines.trtllm import vendor as tensorrt
from batchgen.engines.trtllm.errors import judge_answer, judge_submit
from batchgen.engines.trtllm.probe import read_limit, read_vocab_size
from batchgen.engines.trtllm.sampling import drop_end, make_logprobs
from batchgen.engines.trtllm.vendor import Vendor
from batchgen.engines.trtllm.wire import Abort, Failed, Finished, FromEngine, Submit
from batchgen.records import SamplingParams
from batchgen.worker.stops import cut_at_stop, find_stop

FINISHED = {"stop", "length"}
CANARY_TEXT = "1"


class Server:
    """`total_tokens` ever generated, `num_inflight` now."""

    def __init__(self, vendor: Vendor, llm: Any, send: Callable[[FromEngine], None], *, has_perf_metrics: bool) -> None:
        self._vendor, self._llm, self._send = vendor, llm, send
        self._has_perf_metrics = has_perf_metrics
        self._results: dict[int, Any] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._max_seq_len = read_limit(llm, "max_seq_len")
        self.total_tokens = 0

    @property
    def num_inflight(self) -> int:
        return len(self._results)

    @property
    def is_healthy(self) -> bool:
        """The vendor's word: it means that the executor was not shut down, and nothing more."""
        check = getattr(self._llm, "_check_health", None)
        try:
            return True if check is None else bool(check())
        # A private method of theirs: one that raises is not a sign of health, and must not end the beats.
        except Exception:  # noqa: BLE001
            return False

    def submit(self, message: Submit) -> None:
        """On the event loop. Whatever the vendor raises becomes a `Failed`."""
        try:
            result = self._submit(message)
        # The vendor lets a background error of any class out of a submit.
        except Exception as error:  # noqa: BLE001
            verdict = judge_submit(error, self._vendor.request_error, is_healthy=self.is_healthy)
            self._send(verdict.make_failed(message.number))
            return
        self._results[message.number] = result
        task = asyncio.get_running_loop().create_task(self._serve(message, result))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def abort(self, message: Abort) -> None:
        """The end comes from the vendor, as a request that was cancelled. A no-op for one that has ended."""
        result = self._results.get(message.number)
        if result is not None:
            result.abort()

    async def call_canary(self) -> bool:
        """One short answer before any of the job's: an engine that can't give it is not up. Returns whether it came with
        timings. Raises what the vendor does."""
        token_ids = tuple(self._llm.tokenizer.encode(CANARY_TEXT, add_special_tokens=True))
        result = self._submit(Submit(0, token_ids, SamplingParams(temperature=0.0, top_p=1.0, max_tokens=2)))
        await result.aresult()
        return get_timing(result.outputs[0]) is not None

    def _submit(self, message: Submit) -> Any:
        return tensorrt.submit(self._vendor, self._llm, message, has_perf_metrics=self._has_perf_metrics)

    async def _serve(self, message: Submit, result: Any) -> None:
        answer: Finished | Failed
        try:
            answer = await self._wait(message, result)
        # As above: a rank's error, of any class, surfaces in whoever reads a response next.
        except Exception as error:  # noqa: BLE001
            verdict = judge_answer(
                error,
                self._vendor.request_error,
                is_healthy=self.is_healthy,
                can_never_fit=self._can_never_fit(message),
            )
            answer = verdict.make_failed(message.number)
        del self._results[message.number]
        self._send(answer)

    async def _wait(self, message: Submit, result: Any) -> Finished | Failed:
        started_at = time.monotonic()
        ttft_s = None
        num_tokens = num_chars = 0
        output = result.outputs[0]
        async for _ in result:
            output = result.outputs[0]
            self.total_tokens += max(0, len(output.token_ids) - num_tokens)
            num_tokens = max(num_tokens, len(output.token_ids))
            ttft_s = time.monotonic() - started_at if ttft_s is None and num_tokens else ttft_s
            if message.sampling.stop and output.finish_reason is None:
                # Versions that don't scan the text themselves would go on to max_tokens.
                start = max(0, num_chars - max(map(len, message.sampling.stop)))
                if find_stop(output.text, message.sampling.stop, start) is not None:
                    result.abort()
                    return self._make_finished(message, result, ttft_s, finish_reason="stop")
                num_chars = len(output.text)
        if output.finish_reason not in FINISHED:
            reason = output.finish_reason or "no_reason"
            return Failed(message.number, "retry", reason, f"the engine ended the request as {reason}")
        return self._make_finished(message, result, ttft_s, finish_reason=output.finish_reason)

    def _make_finished(self, message: Submit, result: Any, ttft_s: float | None, *, finish_reason: str) -> Finished:
        output, sampling = result.outputs[0], message.sampling
        token_ids: Any = list(output.token_ids)
        stop_reason = output.stop_reason
        if sampling.stop:
            text = tensorrt.decode(self._llm, token_ids)
            found = find_stop(text, sampling.stop)
            if found is not None:
                finish_reason, stop_reason = "stop", found
                token_ids = cut_at_stop(token_ids, sampling.stop, lambda ids: tensorrt.decode(self._llm, ids))
        if finish_reason == "stop" and stop_reason is None:
            token_ids = drop_end(token_ids, frozenset({self._end_id} - {None}))
        queued_s, first_s = read_times(output)
        return Finished(
            number=message.number,
            token_ids=tuple(token_ids),
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            cached_tokens=result.cached_tokens,
            queued_s=queued_s,
            ttft_s=ttft_s if first_s is None else first_s,
            logprobs=make_logprobs(token_ids, output.logprobs, sampling.logprobs),
            num_tokens=len(output.token_ids),
        )

    @property
    def _end_id(self) -> Any:
        return getattr(self._llm.tokenizer, "eos_token_id", None)

    def _can_never_fit(self, message: Submit) -> bool:
        """Only asked of a request that failed: the vendor's limits are its own, and ours to explain with."""
        is_long = self._max_seq_len is not None and len(message.token_ids) >= self._max_seq_len
        vocab_size = read_vocab_size(self._llm)
        return is_long or any(each < 0 or (vocab_size or each + 1) <= each for each in message.token_ids)


def get_timing(output: Any) -> Any:
    return getattr(getattr(output, "request_perf_metrics", None), "timing_metrics", None)


def read_times(output: Any) -> tuple[float | None, float | None]:
    """(queued_s, ttft_s) from the vendor's timings, which are time spans on its own clock; None where it gave none."""
    timing = get_timing(output)
    if timing is None:
        return None, None
    queued_s = (timing.first_scheduled_time - timing.arrival_time).total_seconds()
    return queued_s, (timing.first_token_time - timing.arrival_time).total_seconds()
