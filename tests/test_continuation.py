"""Rows in parts and on ranks, over real engines: the embedded model, the simulated one, a server that speaks OpenAI's API,
and TensorRT-LLM's stand-in. What one shot answers, parts must answer."""

import asyncio
import math
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
from jobs_util import make_tree as make_job_tree
from jobs_util import read_rows, run, write_prompts
from makers import make_job_spec, make_request
from openai_server import MODEL, OpenAIServer

from batchgen.engines import get_engine_kind, make_facts
from batchgen.engines.base import EngineFacts
from batchgen.engines.openai import OpenAIEngine
from batchgen.engines.simulated import SimulatedEngine
from batchgen.engines.transformers import TransformersEngine
from batchgen.errors import EngineUnavailable, RequestFailed
from batchgen.lengths import list_quantiles, make_prior
from batchgen.records import Generation, Partial, Request, RowId, SamplingParams
from batchgen.spec import ModelSpec
from batchgen.specs.engine import OpenAIEngineSpec, SimulatedEngineSpec, TransformersEngineSpec
from batchgen.worker.budget import SAME, EngineCost, Ladder, estimate, make_ladder
from batchgen.worker.continuation import REUSE_SHARE, Continuation, make_job_ladder, make_serving
from batchgen.worker.partials import Partials
from batchgen.worker.placement import Placer

T = TypeVar("T")
RESUMABLE = EngineFacts(is_resumable=True)


# ---- the embedded model: token by token as in one shot ----------------------------------------------------------------


def use(work: Callable[[TransformersEngine], Awaitable[T]]) -> T:
    async def main() -> T:
        engine = TransformersEngine(ModelSpec(), TransformersEngineSpec(kind="transformers"))
        await engine.open()
        try:
            return await work(engine)
        finally:
            await engine.close()

    return asyncio.run(main())


def ask(engine: TransformersEngine, row: int, **sampling: Any) -> Request:
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 90, "thinking": True, **sampling})
    text = f"What is {17 + row} + {3 * row % 90}?"
    ids = engine.tokenizer.encode_chat([{"role": "user", "content": text}], thinking=params.thinking)
    return Request(RowId("file", row, 0), tuple(ids), params)


async def ask_all(answering: Any, requests: list[Request]) -> list[Generation]:
    return list(await asyncio.gather(*(answering.generate(request) for request in requests)))


def in_parts(engine: Any, *rungs: int, **more: Any) -> Continuation:
    resumable = get_engine_kind(engine.kind).capabilities.resumable_fields
    return Continuation(engine, RESUMABLE, Ladder(rungs), resumable=resumable, **more)


def check_same(parts: list[Generation], one_shot: list[Generation]) -> None:
    for ours, theirs in zip(parts, one_shot, strict=True):
        assert ours.token_ids == theirs.token_ids
        assert (ours.text, ours.finish_reason, ours.usage) == (theirs.text, theirs.finish_reason, theirs.usage)
        assert (ours.logprobs is None) == (theirs.logprobs is None)
        for one, two in zip(ours.logprobs or (), theirs.logprobs or (), strict=True):
            assert one.token_id == two.token_id
            assert math.isclose(one.logprob, two.logprob, abs_tol=1e-4)
            assert [token for token, _ in one.top[:1]] == [token for token, _ in two.top[:1]]


@pytest.mark.parametrize("rungs", [(1, 2, 3, 4, 5, 6, 7), (5, 10, 20, 40), (16,)])
@pytest.mark.parametrize("sampling", [{}, {"logprobs": 2}, {"repetition_penalty": 1.3, "max_tokens": 40}])
def test_greedy_answers_are_one_shots_token_by_token(rungs: tuple[int, ...], sampling: dict[str, Any]) -> None:
    async def work(engine: TransformersEngine) -> None:
        requests = [ask(engine, row, **sampling) for row in range(12)]
        one_shot = await ask_all(engine, requests)
        before = engine.total_tokens
        check_same(await ask_all(in_parts(engine, *rungs), requests), one_shot)
        assert engine.total_tokens - before == sum(answer.usage.completion_tokens or 0 for answer in one_shot)
        assert {"stop"} <= {answer.finish_reason for answer in one_shot}

    use(work)


def test_a_stop_string_across_the_seam_at_every_offset() -> None:
    """Stop strings of three characters from everywhere in an answer, and a seam behind every token before their end."""

    async def work(engine: TransformersEngine) -> None:
        engine._eos_ids = frozenset()  # it goes on to max_tokens
        free = await engine.generate(ask(engine, 1, max_tokens=24))
        marks = {free.text[place : place + 3] for place in range(2, len(free.text) - 3)}
        requests = [
            replace(ask(engine, row + 1, max_tokens=24, stop=(mark,))) for row in (0,) for mark in sorted(marks)
        ]
        requests = [replace(each, row_id=RowId("file", row, 0)) for row, each in enumerate(requests)]
        one_shot = await ask_all(engine, requests)
        assert len(requests) > 8
        assert {answer.finish_reason for answer in one_shot} == {"stop"}
        for seam in range(1, 20):
            check_same(await ask_all(in_parts(engine, seam), requests), one_shot)

    use(work)


def test_rows_whose_state_stays_behind_go_in_one_shot() -> None:
    async def work(engine: TransformersEngine) -> None:
        hot = {"temperature": 1.5, "max_tokens": 30}
        for sampling in ({"seed": 3, **hot}, {"presence_penalty": 0.5}, {"frequency_penalty": 0.5}):
            request = ask(engine, 1, **sampling)
            serving = in_parts(CountingParts(engine), 4)
            assert (await serving.generate(request)).token_ids == (await engine.generate(request)).token_ids
            assert serving._engine.num_parts == 1  # type: ignore[attr-defined]

    use(work)


class CountingParts:
    """An engine and how often it was asked."""

    def __init__(self, engine: TransformersEngine) -> None:
        self._engine, self.num_parts = engine, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def generate(self, request: Request) -> Generation:
        self.num_parts += 1
        return await self._engine.generate(request)


# ---- a server -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gives_ids", [True, False])
def test_a_server_goes_on_where_ids_go_in_and_come_out(openai_server: OpenAIServer, gives_ids: bool) -> None:
    """A server that gives none, though asked, is found out at the first row that is cut off; nothing is lost."""
    openai_server.reset()
    body = {"return_token_ids": gives_ids}
    where = {"base_urls": (openai_server.base_url,), "model": MODEL}
    spec = OpenAIEngineSpec(kind="openai", api="completions", send_token_ids=True, extra_body=body, **where)
    assert make_facts(spec, "x").is_resumable == gives_ids

    async def main() -> None:
        engine = OpenAIEngine(ModelSpec(), spec)
        await engine.open()
        try:
            assert engine.tokenizer is not None
            params = SamplingParams(temperature=0.0, max_tokens=90, thinking=True, logprobs=1)
            ids = engine.tokenizer.encode_chat([{"role": "user", "content": "What is 17 + 34?"}], thinking=True)
            requests = [Request(RowId("file", row, 0), tuple(ids), params) for row in range(2)]
            one_shot = [await engine.generate(request) for request in requests]
            before = openai_server.read()["num_calls"]
            serving = in_parts(engine, 3, 6)
            check_same([await serving.generate(request) for request in requests], one_shot)
            assert openai_server.read()["num_calls"] - before == (6 if gives_ids else 3)
        finally:
            await engine.close()

    asyncio.run(main())


# ---- failures ------------------------------------------------------------------------------------------------------------


class FailsInTheSecondPart(SimulatedEngine):
    """Once for each row, in the way that it is told to; `asked` is the (prompt, partial) tokens of each call."""

    error: RequestFailed = RequestFailed("engine_error", "on purpose")

    def __init__(self, spec: SimulatedEngineSpec) -> None:
        super().__init__(spec)
        self.asked: list[tuple[int, int]] = []
        self.failed: set[RowId] = set()

    async def generate(self, request: Request) -> Generation:
        num_done = len(request.partial.token_ids) if request.partial is not None else 0
        self.asked.append((len(request.token_ids or ()), num_done))
        if request.partial is not None and request.row_id not in self.failed:
            self.failed.add(request.row_id)
            raise self.error
        return await super().generate(request)


def make_simulated(kind: type[SimulatedEngine] = SimulatedEngine, **fields: Any) -> Any:
    plain = {"has_latency": False, "mean_tokens": 40, "sigma": 0.0}
    return kind(SimulatedEngineSpec(kind="simulated", **{**plain, **fields}))


@pytest.mark.parametrize("error", [RequestFailed("x", "y"), EngineUnavailable("x", "it restarts", 0.1)])
def test_a_retry_goes_on_from_the_parts_that_were_finished(error: RequestFailed) -> None:
    async def main() -> None:
        engine = make_simulated(FailsInTheSecondPart)
        engine.error = error
        await engine.open()
        request = make_request(max_tokens=100)
        whole = await make_opened(make_simulated()).generate(request)
        serving = in_parts(engine, 16, 32)
        with pytest.raises(type(error)):
            await serving.generate(request)
        answer = await serving.generate(replace(request, attempt=2))
        assert engine.asked == [(3, 0), (3, 16), (3, 16), (3, 32)]
        assert (answer.text, answer.token_ids, answer.usage) == (whole.text, whole.token_ids, whole.usage)
        assert engine.total_tokens == 40, "no token was made twice"
        assert not list(serving.partials.iter_all())

    asyncio.run(main())


def make_opened(engine: SimulatedEngine) -> SimulatedEngine:
    """Without latency it needs its loop for nothing else."""
    engine._death = asyncio.get_running_loop().create_future()
    return engine


def test_what_is_kept_for_retries_is_bounded() -> None:
    async def main() -> None:
        engine = make_simulated(FailsInTheSecondPart)
        await engine.open()
        serving = in_parts(engine, 16, partials=Partials(16 * 5))
        for row in range(20):
            with pytest.raises(RequestFailed):
                await serving.generate(make_request(row, max_tokens=100))
        kept = list(serving.partials.iter_all())
        assert [(row_id.source_row, len(partial.token_ids)) for row_id, partial in kept] == [
            (row, 16) for row in range(15, 20)
        ]
        # A row that was forgotten begins anew, and no answer differs for it.
        answers = [await serving.generate(make_request(row, max_tokens=100)) for row in (3, 17)]
        assert [answer.usage.completion_tokens for answer in answers] == [40, 40]

    asyncio.run(main())


def test_a_request_that_comes_with_a_partial_answer_goes_on_from_it() -> None:
    async def main() -> None:
        engine = make_simulated()
        await engine.open()
        request = make_request(max_tokens=100)
        whole = await engine.generate(request)
        assert whole.token_ids is not None
        for serving in (in_parts(engine, 16, 32), in_parts(engine)):
            answer = await serving.generate(replace(request, partial=Partial(whole.token_ids[:20])))
            assert (answer.token_ids, answer.text, answer.usage.completion_tokens) == (whole.token_ids, whole.text, 40)

    asyncio.run(main())


def test_a_prompt_that_may_not_grow_is_asked_for_whole() -> None:
    async def main() -> None:
        engine = make_simulated(FailsInTheSecondPart)
        await engine.open()
        serving = Continuation(engine, replace(RESUMABLE, max_prompt_tokens=10), Ladder((4, 8, 16)))
        with pytest.raises(RequestFailed):
            await serving.generate(make_request(max_tokens=100))
        await serving.generate(make_request(max_tokens=100))
        assert engine.asked == [(3, 0), (3, 4), (3, 4)]  # 3 + 4 may go on, 3 + 8 could not

    asyncio.run(main())


class HasALimitOfItsOwn(SimulatedEngine):
    """20 tokens of an answer and no more."""

    async def generate(self, request: Request) -> Generation:
        done = len(request.partial.token_ids) if request.partial is not None else 0
        fitted = replace(request.sampling, max_tokens=min(request.sampling.max_tokens, 20 - done))
        return await super().generate(replace(request, sampling=fitted))


def test_a_part_that_is_cut_off_by_the_engine_itself_is_the_last() -> None:
    async def main() -> None:
        engine = make_simulated(HasALimitOfItsOwn)
        await engine.open()
        one_shot = await engine.generate(make_request(max_tokens=100))
        assert (one_shot.usage.completion_tokens, one_shot.finish_reason) == (20, "length")
        for first in (16, 32):
            assert (await in_parts(engine, first, 64).generate(make_request(max_tokens=100))).text == one_shot.text

    asyncio.run(main())


# ---- ranks ---------------------------------------------------------------------------------------------------------------


class NotesRanks(SimulatedEngine):
    def __init__(self, spec: SimulatedEngineSpec) -> None:
        super().__init__(spec)
        self.ranks: dict[RowId, list[int | None]] = {}

    async def generate(self, request: Request) -> Generation:
        self.ranks.setdefault(request.row_id, []).append(request.rank)
        return await super().generate(request)


def test_all_parts_of_a_row_go_to_the_rank_of_its_beginning() -> None:
    async def main() -> None:
        engine = make_simulated(NotesRanks, ranks=4, slots=64)
        await engine.open()
        serving = in_parts(engine, 16, 32, placer=Placer(4, slack=10.0))
        requests = [replace(make_request(row, max_tokens=100), token_ids=(row % 4,) * 64 + (row,)) for row in range(40)]
        await ask_all(serving, requests)
        assert all(len(ranks) == 3 for ranks in engine.ranks.values())
        for group in range(4):
            found = {rank for row, ranks in engine.ranks.items() if row.source_row % 4 == group for rank in ranks}
            assert len(found) == 1
            assert None not in found
        assert serving._placer is not None
        assert serving._placer.list_loads() == [0.0] * 4

    asyncio.run(main())


def test_a_row_that_fails_or_is_cancelled_leaves_its_rank() -> None:
    async def main() -> None:
        engine = make_simulated(has_latency=True, ranks=2, reject_text="x")
        await engine.open()
        placer = Placer(2)
        serving = in_parts(engine, placer=placer)
        rejected = replace(make_request(), token_ids=(ord("x"),))
        waiting = asyncio.ensure_future(serving.generate(make_request(1)))
        await asyncio.sleep(0)
        with pytest.raises(Exception, match="refuses"):
            await serving.generate(rejected)
        assert sum(placer.list_loads()) > 0
        waiting.cancel()
        await asyncio.wait([waiting])
        assert placer.list_loads() == [0.0, 0.0]
        await engine.close()

    asyncio.run(main())


# ---- what the spec asks for ----------------------------------------------------------------------------------------------


def choose(token_budget: object, **engine: Any) -> Ladder:
    fields = {"kind": "tensorrt_llm", **engine}
    if token_budget is not None:
        fields["token_budget"] = token_budget
    spec = make_job_spec(engine=fields, sampling={"max_tokens": 64_000})
    return make_job_ladder(spec, make_facts(spec.engine, "1.2.1"), None, 70_000)


def test_the_spec_says_how_rows_are_asked_for() -> None:
    assert choose(None).rungs[:2] == (8192, 16_384)
    assert choose("auto") == choose(None)
    assert choose("off") == Ladder()
    assert choose(3000).rungs[:2] == (3000, 6000)
    assert choose(None, kind="simulated") == Ladder()
    assert choose(100, kind="simulated").rungs[:2] == (100, 200)
    assert choose(100, kind="simulated", length="max_tokens") == Ladder()


def test_an_earlier_runs_lengths_choose_the_ladder() -> None:
    spec = make_job_spec(engine={"kind": "tensorrt_llm"}, sampling={"max_tokens": 64_000})
    facts = make_facts(spec.engine, "1.2.1")
    short = make_prior({(8, 32): 900, (8, 40): 90, (8, 60): 10})  # most of 256, some of 1,024, a few of 32,768 tokens
    long = make_prior({(8, 56): 1000})  # all of 16,384
    assert short is not None
    assert long is not None
    ladders = [make_job_ladder(spec, facts, prior, 70_000) for prior in (short, long)]
    assert ladders[0] != ladders[1]
    cost = EngineCost(reuse_share=REUSE_SHARE)
    for prior, ladder in zip((short, long), ladders, strict=True):
        lengths = list_quantiles(prior, 256)
        chosen, usual = (
            estimate(each, lengths, num_prompt=1000, max_tokens=64_000, cost=cost).row_s
            for each in (ladder, choose(None))
        )
        assert chosen <= usual * (1 + SAME), (
            "of ladders that the model can't tell apart it takes the one with fewer parts"
        )


def test_facts_follow_the_version_and_the_section() -> None:
    spec = make_job_spec(engine={"kind": "tensorrt_llm"}).engine
    safe, old = make_facts(spec, "1.2.1"), make_facts(spec, "1.2.0")
    assert (safe.max_prompt_tokens, safe.has_block_reuse, safe.num_ranks) == (None, True, 8)
    assert (old.max_prompt_tokens, old.has_block_reuse) == (8192, False)
    alone = make_job_spec(engine={"kind": "tensorrt_llm", "rank_placement": False}).engine
    assert make_facts(alone, "1.2.1").num_ranks == 1


def test_an_engine_with_neither_is_used_as_it_is() -> None:
    spec = make_job_spec()
    engine = SimulatedEngine(spec.engine)  # type: ignore[arg-type]
    assert make_serving(engine, spec, None) is engine


@pytest.mark.parametrize("engine", [{"token_budget": 5}, {"token_budget": 7, "ranks": 4}, {"ranks": 3}])
def test_a_whole_job_in_parts_makes_the_same_rows(engine: dict[str, Any], tmp_path: Path) -> None:
    """Half of its rows fail once, stop strings and a thinking model included."""
    files = write_prompts(tmp_path / "in")
    plain = {"mean_tokens": 30, "failure_rate": 0.5}
    made = []
    for name, more in (("one", {}), ("parts", engine)):
        tree = make_job_tree(tmp_path / "in", tmp_path / name, engine={**plain, **more})
        tree["sampling"] = {"thinking": True, "stop": ["ro", "th k"]}
        tree["retry"] = {"backoff_s": 0.001}
        assert run(tree)[0]["exit_code"] == 0
        rows = read_rows(tmp_path / name)
        made.append([{k: v for k, v in row.items() if not k.endswith(("_s", "batch_id"))} for row in rows])
    assert len(made[0]) == sum(rows for _, rows in files)
    assert made[0] == made[1]
    assert make_ladder(5, 1024).rungs[:3] == (5, 10, 20)


@pytest.mark.parametrize(
    ("facts", "sampling", "asked"),
    [
        (RESUMABLE, {}, (3, 20)),
        (replace(RESUMABLE, max_prompt_tokens=22), {}, (3, 0)),
        (RESUMABLE, {"presence_penalty": 0.5}, (3, 0)),
        (RESUMABLE, {"max_tokens": 20}, (3, 0)),
    ],
    ids=["fits", "the prompt is too long for this engine", "the engine can't go on with such a row", "nothing is left"],
)
def test_what_another_worker_had_is_gone_on_with_where_this_engine_can(
    facts: EngineFacts, sampling: dict[str, Any], asked: tuple[int, int]
) -> None:
    async def main() -> None:
        engine = make_simulated(FailsInTheSecondPart)
        await engine.open()
        request = make_request(**{"max_tokens": 100, **sampling})
        engine.failed.add(request.row_id)  # it fails at nothing
        whole = await make_opened(make_simulated()).generate(make_request(max_tokens=100))
        partials = Partials()
        partials.load([(request.row_id, Partial((whole.token_ids or ())[:20]))])
        serving = Continuation(engine, facts, Ladder((16, 32)), partials=partials)
        answer = await serving.generate(request)
        assert engine.asked[0] == asked
        assert answer.token_ids == (whole.token_ids or ())[: request.sampling.max_tokens]
        assert partials.get(request.row_id) is None

    asyncio.run(main())


@pytest.mark.parametrize("sampling", [{}, {"logprobs": 2}, {"stop": ("</think>",)}])
def test_a_row_that_is_stopped_anywhere_goes_on_elsewhere_as_in_one_shot(sampling: dict[str, Any]) -> None:
    """Of the transformers engine, whose own thread decodes on while it is asked what it has."""

    async def stop(engine: TransformersEngine, request: Request, num_tokens: int) -> Partials:
        partials, before = Partials(), engine.total_tokens
        serving = in_parts(engine, 1000, partials=partials)
        under_way = asyncio.ensure_future(serving.generate(request))
        while engine.total_tokens - before < num_tokens and not under_way.done():
            await asyncio.sleep(0.0005)
        serving.save(request.row_id)
        under_way.cancel()
        await asyncio.wait({under_way})
        return partials

    async def work(engine: TransformersEngine) -> None:
        requests = [ask(engine, row, **sampling) for row in range(6)]
        one_shot = await ask_all(engine, requests)
        num_saved = 0
        for number, request in enumerate(requests):
            left = await stop(engine, request, 2 + 3 * number)
            num_saved += left.get(request.row_id) is not None
            elsewhere = Partials()
            elsewhere.load(left.iter_all())
            answer = await in_parts(engine, 1000, partials=elsewhere).generate(request)
            whole = one_shot[number]
            assert (answer.text, answer.token_ids, answer.finish_reason) == (
                whole.text,
                whole.token_ids,
                whole.finish_reason,
            )
            assert answer.usage.completion_tokens == whole.usage.completion_tokens
        assert num_saved >= 1, "some may have ended before they were stopped"

    use(work)


def test_what_was_never_sent_is_not_saved() -> None:
    partials = Partials()
    in_parts(make_simulated(), 16, partials=partials).save(RowId("file", 1, 0))
    assert not list(partials.iter_all())
