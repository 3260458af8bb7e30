"""Our engines as a stage of a Ray Data pipeline: `ds.map_batches(Generate, ...)`. Imports nothing of Ray.

    from batchgen.ray_data import Generate
    ds.map_batches(
        Generate,
        fn_constructor_kwargs={"engine": {"kind": "tensorrt_llm"}, "model": "/models/v32", "prompt": {"column": "q"}},
        batch_format="pyarrow", batch_size=256, concurrency=1, num_gpus=8,
    )

One actor is one engine. `__call__` is asynchronous, and all batches that Ray Data has given the actor share one in-flight
window: the engine works on the next batches while the last rows of one are decoded. A batch comes back whole and in order:
its columns, then ours (`text`, `finish_reason`, `error_type`, ...; `docs/output.md`), n rows for each. Rows that fail are
rows with `error_type`. What a job has beside this (exactly once, resume, journal, tail) a stage has not: Ray Data makes a
block again when its actor is lost. Where an engine dies for good, the batch raises EngineDied.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import pyarrow as pa

from batchgen.engines import check_supported, create_engine, list_refused
from batchgen.engines.base import Engine
from batchgen.errors import EngineDied, RequestFailed, SpecError
from batchgen.prompt import list_row_columns
from batchgen.records import InputFile, Lease, Request, Result, Shard
from batchgen.specs.load import make_spec
from batchgen.worker.answer import make_failed
from batchgen.worker.continuation import make_serving
from batchgen.worker.open_shard import OpenShard
from batchgen.worker.prepare import Preparer
from batchgen.worker.ready import Ready
from batchgen.worker.sender import Sender
from batchgen.worker.tasks import TaskGroup
from batchgen.write import make_result_schema

# A batch is a shard that lies in no file.
PLACE = "ray.data"
# Of a result, what says nothing here.
LEFT_OUT = ("source_row", "batch_id", "row_fingerprint", "reused_from")
ORDER = [("source_row", "ascending"), ("sample_index", "ascending")]


class Generate:
    """See the module. The sections are a spec's. Raises SpecError for what can't work, before an engine starts."""

    def __init__(
        self,
        engine: Mapping[str, Any],
        *,
        prompt: Mapping[str, Any] | None = None,
        model: str = "embedded",
        sampling: Mapping[str, Any] | None = None,
        retry: Mapping[str, Any] | None = None,
    ) -> None:
        tree = {
            "input": {"paths": PLACE},
            "prompt": dict(prompt or {"column": "prompt"}),
            "model": {"path": model},
            "engine": dict(engine),
            "sampling": dict(sampling or {}),
            "retry": dict(retry or {}),
            "output": {"path": PLACE},
        }
        self._spec = make_spec(tree, source="Generate")
        check_supported(self._spec)
        self._schema = make_result_schema(self._spec)
        self._numbers = itertools.count()
        self._opening = asyncio.Lock()
        self._open: dict[int, OpenShard] = {}
        self._engine: Engine | None = None
        self._reason: str | None = None

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        """One batch of rows; one batch of answers."""
        if not isinstance(batch, pa.Table):
            raise SpecError("Generate: takes Arrow tables; call map_batches with batch_format='pyarrow'")
        self._check_columns(batch.column_names)
        await self._start()
        yield await self._generate(batch)

    async def close(self) -> None:
        """End the engine, where Ray Data doesn't end the whole process. Twice is a no-op."""
        engine, self._engine = self._engine, None
        if engine is not None:
            await self._sender.close()
            await self._pushing.cancel()
            await engine.close()

    def _check_columns(self, names: Sequence[str]) -> None:
        missing = [name for name in list_row_columns(self._spec) if name not in names]
        if missing:
            raise SpecError(f"Generate: the batch has no column '{missing[0]}'; it has {', '.join(names)}")
        taken = [field.name for field in self._schema if field.name in names and field.name not in LEFT_OUT]
        if taken:
            raise SpecError(f"Generate: the batch has a column '{taken[0]}', which is ours too; rename or drop it")

    # ---- the engine --------------------------------------------------------------------------------------------------

    async def _start(self) -> None:
        """Open the engine once, on the loop that all calls run on."""
        async with self._opening:
            if self._reason is not None:
                raise EngineDied(self._reason)
            if self._engine is not None:
                return
            spec, engine = self._spec, create_engine(self._spec)
            async with AsyncExitStack() as stack:
                stack.push_async_callback(
                    engine.close
                )  # it may be up by half: a server's session, a process of its own
                await engine.open()
                self._preparer = Preparer(spec, engine.tokenizer, engine.max_model_len, list_refused(spec.engine))
                serving = make_serving(engine, spec, None)
                stack.pop_all()
            self._sender = Sender(serving, spec.engine.max_inflight, spec.retry, self._die, self._send_again)
            self._pushing = TaskGroup(self._die)
            self._engine = engine

    def _die(self, reason: str) -> None:
        self._reason = reason
        self._sender.stop()
        for shard in self._open.values():
            shard.close(EngineDied(reason))

    def _send_again(self, reason: str, inflight: list[Ready]) -> None:
        """The engine died and starts anew by itself. Who killed it is not looked for here: a row has its attempts."""
        again: dict[OpenShard, list[Request]] = {}
        for ready in inflight:
            request = ready.request
            if request.attempt < self._spec.retry.max_attempts:
                again.setdefault(ready.shard, []).append(replace(request, attempt=request.attempt + 1))
            else:
                error = RequestFailed("engine_restarted", reason)
                ready.shard.add(make_failed(request, error, waited_s=0.0, latency_s=0.0))
        for shard, requests in again.items():
            self._pushing.spawn(self._sender.push(shard, requests))

    # ---- one batch ---------------------------------------------------------------------------------------------------

    async def _generate(self, batch: pa.Table) -> pa.Table:
        number, n = next(self._numbers), self._spec.sampling.n
        file = InputFile(f"{PLACE}/{number}", 0, "", batch.num_rows, (batch.num_rows,))
        lease = Lease(Shard(number, file, 0, batch.num_rows), 1, 1, PLACE)
        self._open[number] = shard = OpenShard(lease, n, self._schema)
        try:
            if batch.num_rows:
                await self._send(shard, batch)
                await shard.wait_ended()
            return self._join(shard, batch, n)
        finally:
            shard.close()
            del self._open[number]

    async def _send(self, shard: OpenShard, batch: pa.Table) -> None:
        (rows,) = batch.select(list_row_columns(self._spec)).combine_chunks().to_batches()
        prepared = await asyncio.to_thread(
            self._preparer.prepare, rows, shard.lease.shard.file.path, range(batch.num_rows)
        )
        for failed in prepared:
            if isinstance(failed, Result):
                shard.add(failed)
        await self._sender.push(shard, [item for item in prepared if isinstance(item, Request)])

    def _join(self, shard: OpenShard, batch: pa.Table, n: int) -> pa.Table:
        taken = shard.take_unflushed()
        results = (taken[0] if taken else self._schema.empty_table()).sort_by(ORDER)
        if results.num_rows != batch.num_rows * n:
            raise ValueError(f"{results.num_rows} answers for {batch.num_rows} rows, {n} for each")
        joined = batch.take(results["source_row"])
        for field in self._schema:
            if field.name not in LEFT_OUT:
                joined = joined.append_column(field, results[field.name])
        return joined
