"""The transformers engine over the embedded model: right sums, honest counts, and an end for every request."""

import asyncio
import random
import shutil
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pytest
import torch
from jobs_util import check_output, run, write_file
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from batchgen.engines.decode import DecodeBatch
from batchgen.engines.transformers import TransformersEngine
from batchgen.errors import EngineDied, RequestFailed, RequestRejected, SpecError
from batchgen.records import Generation, Request, RowId, SamplingParams
from batchgen.spec import ModelSpec
from batchgen.specs.engine import TransformersEngineSpec

T = TypeVar("T")
WAYS = {
    "+": ("What is {a} + {b}?", "Compute {a} + {b}.", "{a} + {b} = ?", "Add {a} and {b}."),
    "-": ("What is {a} - {b}?", "Compute {a} - {b}.", "{a} - {b} = ?", "Subtract {b} from {a}."),
}


def make_engine(model: ModelSpec | None = None, **changes: Any) -> TransformersEngine:
    return TransformersEngine(model or ModelSpec(), TransformersEngineSpec(kind="transformers", **changes))


def use(work: Callable[[TransformersEngine], Awaitable[T]], model: ModelSpec | None = None, **changes: Any) -> T:
    """What `work` returns, given an open engine that is closed afterwards."""

    async def main() -> T:
        engine = make_engine(model, **changes)
        await engine.open()
        try:
            return await work(engine)
        finally:
            await engine.close()

    return asyncio.run(main())


def ask(engine: TransformersEngine, text: str, **sampling: Any) -> Request:
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 60, **sampling})
    ids = engine.tokenizer.encode_chat([{"role": "user", "content": text}], thinking=params.thinking)
    return Request(RowId("file", 0, 0), tuple(ids), params)


def endless(engine: TransformersEngine, **sampling: Any) -> Request:
    """A request that, left alone, goes on to the model's limit: from here on the engine knows no end-of-text token."""
    engine._eos_ids = frozenset()
    return ask(engine, "1 + 1 = ?", **{"temperature": 1.0, "max_tokens": 10**6, "seed": 0, **sampling})


def make_sums(num: int) -> list[tuple[str, str]]:
    """Questions in every phrasing, each with its answer."""
    rng = random.Random(8)
    sums = []
    for _ in range(num):
        b, a = sorted((rng.randrange(100), rng.randrange(100)))
        op = rng.choice("+-")
        sums.append((rng.choice(WAYS[op]).format(a=a, b=b), str(a + b if op == "+" else a - b)))
    return sums


async def answer_all(engine: TransformersEngine, requests: list[Request]) -> list[Generation]:
    return list(await asyncio.gather(*(engine.generate(request) for request in requests)))


def run_until(is_so: Callable[[], bool]) -> Awaitable[None]:
    async def wait() -> None:
        while not is_so():
            await asyncio.sleep(0.001)

    return asyncio.wait_for(wait(), 100)


# ---- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("thinking", "num", "min_right"), [(False, 200, 196), (True, 50, 49)])
def test_it_can_do_sums(thinking: bool, num: int, min_right: int) -> None:
    sums = make_sums(num)

    async def work(engine: TransformersEngine) -> list[Generation]:
        return await answer_all(engine, [ask(engine, text, thinking=thinking) for text, _ in sums])

    answers = [generation.text.split("</think>") for generation in use(work)]
    assert all(len(parts) == 1 + thinking for parts in answers)
    assert sum(parts[-1] == right for parts, (_, right) in zip(answers, sums, strict=True)) >= min_right


def test_company_changes_no_answer() -> None:
    texts = [text for text, _ in make_sums(48)]

    async def work(engine: TransformersEngine) -> list[tuple[int, ...]]:
        hot = {"temperature": 2.0, "max_tokens": 40}
        requests = [ask(engine, text, thinking=bool(i % 3), seed=i, **hot) for i, text in enumerate(texts)]
        random.Random(engine._spec.max_batch_size).shuffle(requests)
        answers = await answer_all(engine, requests)
        by_seed = sorted(zip((r.sampling.seed or 0 for r in requests), answers, strict=True), key=lambda pair: pair[0])
        return [answer.token_ids for _, answer in by_seed]

    alone, few, many = (use(work, max_batch_size=size) for size in (1, 8, 64))
    assert alone == few == many


def test_counts_are_openais() -> None:
    async def work(engine: TransformersEngine) -> tuple[Request, Generation, int]:
        assert (await engine.generate(ask(engine, "1", max_tokens=1))).logprobs is None
        request = ask(engine, "What is 17 + 25?", logprobs=1)
        return request, await engine.generate(request), engine.total_tokens

    request, answer, total_tokens = use(work)
    assert (answer.text, answer.finish_reason, len(answer.token_ids)) == ("42", "stop", 2)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(request.token_ids), 3)
    assert answer.usage.cached_tokens == 0
    assert total_tokens == 1 + 3
    assert answer.logprobs is not None
    assert [each.token_id for each in answer.logprobs] == list(answer.token_ids)
    assert answer.queued_s is not None
    assert answer.ttft_s is not None
    assert 0 <= answer.queued_s < answer.ttft_s < 200


def test_it_takes_any_unicode() -> None:
    async def work(engine: TransformersEngine) -> list[Generation]:
        texts = ["漢字 🙂", "\u0000\u200b\ufeff", "", "é" * 100, "🧑‍🚀" * 20]
        return await answer_all(engine, [ask(engine, text, max_tokens=20) for text in texts])

    answers = use(work)
    assert len(answers) == 5
    assert all(answer.text.encode() is not None for answer in answers)


def test_bare_ids_need_no_chat() -> None:
    async def work(engine: TransformersEngine) -> Generation:
        ids = engine.tokenizer.encode("<｜User｜>2 + 3 = ?<｜Assistant｜></think>")
        return await engine.generate(Request(RowId("file", 0, 0), tuple(ids), SamplingParams(temperature=0.0)))

    assert use(work).text == "5"


def test_what_it_says_of_itself() -> None:
    async def work(engine: TransformersEngine) -> tuple[str, str, int, int]:
        return engine.kind, engine.version, engine.max_model_len, engine.total_tokens

    kind, version, max_model_len, total_tokens = use(work)
    assert (kind, max_model_len, total_tokens) == ("transformers", 1024, 0)
    assert int(version.split(".")[0]) >= 5


# ---- limits ----------------------------------------------------------------------------------------------------------


def test_a_prompt_that_leaves_no_room_is_rejected() -> None:
    async def work(engine: TransformersEngine) -> None:
        for num_tokens in (64, 65, 5000):
            with pytest.raises(RequestRejected) as caught:
                await engine.generate(Request(RowId("file", 0, 0), (7,) * num_tokens, SamplingParams()))
            assert caught.value.error_type == "prompt_too_long"
        last = await engine.generate(Request(RowId("file", 0, 0), (7,) * 63, SamplingParams()))
        assert last.usage.completion_tokens == 1

    use(work, ModelSpec(max_model_len=64))


def test_max_tokens_is_clipped_to_the_room() -> None:
    async def work(engine: TransformersEngine) -> tuple[Request, Generation]:
        request = endless(engine)
        return request, await engine.generate(request)

    request, answer = use(work, ModelSpec(max_model_len=40))
    assert answer.finish_reason == "length"
    assert answer.usage.completion_tokens == 40 - len(request.token_ids)


@pytest.mark.parametrize("token_ids", [(), (304,), (7, -1), (7, 10**9)])
def test_ids_the_model_does_not_have_are_rejected(token_ids: tuple[int, ...]) -> None:
    async def work(engine: TransformersEngine) -> None:
        with pytest.raises(RequestRejected) as caught:
            await engine.generate(Request(RowId("file", 0, 0), token_ids, SamplingParams()))
        assert caught.value.error_type == "bad_token_ids"

    use(work)


# ---- ends ------------------------------------------------------------------------------------------------------------


def test_a_cancelled_request_leaves_the_batch_and_the_others_go_on() -> None:
    async def work(engine: TransformersEngine) -> None:
        doomed = asyncio.create_task(engine.generate(endless(engine)))
        await run_until(lambda: engine.total_tokens >= 5)
        doomed.cancel()
        with pytest.raises(asyncio.CancelledError):
            await doomed
        await run_until(lambda: engine._lanes.is_idle)
        assert engine.total_tokens < 900
        engine._eos_ids = frozenset({1})
        assert (await engine.generate(ask(engine, "2 + 2 = ?"))).text == "4"
        assert not engine._jobs

    use(work)


def test_tokens_are_shown_as_they_come() -> None:
    async def work(engine: TransformersEngine) -> None:
        shown: list[tuple[int, ...]] = []
        request = ask(engine, "12 + 30 = ?")
        whole = await engine.generate_streaming(request, lambda new: shown.append(tuple(new)))
        await asyncio.sleep(0)
        assert len(shown) > 1
        assert tuple(token for new in shown for token in new) == whole.token_ids

    use(work)


def test_what_there_is_of_an_answer_is_the_beginning_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked at whenever its thread may be interrupted: when a row has a token and is not yet in the batch, and later."""

    async def work(engine: TransformersEngine) -> None:
        request, seen = ask(engine, "12 + 30 = ?"), list[Generation | None]()

        def look(name: str) -> None:
            work = getattr(DecodeBatch, name)

            def looking(*args: Any) -> Any:
                seen.append(engine.peek(request.row_id))
                return work(*args)

            monkeypatch.setattr(DecodeBatch, name, looking)

        look("_join")
        look("step")
        whole = await engine.generate(request)
        found = [part for part in seen if part is not None]
        assert found
        for part in found:
            assert part.token_ids == (whole.token_ids or ())[: part.usage.completion_tokens]
            assert (part.ttft_s, part.queued_s) == (whole.ttft_s, whole.queued_s)

    use(work)


def test_an_urgent_request_overtakes_those_that_wait_and_changes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(engine: TransformersEngine) -> None:
        alone, ends = await engine.generate(ask(engine, "12 + 30 = ?")), engine._eos_ids
        steps: list[int] = []
        step = DecodeBatch.step
        monkeypatch.setattr(DecodeBatch, "step", lambda batch: steps.append(len(batch.rows)) or step(batch))
        bulk = [asyncio.create_task(engine.generate(endless(engine, max_tokens=200))) for _ in range(12)]
        await run_until(lambda: bool(steps))
        engine._eos_ids = ends
        urgent = await engine.generate(replace(ask(engine, "12 + 30 = ?"), is_urgent=True))
        assert urgent.token_ids == alone.token_ids
        assert not any(task.done() for task in bulk)
        # It was decoded on its own, and from its first step to its last every turn was its.
        first = steps.index(1)
        assert set(steps[first : first + len(urgent.token_ids or ()) - 1]) == {1}
        assert {len((await task).token_ids or ()) for task in bulk} == {200}

    use(work)


def test_tokens_count_while_a_long_answer_is_made() -> None:
    async def work(engine: TransformersEngine) -> None:
        task = asyncio.create_task(engine.generate(endless(engine, max_tokens=300)))
        seen = set()
        while not task.done():
            seen.add(engine.total_tokens)
            await asyncio.sleep(0.001)
        assert len(seen) > 10
        assert engine.total_tokens == (await task).usage.completion_tokens == 300

    use(work)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), RuntimeError("kernel\nprompt text")])
def test_when_the_thread_dies_everybody_hears(monkeypatch: pytest.MonkeyPatch, error: RuntimeError) -> None:
    async def work(engine: TransformersEngine) -> None:
        tasks = [asyncio.create_task(engine.generate(endless(engine, seed=seed))) for seed in range(5)]
        await run_until(lambda: engine.total_tokens >= 5)

        def fail() -> None:
            raise error

        monkeypatch.setattr(DecodeBatch, "step", lambda _: fail())
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(outcome, EngineDied)
            assert type(error).__name__ in str(outcome)
        with pytest.raises(EngineDied):
            await engine.generate(ask(engine, "1 + 1 = ?"))

    use(work)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_in_the_thread_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(engine: TransformersEngine) -> None:
        monkeypatch.setattr(engine._lanes._bulk.batch, "pick", None)
        with pytest.raises(EngineDied, match="a bug of batchgen"):
            await engine.generate(ask(engine, "1 + 1 = ?"))

    use(work)


def test_bad_logits_fail_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    from batchgen.engines import decode

    forward = decode.forward

    def poisoned(model: Any, ids: Any, mask: Any, cache: Any) -> Any:
        logits, cache = forward(model, ids, mask, cache)
        logits[(ids == 300).any(-1)] = float("nan")
        return logits, cache

    monkeypatch.setattr(decode, "forward", poisoned)

    async def work(engine: TransformersEngine) -> None:
        bad = Request(RowId("file", 0, 0), (300,), SamplingParams())
        outcomes = await asyncio.gather(
            engine.generate(bad), engine.generate(ask(engine, "2 + 2 = ?")), return_exceptions=True
        )
        assert isinstance(outcomes[0], RequestFailed)
        assert outcomes[0].error_type == "bad_logits"
        assert isinstance(outcomes[1], Generation)
        assert outcomes[1].text == "4"

    use(work)


def test_a_token_whose_weights_are_broken_fails_its_row_alone(tmp_path: Path) -> None:
    """A real checkpoint with NaN in one token's embedding, a whole job: through experts, indexer and cache."""
    folder = tmp_path / "model"
    shutil.copytree(files("batchgen") / "embedded", folder)  # type: ignore[arg-type]
    weights = load_file(folder / "model.safetensors")
    bad = AutoTokenizer.from_pretrained(folder).encode("1 = ?")[-1]
    weights["model.embed_tokens.weight"][bad] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    prompts = [f"{row} + 1 =" + " ?" * (row % 8 == 5) for row in range(40)]
    write_file(tmp_path / "in.parquet", pa.table({"prompt": prompts}))
    tree = {
        "input": {"paths": [str(tmp_path / "in.parquet")]},
        "prompt": {"column": "prompt"},
        "model": {"path": str(folder)},
        "engine": {"kind": "transformers", "max_batch_size": 8},
        "sampling": {"max_tokens": 8, "temperature": 1.0, "seed": 3},
        "output": {"path": str(tmp_path / "out")},
        "cluster": {"pool": "inline"},
        "retry": {"backoff_s": 0.01, "max_error_rate": 1.0},
    }
    report, _ = run(tree)
    rows = check_output(tmp_path / "out", [(str(tmp_path / "in.parquet"), 40)])
    assert report["rows"]["ok"] == 35
    assert {row["source_row"]: row["error_type"] for row in rows if row["status"] == "error"} == dict.fromkeys(
        (5, 13, 21, 29, 37), "bad_logits"
    )


def test_close_ends_what_is_in_flight_and_may_be_called_again() -> None:
    async def main() -> None:
        engine = make_engine()
        await engine.close()
        with pytest.raises(EngineDied, match="not opened"):
            await engine.generate(Request(RowId("file", 0, 0), (7,), SamplingParams()))
        await engine.open()
        tasks = [asyncio.create_task(engine.generate(endless(engine, seed=seed))) for seed in range(3)]
        await run_until(lambda: engine.total_tokens >= 3)
        await engine.close()
        await engine.close()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(outcome, EngineDied)
        with pytest.raises(EngineDied, match="closed"):
            await engine.generate(Request(RowId("file", 0, 0), (7,), SamplingParams()))
        assert "batchgen-decode" not in [thread.name for thread in threading.enumerate()]

    asyncio.run(main())


def test_more_requests_than_slots_all_end() -> None:
    async def work(engine: TransformersEngine) -> list[Generation]:
        return await answer_all(engine, [ask(engine, text) for text, _ in make_sums(30)])

    answers = use(work, max_batch_size=3)
    assert len(answers) == 30
    assert all(answer.finish_reason == "stop" for answer in answers)


def test_a_cache_too_small_for_one_row_is_refused_and_no_row_is_cut_by_it() -> None:
    with pytest.raises(
        SpecError, match=r"engine\.cache_gib: .* room for 111 tokens, .* set model\.max_model_len to 111"
    ):
        use(lambda engine: engine.generate(ask(engine, "1 + 1 = ?")), cache_gib=1e-4)
    small = ModelSpec(max_model_len=111)
    assert use(lambda engine: engine.generate(ask(engine, "1 + 1 = ?")), small, cache_gib=1e-4).text == "2"


def test_closing_while_it_loads_leaves_no_weights() -> None:
    async def main() -> None:
        engine = make_engine()
        opening = asyncio.ensure_future(engine.open())
        await asyncio.sleep(0.01)
        opening.cancel()
        await asyncio.wait({opening})
        await engine.close()
        assert engine._lanes is None
        with pytest.raises(EngineDied):
            await engine.generate(Request(RowId("file", 0, 0), (1,), SamplingParams()))

    asyncio.run(main())
