"""The engine for any Hugging Face causal LM on this machine: a laptop's CPU, or one GPU.

One thread owns the model. It takes waiting requests in between steps, decodes them together (see `decode`), urgent ones
before all others (see `lanes`), and answers each through the event loop it came from. Torch and transformers are imported
by `open`.

Invariants: every request is answered once, or its caller is gone; when the thread ends, for whatever reason, all in
flight get EngineDied and so does every later call. Tokens count as OpenAI counts them: `completion_tokens` includes the
end-of-text token, `token_ids` does not.
"""

import asyncio
import importlib.util
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from batchgen.engines.base import Tokenizer
from batchgen.engines.hf_model import find_cache_bytes, find_max_model_len, list_eos_ids, load_model
from batchgen.engines.hf_tokenizer import HFTokenizer
from batchgen.engines.lanes import Lanes
from batchgen.engines.replies import HeldAnswers, Job, answer, make_answer, tell
from batchgen.errors import EngineDied, RequestRejected, SpecError
from batchgen.records import Generation, Request, RowId, Usage
from batchgen.spec import ModelSpec
from batchgen.specs.engine import TransformersEngineSpec

if TYPE_CHECKING:
    from batchgen.engines.decode import DecodeBatch
    from batchgen.engines.sampling import Row
    from batchgen.worker.stops import Decode

log = logging.getLogger(__name__)
# Ray's workers have 15, and 19 is the most.
NICE = 4
# With so many beside its own, whatever carries requests (a proxy, an ingress, a controller) never waits for the model.
SPARE_CORES = 3


class TransformersEngine:
    """As the `Engine` protocol. `tokenizer` and `max_model_len` are there once `open` has returned."""

    kind = "transformers"
    tokenizer: Tokenizer
    max_model_len: int

    def __init__(self, model: ModelSpec, engine: TransformersEngineSpec) -> None:
        self.version = version("transformers")
        self.total_tokens = 0
        self._model_spec = model
        self._spec = engine
        self._inbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._jobs: dict[Row, Job] = {}
        self._lock = threading.Lock()  # over _jobs and _death: nothing comes in after the last answer went out
        self._death: str | None = "it was not opened"
        self._thread: threading.Thread | None = None
        self._loading: asyncio.Future[None] | None = None
        self._lanes: Lanes | None = None
        self._held = HeldAnswers()  # it and `_is_yielding` are the thread's
        self._is_yielding = False
        self._can_rest = False
        self._rest_until = 0.0

    async def open(self) -> None:
        """Raises SpecError for a model or a device that can't be had here, EngineDied when loading fails."""
        if importlib.util.find_spec("torch") is None:
            raise SpecError("engine.kind: 'transformers' needs torch: pip install 'batchgen[local]'")
        # To load is not to be stopped half way: `close` waits for it, or the weights would stay.
        self._loading = asyncio.ensure_future(asyncio.to_thread(self._load))
        await asyncio.shield(self._loading)
        assert self._lanes is not None, "loading made them"
        self._death = None
        self._thread = threading.Thread(target=self._run, args=(self._lanes,), name="batchgen-decode", daemon=True)
        self._thread.start()

    async def generate(self, request: Request) -> Generation:
        return await self.generate_streaming(request, None)

    async def generate_streaming(
        self, request: Request, on_tokens: Callable[[Sequence[int]], None] | None
    ) -> Generation:
        self._check_alive()
        job = self._make_job(request)
        job.on_tokens = on_tokens
        with self._lock:
            self._check_alive()
            self._jobs[job.row] = job
        self._inbox.put(job)
        try:
            return await job.future
        finally:
            job.row.is_cancelled = True  # of no effect on a row that has ended
            with self._lock:
                self._jobs.pop(job.row, None)

    def peek(self, row_id: RowId) -> Generation | None:
        with self._lock:
            job = next((job for job in self._jobs.values() if job.request.row_id == row_id), None)
        if job is None or not job.first_token_at:  # its first token may be there, but not yet the time of it
            return None
        row = job.row
        num_tokens = len(row.out) if row.sampling.logprobs is None else min(len(row.out), len(row.logprobs))
        token_ids = tuple(row.out[:num_tokens])
        # The decode thread goes on meanwhile, and writes down a token before it sees that it was the last.
        if not token_ids or token_ids[-1] in row.end_ids or row.is_done:
            return None
        return Generation(
            text=row.text,
            token_ids=token_ids,
            finish_reason="length",
            usage=Usage(len(row.token_ids), num_tokens, 0),
            ttft_s=job.first_token_at - job.arrived_at,
            queued_s=job.admitted_at - job.arrived_at,
            logprobs=tuple(row.logprobs[:num_tokens]) if row.sampling.logprobs is not None else None,
        )

    async def close(self) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            self._inbox.put(None)
            await asyncio.to_thread(thread.join)
        if self._loading is not None:
            await asyncio.wait({self._loading})
        self._lanes = None  # the weights and the cache

    # ---- on the event loop -------------------------------------------------------------------------------------------

    def _check_alive(self) -> None:
        if self._death is not None:
            raise EngineDied(self._death)

    def _make_job(self, request: Request) -> Job:
        from batchgen.engines.sampling import make_row

        ids = request.ids
        room = self.max_model_len - len(ids)
        if room < 1:
            raise RequestRejected(
                "prompt_too_long",
                f"the prompt has {len(ids)} tokens; with one to generate, {self.max_model_len} fit",
            )
        if not ids or min(ids) < 0 or max(ids) >= self._vocab_size:
            raise RequestRejected("bad_token_ids", f"token ids must be given and lie in 0 .. {self._vocab_size - 1}")
        row = make_row(ids, request.sampling, min(request.sampling.max_tokens, room), self._eos_ids)
        loop = asyncio.get_running_loop()
        return Job(request, row, loop, loop.create_future(), time.monotonic())

    # ---- in a thread -------------------------------------------------------------------------------------------------

    def _load(self) -> None:
        tokenizer = HFTokenizer(self._model_spec)
        model = load_model(self._model_spec, self._spec)
        self.tokenizer = tokenizer
        self.max_model_len = find_max_model_len(self._model_spec, model.config)
        self._vocab_size: int = model.get_input_embeddings().num_embeddings
        self._eos_ids = list_eos_ids(model, tokenizer.eos_id)
        batch = make_batch(self._model_spec, self._spec, model, tokenizer.decode)
        check_room(batch.max_cells, self.max_model_len)
        num_spare = count_cores() - self._spec.num_threads
        self._can_rest = model.device.type == "cpu" and num_spare < SPARE_CORES
        self._lanes = Lanes(batch.make_like(), batch, self.max_model_len)

    def _run(self, lanes: Lanes) -> None:
        """The thread. Whatever ends it, nobody is left waiting."""
        import torch

        reason = "the decode thread broke: a bug of batchgen, see its traceback"
        try:
            torch.set_num_threads(self._spec.num_threads)
            while self._take(lanes):
                self._turn(lanes)
            reason = "the engine was closed"
        # Torch raises RuntimeError for all that goes wrong in a kernel, out of memory included; nothing can be said
        # of the cache after it.
        except RuntimeError as error:
            reason = f"the decode thread ended: {type(error).__name__}: {str(error).partition(chr(10))[0][:300]}"
            log.error("%s", reason)
        finally:
            self._held.flush()
            self._die(reason)

    def _take(self, lanes: Lanes) -> bool:
        """Moves what has come in to its lane; blocks while there is nothing to do, or to rest, which something urgent ends.
        False: close."""
        if lanes.is_idle:
            self._held.flush()
        rest_until = self._rest_until
        while lanes.is_idle or not self._inbox.empty() or time.monotonic() < rest_until:
            try:
                job = self._inbox.get(timeout=None if lanes.is_idle else max(0.0, rest_until - time.monotonic()))
            except queue.Empty:  # it has rested
                break
            if job is None:
                return False
            lanes.add(job.row, is_urgent=job.request.is_urgent)
            if job.request.is_urgent:
                rest_until = 0.0
                self._yield_to_urgent()
        self._held.note_turn(is_urgent=lanes.is_urgent)
        return True

    def _yield_to_urgent(self) -> None:
        if not self._is_yielding:
            self._is_yielding = True
            lower_thread_priority()

    def _turn(self, lanes: Lanes) -> None:
        started_at = time.monotonic()
        group, ended = lanes.turn()
        self.total_tokens = lanes.num_tokens
        now = time.monotonic()
        for job in self._list_jobs(group):
            if not job.first_token_at:  # else it was preempted and is back
                job.admitted_at, job.first_token_at = started_at, now
        for job in self._list_watched():
            tell(job)
        self._held.add([(job, make_answer(job)) for job in self._list_jobs(ended)])
        self._rest_until = now + lanes.find_rest_s(now - started_at) if self._can_rest else 0.0

    def _list_watched(self) -> list[Job]:
        """Those whose tokens somebody wants to see as they come: few, if any."""
        with self._lock:
            return [job for job in self._jobs.values() if job.on_tokens is not None]

    def _list_jobs(self, rows: "list[Row]") -> list[Job]:
        """Those of the rows that somebody still waits for."""
        with self._lock:
            return [self._jobs[row] for row in rows if row in self._jobs]

    def _die(self, reason: str) -> None:
        with self._lock:
            self._death = reason
            jobs = list(self._jobs.values())
        answer([(job, EngineDied(reason)) for job in jobs])


def make_batch(model_spec: ModelSpec, engine: TransformersEngineSpec, model: Any, decode: "Decode") -> "DecodeBatch":
    """An empty batch, after a first forward pass has shown that this model's cache is one we can work with."""
    from batchgen.engines.decode import DecodeBatch, probe

    try:
        can_join, cell_bytes = probe(model)
    # A model that takes other arguments, or whose cache is no `Cache`.
    except (TypeError, AttributeError) as error:
        raise SpecError(
            f"model.path: {model_spec.path} keeps its state in a way that engine.kind 'transformers' can't batch "
            f"({type(error).__name__}); choose a model with an attention cache"
        ) from error
    max_cells = find_cache_bytes(engine, model.device) // cell_bytes
    return DecodeBatch(model, decode, max_rows=engine.max_batch_size, max_cells=max_cells, can_join=can_join)


def count_cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def lower_thread_priority() -> None:
    """Of the calling thread, which beside bulk never sleeps: what carries requests to it, and wakes up now and then, goes
    first. Only on Linux do threads have priorities of their own."""
    if sys.platform == "linux":
        thread_id = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread_id, os.getpriority(os.PRIO_PROCESS, thread_id) + NICE)


def check_room(max_cells: int, max_model_len: int) -> None:
    """One row alone must always fit, or it could never be finished. Not cut to what fits: then the memory that happens to
    be free would decide which prompts are too long. Raises SpecError."""
    if max_cells < max_model_len:
        raise SpecError(
            f"engine.cache_gib: the KV cache has room for {max_cells} tokens, and one row may have {max_model_len} "
            f"(model.max_model_len); give it more memory, or set model.max_model_len to {max(2, max_cells)} or less"
        )
