"""The engine for TensorRT-LLM: it lives in processes of its own, and this side of the socket never imports the vendor.

One supervisor brings the processes up, watches them (`trtllm.client`, `trtllm.health`), and when they die, hang or wear out
ends them to the last one, waits until the GPUs' memory is free, and starts anew. The event loop never waits for any of
it, so the worker's heartbeat goes on while the engine is stuck.

Invariants: a request that was in flight when the engine died costs its row no attempt; it is told so (EngineRestarted), and
the worker finds out which one it died of. While there is no engine, requests are refused (EngineUnavailable) with a time to
come back, so that no row waits inside the window. When `max_restarts` starts in a row finish no request, all get
EngineDied. An answer without a token is a failure, counted by `Client`: the vendor gives them when its cache is broken.
"""

import asyncio
import contextlib
import importlib.metadata
import logging
import sys
import time
from dataclasses import replace
from typing import Any

from batchgen.engines.base import Tokenizer
from batchgen.engines.trtllm.args import is_safe_version, make_facts, make_llm_kwargs, needs_safe_version
from batchgen.engines.trtllm.client import Client, End, Ticket, count_tokens, is_answer_empty, is_answer_finite
from batchgen.engines.trtllm.gpu import find_gpu_memory, list_held
from batchgen.engines.trtllm.health import Health, History
from batchgen.engines.trtllm.orphans import sweep_orphans
from batchgen.engines.trtllm.process import EngineProcess, create_process
from batchgen.engines.trtllm.tokenizer import create_trtllm_tokenizer, make_start_probes
from batchgen.engines.trtllm.wire import BEAT_S, Finished, Start, Started
from batchgen.errors import (
    BatchgenError,
    EngineDied,
    EngineRestarted,
    EngineUnavailable,
    RequestFailed,
    RequestRejected,
    SpecError,
    StorageError,
)
from batchgen.preflight.check import preflight
from batchgen.records import Generation, Request, SamplingParams, Usage
from batchgen.spec import ModelSpec
from batchgen.specs.tensorrt_llm import TensorRTLLMEngineSpec
from batchgen.staging.staging import stage_model
from batchgen.worker.stops import cut_text

log = logging.getLogger(__name__)

# An idle engine shuts down in order within this, or is killed: MPI then leaves no shared memory behind.
STOP_S = 20.0
GPU_LOOK_S = 0.25
# When to come back while the engine starts, as a share of what its last start took.
PAUSE_SHARE, MIN_PAUSE_S, MAX_PAUSE_S = 0.1, 0.1, 30.0


class TensorRTLLMEngine:
    """As the `Engine` protocol."""

    kind = "tensorrt_llm"
    tokenizer: Tokenizer | None

    def __init__(self, model: ModelSpec, section: TensorRTLLMEngineSpec) -> None:
        self.version = "unknown"
        self.tokenizer = None
        self.max_model_len: int | None = model.max_model_len
        self.total_tokens, self._start_s = 0, 0.0
        self._model, self._section = model, section
        self._num_ranks = make_facts(section, self.version).num_ranks
        self._history = History(section.max_restarts)
        self._room = asyncio.Semaphore(section.max_inflight)
        self._client: Client | None = None
        self._death: str | None = "the engine is not open"
        self._supervisor: asyncio.Task[None] | None = None

    # ---- what the worker calls ---------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Raises SpecError for what this version or machine can't do, EngineDied when it can't be started."""
        if sys.platform != "linux":
            raise SpecError("engine.kind: 'tensorrt_llm' needs Linux; run the workers there")
        await self._prepare()
        self._up: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._death = None
        self._supervisor = asyncio.create_task(self._supervise(), name="trtllm-supervisor")
        try:
            await self._up
        except BaseException:
            await self.close()
            raise

    async def _prepare(self) -> None:
        """Refuse in seconds what would fail after an hour of loading, and bring the weights to this node."""
        for check in await asyncio.to_thread(preflight, self._model, self._section):
            if check.verdict == "warn":
                log.warning("%s: %s (%s)", check.name, check.what, check.mend)
        try:
            folder = await stage_model(self._model)
        except StorageError as error:
            raise EngineDied(str(error)) from error
        self._model = self._model.model_copy(update={"path": str(folder), "revision": None, "stage_dir": None})
        self.tokenizer = await asyncio.to_thread(create_trtllm_tokenizer, self._model, self._section)

    async def generate(self, request: Request) -> Generation:
        self._check_alive()
        async with self._room:
            self._check_alive()
            client = self._client
            if client is None or not client.is_open:
                raise self._make_unavailable("engine_restarting", "the engine is being started")
            sampling = self._fit(request)
            finished = await client.ask(request.row_id, request.ids, sampling, request.rank)
        self._check_answer(finished)
        return await self._make_generation(request, finished)

    async def close(self) -> None:
        self._death = self._death or "the engine was closed"
        if self._supervisor is not None:
            self._supervisor.cancel()  # of no effect on one that has ended
            await asyncio.wait({self._supervisor})

    # ---- one request -------------------------------------------------------------------------------------------------

    def _check_alive(self) -> None:
        if self._death is not None:
            raise EngineDied(self._death)

    def _make_unavailable(self, error_type: str, message: str) -> EngineUnavailable:
        pause_s = min(MAX_PAUSE_S, max(MIN_PAUSE_S, PAUSE_SHARE * self._start_s))
        return EngineUnavailable(error_type, message, pause_s)

    def _fit(self, request: Request) -> SamplingParams:
        """The vendor would clip max_tokens without a word, and hold the thoughts to the form of the answer."""
        if request.sampling.guided is not None and request.sampling.thinking:
            told = "guided: it would hold the thoughts to the form, too; ask for thinking or for a form"
            raise RequestRejected("bad_sampling", told)
        if request.rank is not None and not 0 <= request.rank < self._num_ranks:
            raise RequestRejected("bad_rank", f"rank {request.rank} is not one of the engine's {self._num_ranks}")
        if self.max_model_len is None:
            return request.sampling
        room = self.max_model_len - len(request.ids)
        if room < 1:
            told = f"the prompt has {len(request.ids)} tokens; with one to generate, {self.max_model_len} fit"
            raise RequestRejected("prompt_too_long", told)
        return replace(request.sampling, max_tokens=min(request.sampling.max_tokens, room))

    def _check_answer(self, finished: Finished) -> None:
        if finished.finish_reason not in ("stop", "length"):
            raise RequestFailed(finished.finish_reason, "the engine ended the request before it was done")
        if is_answer_empty(finished):
            raise RequestFailed("empty_answer", "the engine answered without a single token")
        if not is_answer_finite(finished):
            raise RequestFailed("bad_logits", "the model's output was not finite")
        self._history.note_finished()

    async def _make_generation(self, request: Request, finished: Finished) -> Generation:
        assert self.tokenizer is not None, "it is there once open has returned"
        text = await asyncio.to_thread(self.tokenizer.decode, finished.token_ids)
        return Generation(
            text=cut_text(text, request.sampling.stop),
            token_ids=finished.token_ids,
            finish_reason=finished.finish_reason,
            usage=Usage(len(request.ids), count_tokens(finished), finished.cached_tokens),
            ttft_s=finished.ttft_s,
            queued_s=finished.queued_s,
            logprobs=finished.logprobs if request.sampling.logprobs is not None else None,
        )

    # ---- the processes -----------------------------------------------------------------------------------------------

    async def _supervise(self) -> None:
        reason: BatchgenError = EngineDied("the engine's supervisor broke: a bug of batchgen, see its traceback")
        try:
            reason = await self._keep_alive()
        except asyncio.CancelledError:
            reason = EngineDied("the engine was closed")
        except BatchgenError as error:
            reason = error
        finally:
            self._die(reason)

    async def _keep_alive(self) -> BatchgenError:
        """Start, serve, start anew; why that is over."""
        while True:
            end = await self._serve_once()
            if end.kind == "spec":
                return SpecError(end.reason)
            if not self._up.done():  # the first start: whoever opened us decides
                return EngineDied(end.reason)
            if not self._history.may_restart():
                told = f"{self._section.max_restarts} starts of the engine in a row finished no request"
                return EngineDied(f"{told} (engine.max_restarts); the last one: {end.reason}")
            log.warning("the engine is started anew (%s): %s", end.kind, end.reason)

    async def _serve_once(self) -> End:
        """One start of the engine, from first to last. Nothing of it is left, however this ends."""
        await asyncio.to_thread(sweep_orphans)
        await self._wait_for_gpus()
        started_at = time.monotonic()
        health = Health(self._section, started_at)
        start = self._make_start()
        process = await create_process()
        client = self._make_client(process, health, started_at)
        self._client, end = client, None
        try:
            end = await client.watch(start)
            self._settle(client, end)
            return end
        finally:
            self._client = None
            is_well = health.is_up and (end is None or end.kind == "recycled")
            is_idle = not client.tickets
            client.end_all(lambda _: EngineDied(self._death or "the engine broke"))
            await (process.stop(STOP_S) if is_well and is_idle else process.end())

    def _make_client(self, process: EngineProcess, health: Health, started_at: float) -> Client:
        assert self.tokenizer is not None, "open loads it first"

        def note_up(started: Started) -> None:
            self._start_s = time.monotonic() - started_at
            self._note_up(started)

        return Client(
            process,
            health,
            tuple(self.tokenizer.encode("1")),
            num_ranks=self._num_ranks,
            can_recycle=self._history.can_recycle,
            on_up=note_up,
            on_tokens=self._count_tokens,
        )

    def _make_start(self) -> Start:
        section = self._section
        return Start(
            self._make_kwargs(),
            has_perf_metrics=section.perf_metrics,
            probes=make_start_probes(section),
            # A hang shows in beats that tell of no new token: several must fit into the time that it is given.
            beat_s=min(BEAT_S, section.no_progress_s / 4),
        )

    def _make_kwargs(self) -> dict[str, Any]:
        """The version is that of the package's metadata: to import it here is what this file is written to avoid."""
        version = None
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version("tensorrt_llm")
        return make_llm_kwargs(self._model, self._section, version)

    def _note_up(self, started: Started) -> None:
        self.version = started.version
        if needs_safe_version(self._section) and not is_safe_version(started.version):
            log.warning("TensorRT-LLM %s corrupts its cache with block reuse and chunked prefill", started.version)
        if not (tools := started.facts.get("tool_probes", "0")).isdigit():
            log.warning("%s: prompts that hold calls of tools may not be as the engine's own would be", tools)
        limits = [limit for limit in (self._model.max_model_len, started.max_model_len) if limit is not None]
        self.max_model_len = min(limits, default=None)
        facts = ", ".join(f"{name}: {value}" for name, value in sorted(started.facts.items()))
        log.info("TensorRT-LLM %s is up after %.0f s (%s)", started.version, self._start_s, facts)
        if not self._up.done():
            self._up.set_result(None)

    def _count_tokens(self, num_tokens: int) -> None:
        self.total_tokens += num_tokens

    async def _wait_for_gpus(self) -> None:
        """Raises EngineDied when their memory is not free in time."""
        gpus = await asyncio.to_thread(find_gpu_memory)
        if gpus is None:
            return
        limit_s = self._section.gpu_free_timeout_s
        give_up_at = time.monotonic() + limit_s
        while held := list_held(await asyncio.to_thread(gpus.read_used_bytes)):
            if time.monotonic() > give_up_at:
                told = (
                    f"the GPUs' memory is not free after {limit_s:g} s (engine.gpu_free_timeout_s): {'; '.join(held)}"
                )
                raise EngineDied(f"{told}; end what holds it (nvidia-smi names it)")
            await asyncio.sleep(GPU_LOOK_S)

    # ---- its ends ----------------------------------------------------------------------------------------------------

    def _settle(self, client: Client, end: End) -> None:
        """What was in flight learns what to do."""
        if client.recycle is not None:
            self._history.note_recycle(client.recycle)
        has_died = end.kind == "died"

        def choose(_: Ticket) -> BatchgenError:
            message = f"the engine is being started: it {end.kind}"
            refused = self._make_unavailable("engine_restarting", message)
            return EngineRestarted(*refused.args) if has_died else refused

        client.end_all(choose)

    def _die(self, reason: BatchgenError) -> None:
        self._death = self._death or str(reason)
        if not self._up.done():
            self._up.set_exception(reason)
            self._up.exception()  # marks it retrieved: nobody may be waiting any more
