"""The simulated engine's lengths and limits. How a run behaves on it is in test_run.py."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from jobs_util import make_tree, read_rows, run, write_file
from makers import make_job_spec, make_request

from batchgen.engines import create_engine
from batchgen.engines.simulated import SimulatedEngine, read_calls, read_spans
from batchgen.records import Generation, Partial
from batchgen.specs.engine import SimulatedEngineSpec


def generate(engine: SimulatedEngine, max_tokens: int) -> Generation:
    async def work() -> Generation:
        await engine.open()
        return await engine.generate(make_request(max_tokens=max_tokens))

    return asyncio.run(work())


@pytest.mark.parametrize("has_latency", [True, False])
def test_answers_can_be_exactly_as_long_as_asked(has_latency: bool) -> None:
    spec = SimulatedEngineSpec(
        kind="simulated", length="max_tokens", has_latency=has_latency, decode_tokens_per_s=1e6, mean_tokens=3
    )
    for num_tokens in (1, 7, 5_000):
        engine = SimulatedEngine(spec)
        answer = generate(engine, num_tokens)
        assert (answer.usage.completion_tokens, answer.finish_reason) == (num_tokens, "stop")
        assert engine.total_tokens == num_tokens


def test_lengths_are_drawn_and_cut_without_being_asked() -> None:
    spec = SimulatedEngineSpec(kind="simulated", has_latency=False, mean_tokens=50, sigma=0)
    assert generate(SimulatedEngine(spec), 1000).usage.completion_tokens == 50
    cut = generate(SimulatedEngine(spec), 20)
    assert (cut.usage.completion_tokens, cut.finish_reason) == (20, "length")


def test_a_column_gives_the_lengths(tmp_path: Path) -> None:
    lengths = [1, 40, 300, 12]
    table = pa.table({"prompt": ["p"] * 4, "own": [{"max_tokens": length} for length in lengths]})
    write_file(tmp_path / "in.parquet", table)
    tree = make_tree(
        tmp_path / "in.parquet", tmp_path / "out", prompt={"sampling": "own"}, engine={"length": "max_tokens"}
    )
    assert run(tree)[0]["exit_code"] == 0
    rows = read_rows(tmp_path / "out")
    assert [row["completion_tokens"] for row in rows] == lengths
    assert {row["finish_reason"] for row in rows} == {"stop"}


@pytest.mark.parametrize(("engine", "model", "used"), [(100, None, 100), (100, 60, 60), (100, 500, 100)])
def test_the_smaller_limit_counts(engine: int, model: int | None, used: int) -> None:
    spec = make_job_spec(engine={"kind": "simulated", "max_model_len": engine}, model={"max_model_len": model})
    assert create_engine(spec).max_model_len == used


def test_answers_end_when_they_are_due_and_say_when_they_had_their_slot(tmp_path: Path) -> None:
    spec = SimulatedEngineSpec(
        kind="simulated", length="max_tokens", slots=2, decode_tokens_per_s=1000, call_log=str(tmp_path)
    )

    async def work() -> tuple[int, list[Generation]]:
        engine = SimulatedEngine(spec)
        await engine.open()
        answers = await asyncio.gather(*(engine.generate(make_request(row, max_tokens=77)) for row in range(6)))
        await engine.close()
        return engine.total_tokens, answers

    total_tokens, answers = asyncio.run(work())
    assert total_tokens == 6 * 77 == sum(answer.usage.completion_tokens or 0 for answer in answers)
    spans = sorted(read_spans(str(tmp_path)))
    assert len(spans) == len(read_calls(str(tmp_path))) == 6
    assert all(end - start >= 0.0769 for start, end in spans), "no answer is early"
    for start, _ in spans:
        others = sum(begin <= start + 1e-3 < end - 1e-3 for begin, end in spans)
        assert others <= 2, "more answers at once than slots"


def test_any_split_of_an_answer_makes_the_same_answer() -> None:
    spec = SimulatedEngineSpec(kind="simulated", has_latency=False, mean_tokens=50, sigma=0.5)

    async def work() -> None:
        engine = SimulatedEngine(spec)
        await engine.open()
        request = make_request(max_tokens=1000, seed=7, thinking=True)
        whole = await engine.generate(request)
        assert whole.token_ids is not None
        assert len(whole.token_ids) == whole.usage.completion_tokens
        assert whole.text == engine.tokenizer.decode(whole.token_ids)
        for end in range(1, len(whole.token_ids)):
            part = await engine.generate(replace(request, sampling=replace(request.sampling, max_tokens=end)))
            assert (part.token_ids, part.finish_reason) == (whole.token_ids[:end], "length")
            rest = await engine.generate(replace(request, partial=Partial(part.token_ids)))
            assert (rest.token_ids, rest.finish_reason) == (whole.token_ids[end:], "stop")

    asyncio.run(work())


def test_a_pinned_request_waits_for_its_rank_and_no_other() -> None:
    """Two ranks of one slot each, and rank 0 is at work for long."""
    spec = SimulatedEngineSpec(kind="simulated", slots=2, ranks=2, decode_tokens_per_s=1000, length="max_tokens")

    async def work() -> None:
        engine = SimulatedEngine(spec)
        await engine.open()
        long, behind, beside = (
            asyncio.ensure_future(engine.generate(replace(make_request(max_tokens=num_tokens), rank=rank)))
            for num_tokens, rank in ((10_000_000, 0), (1, 0), (1, 1))
        )
        await beside
        assert not behind.done()
        long.cancel()
        await behind
        await engine.close()

    asyncio.run(work())
