"""Interactive requests on one open engine: rows as a batch would have them, prepared, answered, or shown as they grow.

Goes through the same preparation and the same making of results as a batch's rows; no retries, no journal, no window.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import pyarrow as pa

from batchgen.engines import get_engine_kind, list_refused
from batchgen.engines.base import Engine, StreamingEngine
from batchgen.errors import RequestFailed, RowError
from batchgen.records import Request, Result
from batchgen.serve.batch_spec import PROMPT_COLUMNS, SAMPLING, TOOLS, make_batch_spec
from batchgen.serve.deltas import Delta, Deltas
from batchgen.serve.spec import ServedModel
from batchgen.specs.sections import PromptForm
from batchgen.worker.answer import make_failed, make_result
from batchgen.worker.prepare import Preparer

# So much is tokenised in less time than it takes to go to a thread and back beside bulk's own.
SMALL_CHARS = 4096


@dataclass(frozen=True, slots=True)
class Ask:
    """Rows of one request, as `bodies.read_body` makes them. Pickles. `is_bulk`: nobody waits for one answer of many, so
    they go with the batches' rows."""

    form: PromptForm
    rows: tuple[dict[str, Any], ...]
    has_tools: bool
    is_bulk: bool = False


class Interactive:
    """`answer` and `stream` raise EngineDied; whatever else is wrong with a row is its Result's failure."""

    def __init__(self, served: ServedModel, engine: Engine) -> None:
        self._served, self._engine = served, engine
        self._preparers: dict[tuple[PromptForm, bool], Preparer] = {}
        self._is_streaming = get_engine_kind(served.engine.kind).capabilities.is_streaming

    async def answer(self, ask: Ask) -> list[Result]:
        """One result a row, in order."""
        prepared = await self._make_requests(ask)
        return list(await asyncio.gather(*(self._end(each) for each in prepared)))

    async def stream(self, ask: Ask) -> AsyncIterator[Delta | Result]:
        """Deltas of all rows as they come; each row's Result is its last word."""
        prepared = await self._make_requests(ask)
        news: asyncio.Queue[Delta | Result] = asyncio.Queue()
        works = [asyncio.ensure_future(self._show(number, each, news)) for number, each in enumerate(prepared)]
        left = len(works)
        try:
            while left:
                get = asyncio.ensure_future(news.get())
                failed = [work for work in works if work.done() and work.exception() is not None]
                if failed:
                    get.cancel()
                    failed[0].result()
                await asyncio.wait([get, *(work for work in works if not work.done())], return_when="FIRST_COMPLETED")
                if not get.done():
                    get.cancel()
                    continue
                yield get.result()
                left -= isinstance(get.result(), Result)
        finally:
            for work in works:
                work.cancel()

    async def _make_requests(self, ask: Ask) -> list[Request | Result]:
        is_small = sum(len(str(row)) for row in ask.rows) <= SMALL_CHARS
        made = self._prepare(ask) if is_small else await asyncio.to_thread(self._prepare, ask)
        return [each if isinstance(each, Result) else replace(each, is_urgent=not ask.is_bulk) for each in made]

    def _prepare(self, ask: Ask) -> list[Request | Result]:
        key = (ask.form, ask.has_tools)
        if key not in self._preparers:
            spec = make_batch_spec(
                self._served,
                ask.form,
                input_url="/-",
                out_url="/-",
                has_tools=ask.has_tools,
                custom_id=None,
                passthrough=(),
            )
            engine = self._engine
            self._preparers[key] = Preparer(spec, engine.tokenizer, engine.max_model_len, list_refused(spec.engine))
        prompt = pa.list_(pa.int64()) if ask.form == "token_ids" else pa.string()
        fields = [(PROMPT_COLUMNS[ask.form], prompt), (SAMPLING, pa.string()), (TOOLS, pa.string())]
        batch = pa.RecordBatch.from_pylist(list(ask.rows), schema=pa.schema(fields))
        # The rows' numbers are their seeds': the same request with the same seed draws the same.
        return self._preparers[key].prepare(batch, "", range(len(ask.rows)))

    async def _end(self, prepared: Request | Result, deltas: Deltas | None = None, tell: Any = None) -> Result:
        if isinstance(prepared, Result):
            return prepared
        request, clock = prepared, asyncio.get_running_loop().time
        started, limit_s = clock(), self._served.retry.request_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                if deltas is not None:
                    generation = await cast(StreamingEngine, self._engine).generate_streaming(request, tell)
                else:
                    generation = await self._engine.generate(request)
        except RowError as error:
            return make_failed(request, error, waited_s=0.0, latency_s=clock() - started)
        except TimeoutError:
            late = RequestFailed("timed_out", f"no answer after {limit_s:g} s")
            return make_failed(request, late, waited_s=0.0, latency_s=clock() - started)
        parse = self._engine.tokenizer.parse if self._engine.tokenizer else None
        return make_result(request, generation, parse=parse, waited_s=0.0, latency_s=clock() - started)

    async def _show(self, number: int, prepared: Request | Result, news: "asyncio.Queue[Delta | Result]") -> None:
        deltas = self._make_deltas(number, prepared)

        def tell(token_ids: Sequence[int]) -> None:
            if deltas is not None and (delta := deltas.add(token_ids)) is not None:
                news.put_nowait(delta)

        result = await self._end(prepared, deltas, tell)
        if result.generation is not None:
            rest = (
                deltas.finish(result)
                if deltas is not None
                else Delta(number, result.text or "", result.reasoning or "")
            )
            if rest is not None:
                news.put_nowait(rest)
        news.put_nowait(result)

    def _make_deltas(self, number: int, prepared: Request | Result) -> Deltas | None:
        """None: the answer comes in one piece."""
        tokenizer = self._engine.tokenizer
        if isinstance(prepared, Result) or not self._is_streaming or tokenizer is None or prepared.has_tools:
            return None
        sampling = prepared.sampling
        return Deltas(number, tokenizer.decode, tokenizer.think_end if sampling.thinking else None, sampling.stop)
