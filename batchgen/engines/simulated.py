"""An engine without a model: continuous batching in real time, seeded lengths, faults on request, every call recorded.

A request waits for a slot (of its rank, where it names one), is prefilled (prefills share one rate) and decodes at its
slot's own rate. Length and text follow from the prompt, the seed and the sample alone, so a rerun repeats them and a
partial answer goes on as it would have; or each answer is as long as its request allows, so that lengths measured elsewhere
come in as a column of per-row sampling. `call_log` gets one line a call, written with O_APPEND in one piece, so that a test
can count what was generated again even after SIGKILL; and one for each answer that took time, with when it got its slot and
when it was done, so that it can be seen how busy the slots were. This is product, not test scaffolding: users test their
own jobs with it.
"""

import asyncio
import contextlib
import hashlib
import json
import math
import os
import random
import signal
import sys
import time
from array import array
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

from batchgen import __version__
from batchgen.engines.base import Tokenizer
from batchgen.engines.byte_tokenizer import ByteTokenizer as ByteTokenizer
from batchgen.errors import BatchgenError, EngineDied, EngineRestarted, RequestFailed, RequestRejected
from batchgen.records import Generation, Request, RowId, Usage
from batchgen.specs.engine import SimulatedEngineSpec

WORDS = ("amber", "brook", "cedar", "delta", "ember", "fjord", "grove", "heath", "inlet", "jetty", "knoll", "larch")
WORD_OF = [WORDS[byte % len(WORDS)].encode() + b" " for byte in range(256)]
PAGE_WORDS = 32
LOW_BYTE = 0 if sys.byteorder == "little" else 7
# How often an answer under way shows in `total_tokens`.
MAX_STEPS = 20
MIN_STEP_S = 0.05


class SimulatedEngine:
    """See the module. `max_model_len`: another limit (the model's), obeyed where it is smaller than the engine's own.
    `kill` makes it die as a real one would: everything in flight and all later calls fail."""

    kind = "simulated"
    version = __version__

    def __init__(self, spec: SimulatedEngineSpec, *, max_model_len: int | None = None) -> None:
        self._spec = spec
        self.tokenizer: Tokenizer = ByteTokenizer()
        self.max_model_len = min(spec.max_model_len, max_model_len or spec.max_model_len)
        self.total_tokens = 0
        self._log_fds: dict[str, int] = {}
        self._death: asyncio.Future[Generation] | None = None
        self._decoding: dict[RowId, tuple[Request, float]] = {}

    async def open(self) -> None:
        await asyncio.sleep(self._spec.startup_s)
        shares = [(self._spec.slots + rank) // self._spec.ranks for rank in range(self._spec.ranks)]
        self._slots = [asyncio.Semaphore(max(1, share)) for share in shares]
        self._num_rows = [0] * self._spec.ranks
        self._prefilled_at = 0.0
        self._death = asyncio.get_running_loop().create_future()
        if self._spec.call_log is not None:
            folder = Path(self._spec.call_log)
            folder.mkdir(parents=True, exist_ok=True)
            paths = {kind: folder / f"{kind}-{os.getpid()}.jsonl" for kind in ("calls", "answers")}
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            self._log_fds = {kind: os.open(path, flags, 0o644) for kind, path in paths.items()}

    def kill(self, reason: str) -> None:
        self._end_all(EngineDied(reason))

    def _end_all(self, error: BatchgenError) -> None:
        if self._death is not None and not self._death.done():
            self._death.set_exception(error)
            self._death.exception()  # marks it retrieved: nobody may be waiting just now

    async def generate(self, request: Request) -> Generation:
        return await self.generate_streaming(request, None)

    async def generate_streaming(
        self, request: Request, on_tokens: Callable[[Sequence[int]], None] | None
    ) -> Generation:
        death = self._death
        if death is None:
            raise EngineDied("the simulated engine is not open")
        if death.done():
            death.result()
        self._log(request, "calls", round(time.time(), 3))
        self._check(request)
        if not self._spec.has_latency:
            await self._fault(request)
            return death.result() if death.done() else self._answer(request, queued_s=0.0, ttft_s=0.0)
        work = asyncio.ensure_future(self._work(request, on_tokens or ignore))
        try:
            waited: list[asyncio.Future[Any]] = [work, death]
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        finally:
            work.cancel()  # of no effect on one that has ended
        return death.result() if death.done() else work.result()

    def peek(self, row_id: RowId) -> Generation | None:
        """What a slot's rate has made of it by now."""
        if (found := self._decoding.get(row_id)) is None:
            return None
        request, first_at = found
        num_made = int((time.monotonic() - first_at) * self._spec.decode_tokens_per_s)
        num_tokens = min(num_made, self._choose_length(request)[0] - 1)
        written = self._write(request, num_tokens)
        if num_tokens < 1 or any(mark in written.decode() for mark in request.sampling.stop):
            return None
        usage = Usage(len(request.ids), num_tokens, 0)
        return Generation(written.decode(), tuple(written), "length", usage, ttft_s=0.0, queued_s=0.0)

    async def close(self) -> None:
        self.kill("the engine was closed")
        for log_fd in self._log_fds.values():
            os.close(log_fd)
        self._log_fds = {}

    async def _work(self, request: Request, on_tokens: Callable[[Sequence[int]], None]) -> Generation:
        ranks = range(self._spec.ranks)
        rank = min(ranks, key=self._num_rows.__getitem__) if request.rank is None else request.rank
        self._num_rows[rank] += 1
        try:
            return await self._work_on(rank, request, on_tokens)
        finally:
            self._num_rows[rank] -= 1

    async def _work_on(self, rank: int, request: Request, on_tokens: Callable[[Sequence[int]], None]) -> Generation:
        started = time.monotonic()
        async with self._hold_slot(rank, is_urgent=request.is_urgent):
            began = time.monotonic()
            self._prefilled_at = max(began, self._prefilled_at) + len(request.ids) / self._spec.prefill_tokens_per_s
            first_at = self._prefilled_at
            await sleep_until(first_at)
            await self._fault(request)
            answer = self._answer(request, queued_s=began - started, ttft_s=first_at - started)
            self._decoding[request.row_id] = request, first_at
            try:
                await self._decode(self._choose_length(request)[0], first_at, answer.token_ids or (), on_tokens)
            finally:
                self._decoding.pop(request.row_id, None)
        self._log(request, "answers", round(time.time() - (time.monotonic() - began), 4), round(time.time(), 4))
        return answer

    @contextlib.asynccontextmanager
    async def _hold_slot(self, rank: int, *, is_urgent: bool) -> AsyncIterator[None]:
        """An urgent request waits for no slot: as in a real engine, where somebody else would make room."""
        if is_urgent:
            yield
            return
        async with self._slots[rank]:
            yield

    async def _decode(
        self, num_tokens: int, started: float, shown: Sequence[int], on_tokens: Callable[[Sequence[int]], None]
    ) -> None:
        """Until all are made. Each step ends when it is due since the start: what a busy loop adds to one, the next is
        shorter by."""
        duration_s = num_tokens / self._spec.decode_tokens_per_s
        num_steps = max(1, min(MAX_STEPS, int(duration_s / MIN_STEP_S)))
        for step in range(1, num_steps + 1):
            await sleep_until(started + duration_s * step / num_steps)
            before, now = num_tokens * (step - 1) // num_steps, num_tokens * step // num_steps
            self.total_tokens += now - before
            on_tokens(shown[before:now])

    async def _fault(self, request: Request) -> None:
        """Hang or die where the request says so."""
        if _holds(request, self._spec.hang_text):
            await asyncio.Event().wait()
        if not _holds(request, self._spec.die_text):
            return
        told = "the simulated engine died on purpose (engine.die_text)"
        if self._spec.death == "process":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self._spec.death == "restart":
            self._end_all(EngineRestarted("engine_restarted", told))
            self._death = asyncio.get_running_loop().create_future()
        else:
            self.kill(told)

    def _check(self, request: Request) -> None:
        if request.rank is not None and not 0 <= request.rank < self._spec.ranks:
            raise RequestRejected("bad_rank", f"rank {request.rank} is not one of {self._spec.ranks} (engine.ranks)")
        if _holds(request, self._spec.reject_text):
            raise RequestRejected("rejected", "the simulated engine refuses this prompt (engine.reject_text)")
        rate = self._spec.failure_rate
        if rate and request.attempt == 1 and self._random(request, "failure").random() < rate:
            raise RequestFailed("engine_error", "the simulated engine failed on purpose (engine.failure_rate)")

    def _random(self, request: Request, purpose: str) -> random.Random:
        """The same prompt, seed and sample always draw the same numbers, whatever else runs."""
        return random.Random(draw_bytes(request, purpose, 8))

    def _choose_length(self, request: Request) -> tuple[int, bool]:
        """(tokens to generate now, is the answer cut off then)."""
        max_tokens = request.sampling.max_tokens
        if self._spec.length == "max_tokens":
            return max_tokens, False
        sigma = self._spec.sigma
        draw = self._random(request, "length").lognormvariate(0.0, sigma) if sigma else 1.0
        whole = round(self._spec.mean_tokens * draw / math.exp(sigma * sigma / 2))
        left = max(1, whole - count_done(request))
        return min(left, max_tokens), left > max_tokens

    def _write(self, request: Request, num_tokens: int) -> bytes:
        """So many bytes, which are tokens, after those that are there already."""
        done = count_done(request)
        written, page = b"considering</think>" if request.sampling.thinking else b"", 0
        while len(written) < done + num_tokens:
            # A byte a word: a generator of random numbers takes longer to set up than all else of a short answer.
            written += b"".join(map(WORD_OF.__getitem__, draw_bytes(request, f"text {page}", PAGE_WORDS)))
            page += 1
        return written[done : done + num_tokens]

    def _answer(self, request: Request, *, queued_s: float, ttft_s: float) -> Generation:
        num_tokens, is_cut = self._choose_length(request)
        if not self._spec.has_latency:
            self.total_tokens += num_tokens
        written = self._write(request, num_tokens)
        text = written.decode()
        places = [text.find(mark) for mark in request.sampling.stop if mark in text]
        ends = [text.find(mark) + len(mark) for mark in request.sampling.stop if mark in text]
        num_tokens = min(ends, default=num_tokens)
        return Generation(
            text=text[: min(places, default=len(text))],
            token_ids=tuple(written[:num_tokens]),
            finish_reason="length" if is_cut and not places else "stop",
            usage=Usage(prompt_tokens=len(request.ids), completion_tokens=num_tokens, cached_tokens=0),
            queued_s=queued_s,
            ttft_s=ttft_s,
        )

    def _log(self, request: Request, kind: str, *times: float) -> None:
        if not self._log_fds:
            return
        row = request.row_id
        fields = [row.source_file, row.source_row, row.sample_index, request.attempt, *times]
        os.write(self._log_fds[kind], (json.dumps(fields) + "\n").encode())


def ignore(_: Sequence[int]) -> None:
    """Nobody watches."""


async def sleep_until(at: float) -> None:
    """On the monotonic clock."""
    await asyncio.sleep(max(0.0, at - time.monotonic()))


def count_done(request: Request) -> int:
    return 0 if request.partial is None else len(request.partial.token_ids)


def _holds(request: Request, text: str | None) -> bool:
    return text is not None and text.encode() in take_low_bytes(request.ids)


def draw_bytes(request: Request, purpose: str, num_bytes: int) -> bytes:
    """64 at most; the same for the same prompt, seed and sample."""
    row = request.row_id
    text = f"{purpose}\0{request.sampling.seed}\0{row.source_file}\0{row.source_row}\0{row.sample_index}"
    digest = hashlib.blake2b(text.encode(), digest_size=num_bytes)
    digest.update(take_low_bytes(request.token_ids or ()))
    return digest.digest()


def take_low_bytes(token_ids: Sequence[int]) -> bytes:
    """Of each id; a third of the time that Python takes to look at each."""
    return array("q", token_ids).tobytes()[LOW_BYTE::8]


def read_calls(call_log: str) -> list[tuple[str, int, int, int]]:
    """(source_file, source_row, sample_index, attempt) of every call recorded by all processes, in file order."""
    calls = []
    for path in sorted(Path(call_log).glob("calls-*.jsonl")):
        for line in path.read_text().splitlines():
            fields = json.loads(line)
            calls.append((fields[0], fields[1], fields[2], fields[3]))
    return calls


def read_spans(call_log: str) -> list[tuple[float, float]]:
    """(when it got its slot, when it was done) of every answer of all processes, seconds since the epoch."""
    paths = sorted(Path(call_log).glob("answers-*.jsonl"))
    answers = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    return [(answer[4], answer[5]) for answer in answers]
