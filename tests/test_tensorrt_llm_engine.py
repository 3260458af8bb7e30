"""The TensorRT-LLM engine under the stand-in: the contract, and every way in which an engine goes wrong."""

import asyncio
import os
import shutil
import signal
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from makers import make_job_spec
from trtllm_util import (
    CHILD,
    KEEPER,
    RANK,
    SMALL,
    StandIn,
    catch,
    create_stand_in,
    hold_gpu,
    make_engine,
    make_request,
    opened,
    persist,
    read_calls,
    until,
)

import batchgen
from batchgen.engines import create_engine, tensorrt_llm
from batchgen.engines.base import Answering
from batchgen.engines.contract import CHECKS, Subject
from batchgen.engines.tensorrt_llm import TensorRTLLMEngine
from batchgen.errors import EngineDied, EngineRestarted, EngineUnavailable, RequestFailed, RequestRejected, SpecError
from batchgen.records import Generation, Guided, Prompt, Request, RowId, SamplingParams
from batchgen.spec import ModelSpec
from batchgen.worker.continuation import make_serving

# Answers that go on for a second: as long as max_tokens lets them.
SLOW = {"token_s": 0.005, "max_natural_tokens": 1_000_000}
# What an engine that lives has then, it finishes at once.
AT_ONCE = {**SLOW, "token_s": 0.0}
HASTY: dict[str, Any] = {"no_progress_s": 0.8, "canary_interval_s": 30}
# Five seconds at least: as long as a prompt lets it in a model of 1,024 tokens.
ENDLESS = SamplingParams(max_tokens=1000, seed=3)
LONG = SamplingParams(max_tokens=200, seed=3)
# Checks of the contract that need an answer to take its time.
CUT_SHORT = {
    "check_a_cancelled_request_is_gone",
    "check_the_cancelled_is_not_worked_on",
    "check_close_ends_what_is_in_flight",
}


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return create_stand_in(tmp_path, monkeypatch)


def run(test: Awaitable[None]) -> None:
    async def main() -> None:
        await test

    asyncio.run(main())


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check: Callable[[Subject], Awaitable[None]], stand_in: StandIn) -> None:
    if check.__name__ in CUT_SHORT:
        stand_in.control(token_s=0.002)
    spec = make_job_spec(engine=SMALL, model={"path": "embedded", "max_model_len": 512})
    too_long = Prompt(messages=({"role": "user", "content": "word " * 2000},))
    long = SamplingParams(max_tokens=400, seed=1)
    run(check(Subject(spec, long_sampling=long, rejected=too_long, read_max_inflight=stand_in.read_max_inflight)))
    stand_in.check_nothing_left()


def test_an_answer_has_what_the_engine_said(stand_in: StandIn) -> None:
    async def main() -> None:
        async with opened(stand_in) as engine:
            assert engine.version == "1.2.1"
            answer = await engine.generate(make_request(1))
            assert answer.usage.prompt_tokens == 8
            assert answer.usage.completion_tokens == engine.total_tokens
            assert answer.ttft_s is not None
            assert answer.queued_s is not None
            again = await engine.generate(make_request(1))
            assert again.token_ids == answer.token_ids

    run(main())


def test_max_tokens_is_fitted_to_the_room_there_is(stand_in: StandIn) -> None:
    async def main() -> None:
        engine = make_engine(stand_in, model=ModelSpec(path="embedded", max_model_len=16))
        await engine.open()
        try:
            assert engine.max_model_len == 16
            answer = await engine.generate(make_request(1, length=10, max_tokens=1000))
            assert (answer.usage.completion_tokens or 0) <= 6
            with pytest.raises(RequestRejected, match="16 fit"):
                await engine.generate(make_request(1, length=16))
        finally:
            await engine.close()

    run(main())


# ---- it can't be started


START_FAULTS = {
    "oom": "out of memory",
    "worker_died": "Executor worker died",
    "exit": "the engine's process ended while it started; its log: ",
}


@pytest.mark.parametrize("fault", START_FAULTS)
def test_a_start_that_fails(fault: str, stand_in: StandIn) -> None:
    stand_in.control(start_fault=fault)
    engine = make_engine(stand_in)
    with pytest.raises(EngineDied, match="its log: "):
        run(engine.open())
    stand_in.check_nothing_left()


def test_a_start_that_hangs(stand_in: StandIn) -> None:
    stand_in.control(start_fault="hang")
    engine = make_engine(stand_in, start_timeout_s=0.8)
    started = time.monotonic()
    with pytest.raises(EngineDied, match=r"not up after 0.8 s \(engine.start_timeout_s\)"):
        run(engine.open())
    assert time.monotonic() - started < 60
    stand_in.check_nothing_left()


def test_what_the_version_does_not_take_is_the_specs_fault(stand_in: StandIn) -> None:
    engine = make_engine(stand_in, extra={"no_such_argument": 1})
    with pytest.raises(SpecError, match="no_such_argument"):
        run(engine.open())
    stand_in.check_nothing_left()


def test_an_unknown_model_is_refused_before_anything_starts(stand_in: StandIn) -> None:
    engine = make_engine(stand_in, model=ModelSpec(path="/no/such/folder"))
    with pytest.raises(EngineDied, match="/no/such/folder is not a folder on this machine"):
        run(engine.open())
    assert stand_in.count_llms() == 0


def test_gpu_memory_that_somebody_holds(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused with the GPU's name while it is held; started at once when it is free."""

    async def main() -> None:
        monkeypatch.setattr(tensorrt_llm, "GPU_LOOK_S", 0.02)
        holder = hold_gpu(str(stand_in.gpus), 1)
        engine = make_engine(stand_in, gpu_free_timeout_s=0.3)
        with pytest.raises(EngineDied, match=r"not free after 0.3 s \(engine.gpu_free_timeout_s\): GPU 1: 150.0 GiB"):
            await engine.open()
        assert stand_in.count_llms() == 0
        engine = make_engine(stand_in, gpu_free_timeout_s=30)
        opening = asyncio.ensure_future(engine.open())
        await asyncio.sleep(0.1)
        assert not opening.done()
        holder.close()
        await opening
        await engine.close()

    run(main())


def test_closed_while_it_starts(stand_in: StandIn) -> None:
    async def main() -> None:
        stand_in.control(start_s=30)
        engine = make_engine(stand_in)
        opening = asyncio.ensure_future(engine.open())
        await until(lambda: len(stand_in.list_held()) == 2, "its ranks are up")
        await engine.close()
        with pytest.raises(EngineDied, match="closed"):
            await opening
        stand_in.check_nothing_left()

        opening = asyncio.ensure_future(make_engine(stand_in).open())
        await until(lambda: len(stand_in.list_held()) == 2, "its ranks are up")
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening

    run(main())
    stand_in.check_nothing_left()


# ---- it dies or hangs


async def start_rows(
    stand_in: StandIn, engine: TensorRTLLMEngine, num_rows: int = 4, sampling: SamplingParams = LONG
) -> list["asyncio.Task[Any]"]:
    """Rows that the engine has taken."""
    wanted = stand_in.count_requests() + num_rows
    rows = [replace(make_request(row), sampling=replace(sampling, seed=row)) for row in range(num_rows)]
    tasks = [asyncio.ensure_future(catch(engine, row)) for row in rows]
    await until(lambda: stand_in.count_requests() >= wanted, "they are taken")
    return tasks


FAULTS: dict[str, dict[str, Any]] = {
    "a rank dies": {**AT_ONCE, "die": 1},
    "every rank hangs": {**SLOW, "hang": 1},
    "the executor shuts down": {**SLOW, "unhealthy": 1},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_dead_or_stuck_engine_is_started_anew(fault: str, stand_in: StandIn) -> None:
    """Within the configured time; what was in flight costs its row no attempt, and is answered by the new one."""

    async def main() -> None:
        stand_in.control(**SLOW)
        async with opened(stand_in, **HASTY) as engine:
            tasks = await start_rows(stand_in, engine)
            broken_at = time.monotonic()
            stand_in.control(**FAULTS[fault])
            ends = await asyncio.wait_for(asyncio.gather(*tasks), 60)
            # What a rank that lives had is answered meanwhile.
            assert {type(end) for end in ends} <= {EngineRestarted, EngineUnavailable, Generation}, ends
            assert any(isinstance(end, EngineUnavailable) for end in ends), ends
            stand_in.control(token_s=0.0)
            refused = await catch(engine, make_request(9))
            assert isinstance(refused, EngineUnavailable)
            assert refused.error_type == "engine_restarting"
            answer = await persist(engine, make_request(9))
            assert answer.finish_reason
            took_s = time.monotonic() - broken_at
            assert took_s < HASTY["no_progress_s"] + 10.0, f"mended after {took_s:.1f} s"
            assert stand_in.count_llms() == 2

    run(main())


def test_an_idle_engine_that_hangs_is_noticed_by_its_canary(stand_in: StandIn) -> None:
    async def main() -> None:
        async with opened(stand_in, no_progress_s=0.8, canary_interval_s=0.2) as engine:
            await until(lambda: stand_in.count_requests() > 2, "canaries are sent")  # the first is of its start
            assert stand_in.count_llms() == 1, "canaries that are answered are no reason for anything"
            assert engine.total_tokens == 0, "and count as no work"
            stand_in.control(hang=1)
            await until(lambda: stand_in.count_llms() == 2, "it is started anew")
            assert (await persist(engine, make_request(1))).finish_reason

    run(main())


def test_a_crash_that_surfaces_in_a_submit(stand_in: StandIn) -> None:
    async def main() -> None:
        async with opened(stand_in, **HASTY) as engine:
            stand_in.control(crash=1)
            end = await catch(engine, make_request(1))
            assert isinstance(end, EngineUnavailable)
            assert (await persist(engine, make_request(1))).finish_reason
            assert stand_in.count_llms() == 2

    run(main())


def test_a_rank_that_fails_its_requests_and_goes_on(stand_in: StandIn) -> None:
    """They may be tried again, and nobody restarts anything."""

    async def main() -> None:
        stand_in.control(**SLOW)
        async with opened(stand_in, no_progress_s=5) as engine:
            tasks = await start_rows(stand_in, engine)
            stand_in.control(**AT_ONCE, fail_active=[1, 0])
            ends = await asyncio.gather(*tasks)
            failed = [end for end in ends if isinstance(end, RequestFailed)]
            assert failed
            assert not any(isinstance(end, EngineUnavailable) for end in ends)
            assert sum(isinstance(end, Generation) for end in ends) == len(ends) - len(failed)
            stand_in.control()
            assert (await engine.generate(make_request(1))).finish_reason
            assert stand_in.count_llms() == 1

    run(main())


def test_an_engine_that_fails_all_it_gets_is_started_anew(stand_in: StandIn) -> None:
    """As after a CUDA error that stays: it fails at once, goes on and calls itself healthy, while a job turns to errors."""

    async def main() -> None:
        async with opened(stand_in) as engine:
            stand_in.control(fail_all=True)
            ends: list[Any] = []
            while not ends or not isinstance(ends[-1], EngineUnavailable):
                ends += await asyncio.gather(*(catch(engine, make_request(row)) for row in range(4)))
                assert len(ends) < 100, "it goes on for ever"
            failed = [end for end in ends if isinstance(end, RequestFailed) and end.error_type == "request_failed"]
            assert len(failed) >= 12
            stand_in.control()
            assert (await persist(engine, make_request(1))).finish_reason
            assert stand_in.count_llms() >= 2

    run(main())


@pytest.mark.parametrize("victim", [CHILD, KEEPER, RANK])
def test_orphans_of_a_killed_process_are_ended(victim: str, stand_in: StandIn) -> None:
    """Ranks that heed neither SIGTERM nor the end of the main process, and hold their GPU's memory."""

    async def main() -> None:
        stand_in.control(**SLOW, orphans=True)
        async with opened(stand_in, **HASTY) as engine:
            tasks = await start_rows(stand_in, engine)
            old = set(stand_in.list_pids())
            if victim == RANK:
                os.kill(stand_in.list_pids(victim)[0], signal.SIGKILL)
            else:
                stand_in.kill(victim)
            stand_in.control(**AT_ONCE)  # those of the next start end as they should
            ends = await asyncio.wait_for(asyncio.gather(*tasks), 60)
            assert any(isinstance(end, EngineUnavailable) for end in ends)
            assert (await persist(engine, make_request(9))).finish_reason
            assert not old & set(stand_in.list_pids()), "nothing of the old engine lives beside the new one"

    run(main())


def test_each_death_is_told_to_those_that_were_in_flight_and_to_nobody_else(stand_in: StandIn) -> None:
    async def main() -> None:
        stand_in.control(**SLOW)
        async with opened(stand_in, max_restarts=9) as engine:
            tasks = await start_rows(stand_in, engine, 3)
            stand_in.kill(CHILD)
            assert {type(end) for end in await asyncio.gather(*tasks)} == {EngineRestarted}
            with pytest.raises(EngineUnavailable) as refused:
                await engine.generate(make_request(9))
            assert type(refused.value) is EngineUnavailable

    run(main())


def test_restarts_that_help_nobody_end_the_worker(stand_in: StandIn) -> None:
    async def main() -> None:
        stand_in.control(**SLOW)
        engine = make_engine(stand_in, max_restarts=2)
        await engine.open()
        try:
            tasks = await start_rows(stand_in, engine, sampling=ENDLESS)
            stand_in.control(start_fault="exit")
            stand_in.kill(CHILD)
            assert {type(end) for end in await asyncio.gather(*tasks)} == {EngineRestarted}
            with pytest.raises(EngineDied, match=r"2 starts of the engine in a row finished no request"):
                await asyncio.wait_for(persist(engine, make_request(1)), 60)
            assert stand_in.count_llms() <= 3
        finally:
            await engine.close()

    run(main())
    stand_in.check_nothing_left()


# ---- it wears out


def test_empty_answers_are_failures_and_have_it_started_anew(stand_in: StandIn) -> None:
    async def main() -> None:
        async with opened(stand_in, max_empty_in_a_row=3) as engine:
            stand_in.control(empty_answers=True)
            ends = [await catch(engine, make_request(row)) for row in range(3)]
            assert [end.error_type for end in ends if isinstance(end, RequestFailed)] == ["empty_answer"] * 3
            await until(lambda: stand_in.count_llms() == 2, "it is started anew")
            stand_in.control()
            answer = await persist(engine, make_request(3))
            assert answer.usage.completion_tokens

    run(main())


def test_logits_that_are_no_numbers_fail_their_row_where_logprobs_show_them(stand_in: StandIn) -> None:
    async def main() -> None:
        async with opened(stand_in) as engine:
            stand_in.control(nan_token=5)
            told = SamplingParams(max_tokens=4, logprobs=0)
            bad, good = (Request(RowId("f", row, 0), (3, token), told) for row, token in enumerate((5, 6)))
            ends = await asyncio.gather(catch(engine, bad), catch(engine, good))
            assert (type(ends[0]), ends[0].error_type) == (RequestFailed, "bad_logits")
            assert isinstance(ends[1], Generation)

    run(main())


def test_memory_that_grows_has_it_started_anew_in_order(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in flight finishes, nothing new is taken, and nobody loses anything."""

    async def main() -> None:
        monkeypatch.setattr(tensorrt_llm, "BEAT_S", 0.05)
        stand_in.control(**SLOW, rss_bytes_per_request=30 * 2**20)
        async with opened(stand_in, max_rss_growth_gib=0.1, no_progress_s=2) as engine:
            client = engine._client
            assert client is not None
            await until(lambda: client._health.first_rss_bytes, "a beat tells what it holds")
            tasks = await start_rows(stand_in, engine, 6)
            await until(lambda: not client.is_open, "it is worn")
            assert not any(task.done() for task in tasks)
            assert isinstance(await catch(engine, make_request(7)), EngineUnavailable)
            stand_in.control(**AT_ONCE)
            ends = await asyncio.gather(*tasks)
            assert {type(end) for end in ends} == {Generation}
            stand_in.control()
            assert (await persist(engine, make_request(7))).finish_reason
            await until(lambda: stand_in.count_llms() == 2, "it is started anew")

    run(main())


def test_a_recycle_waits_so_long_and_no_longer(stand_in: StandIn) -> None:
    async def main() -> None:
        stand_in.control(**SLOW)
        async with opened(stand_in, max_empty_in_a_row=1, recycle_drain_s=0.2) as engine:
            tasks = await start_rows(stand_in, engine, 2)
            stand_in.control(**SLOW, empty_answers=1)
            assert isinstance(await catch(engine, make_request(5)), RequestFailed)
            ends = await asyncio.wait_for(asyncio.gather(*tasks), 60)
            assert {type(end) for end in ends} == {EngineUnavailable}
            assert (await persist(engine, make_request(6))).finish_reason

    run(main())


def test_a_request_that_takes_too_long_fails_alone(stand_in: StandIn) -> None:
    """At 50 tokens a second where 100 are believed: one that goes on to its max_tokens (it would make 56) is late, one that
    ends long before has time left."""

    async def main() -> None:
        stand_in.control(token_s=0.02)
        async with opened(stand_in, request_base_s=0, min_tokens_per_s=100) as engine:
            late = catch(engine, make_request(1, max_tokens=30, seed=2))
            early = catch(engine, make_request(2, max_tokens=1000))
            end, other = await asyncio.gather(late, early)
            assert isinstance(other, Generation)
            assert isinstance(end, RequestFailed)
            assert end.error_type == "deadline"
            assert not isinstance(end, EngineUnavailable)
            assert stand_in.count_llms() == 1

    run(main())


# ---- it is closed


def test_close_does_not_wait_for_a_shutdown_that_hangs(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        monkeypatch.setattr(tensorrt_llm, "STOP_S", 0.3)
        async with opened(stand_in) as engine:
            stand_in.control(hang_shutdown=True)
            started = time.monotonic()
            await engine.close()
            assert time.monotonic() - started < 15

    run(main())


def test_closed_while_it_is_started_anew(stand_in: StandIn) -> None:
    async def main() -> None:
        async with opened(stand_in) as engine:
            stand_in.control(start_s=30)
            stand_in.kill(CHILD)
            await until(lambda: stand_in.count_llms() == 2, "it is being started anew")
            assert isinstance(await catch(engine, make_request(1)), EngineUnavailable)
            await asyncio.gather(engine.close(), engine.close())
            assert isinstance(await catch(engine, make_request(1)), EngineDied)

    run(main())


@asynccontextmanager
async def measuring_machine() -> AsyncIterator[list[float]]:
    """How late a thread is that sleeps, in seconds, all the time."""
    waits, is_over = [0.0], threading.Event()

    def look() -> None:
        while not is_over.is_set():
            started = time.monotonic()
            is_over.wait(0.01)
            waits.append(time.monotonic() - started)

    with ThreadPoolExecutor(1) as threads:
        looking = threads.submit(look)
        try:
            yield waits
        finally:
            is_over.set()
            looking.result()


def test_the_loop_goes_on_while_the_engine_is_stopped(stand_in: StandIn) -> None:
    """SIGSTOP to the engine's process: heartbeats of the worker must still go out. A thread tells how long this process
    had to wait for the machine itself."""

    async def main() -> None:
        async with opened(stand_in, **HASTY) as engine, measuring_machine() as waits:
            (child,) = stand_in.list_pids(CHILD)
            os.kill(child, signal.SIGSTOP)
            asking = asyncio.ensure_future(persist(engine, make_request(1)))
            longest, last = 0.0, time.monotonic()
            while not asking.done():
                await asyncio.sleep(0.01)
                longest, last = max(longest, time.monotonic() - last), time.monotonic()
            assert (await asking).finish_reason
            assert longest < 0.5 + max(waits)
            assert stand_in.count_llms() == 2

    run(main())


def test_it_is_made_by_the_table(stand_in: StandIn) -> None:
    del stand_in
    engine = create_engine(make_job_spec(engine={"kind": "tensorrt_llm"}))
    assert isinstance(engine, TensorRTLLMEngine)


def test_a_node_that_can_not_carry_it_is_refused_in_seconds(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN_NO_MPI", "1")

    async def main() -> None:
        started = time.monotonic()
        with pytest.raises(EngineDied, match=r"this node can't carry the engine: mpi: .* can't spawn a process"):
            await make_engine(stand_in).open()
        assert time.monotonic() - started < 60

    run(main())
    monkeypatch.delenv("STAND_IN_NO_MPI")
    with pytest.raises(EngineDied, match=r"8 x NVIDIA B200.* where the engine needs 16"):
        run(make_engine(stand_in, tensor_parallel_size=16).open())
    assert stand_in.count_llms() == 0


def test_the_weights_are_brought_to_this_node_first(stand_in: StandIn, tmp_path: Path) -> None:
    source = tmp_path / "far"
    shutil.copytree(Path(batchgen.__file__).parent / "embedded", source)
    model = ModelSpec(path=str(source), stage_dir=str(tmp_path / "nvme"))

    async def main() -> None:
        engine = make_engine(stand_in, model=model)
        await engine.open()
        await engine.close()

    run(main())
    (loaded,) = [call["llm"]["model"] for call in read_calls(stand_in.path) if "llm" in call]
    assert loaded.startswith(str(tmp_path / "nvme"))


def test_deepseeks_own_encoding_is_compared_with_the_engines(
    stand_in: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    """The stand-in's tokenizer is another writing of it, which knows no tools: that is told, and no more."""

    async def main() -> None:
        async with opened(stand_in, custom_tokenizer="deepseek_v32") as engine:
            assert engine.tokenizer is not None
            ids = engine.tokenizer.encode_chat([{"role": "user", "content": "1 + 1 = ?"}], thinking=True)
            answer = await engine.generate(Request(RowId("f", 0, 0), tuple(ids), SamplingParams(max_tokens=8, seed=1)))
            assert answer.usage.completion_tokens

    run(main())
    assert "can't render chat probe 7 of 10" in caplog.text


def test_thoughts_are_not_held_to_the_form_of_the_answer(stand_in: StandIn) -> None:
    async def main() -> None:
        async with opened(stand_in, guided_decoding_backend="xgrammar") as engine:
            guided = Guided(json_schema='{"type":"object"}')
            with pytest.raises(RequestRejected, match="guided: it would hold the thoughts"):
                await engine.generate(make_request(1, thinking=True, guided=guided))
            await engine.generate(make_request(1, guided=guided))

    run(main())
    (sent,) = [call["sampling"] for call in read_calls(stand_in.path) if "prompt" in call][-1:]
    assert '{"type":"object"}' in str(sent)


# ---- parts and ranks -------------------------------------------------------------------------------------------------


def make_serving_of(engine: TensorRTLLMEngine, **section: Any) -> Answering:
    return make_serving(engine, make_job_spec(engine={**SMALL, **section}, sampling={"max_tokens": 100}), None)


def test_rows_in_parts_are_answered_as_in_one_shot_and_every_request_is_pinned(stand_in: StandIn) -> None:
    """Stop strings across seams, and canaries in between, which would take the pins of all others off."""

    async def main() -> None:
        async with opened(stand_in, canary_interval_s=0.05) as engine:
            serving = make_serving_of(engine, token_budget=5)
            rows = [make_request(row, max_tokens=60, temperature=0.0, seed=None, logprobs=1) for row in range(8)]
            free = [await engine.generate(row) for row in rows]
            marks = [answer.text[3:6] or "x" for answer in free]
            rows += [replace(r, sampling=replace(r.sampling, stop=(m,))) for r, m in zip(rows, marks, strict=True)]
            one_shot = [await engine.generate(row) for row in rows]
            await until(lambda: stand_in.count_requests() > len(free) + len(rows) + 3, "canaries come")
            num_before = len(read_calls(stand_in.path))
            answers = await asyncio.gather(*map(serving.generate, rows))
            for ours, theirs in zip(answers, one_shot, strict=True):
                assert (ours.text, ours.token_ids) == (theirs.text, theirs.token_ids)
                assert (ours.finish_reason, ours.logprobs) == (theirs.finish_reason, theirs.logprobs)
                # The vendor counts the tokens of a stop string that it met as such; of one across a seam we know all.
                num_tokens = (ours.usage.completion_tokens or 0) - (theirs.usage.completion_tokens or 0)
                assert replace(ours.usage, completion_tokens=0) == replace(theirs.usage, completion_tokens=0)
                assert 0 <= num_tokens <= (3 if ours.finish_reason == "stop" else 0)
            await until(lambda: len(read_calls(stand_in.path)) > num_before + 40, "parts and canaries are noted")
            calls = [call for call in read_calls(stand_in.path)[num_before:] if "prompt" in call]
            assert {call["is_pinned"] for call in calls} == {True}
            assert {call["rank"] for call in calls} == {0, 1}
            assert max(call["sampling"]["max_tokens"] for call in calls) <= 20

    run(main())


def test_an_engine_that_dies_costs_a_row_its_last_part_only(stand_in: StandIn) -> None:
    async def main() -> None:
        async with opened(stand_in) as engine:
            serving = make_serving_of(engine, token_budget=10)
            row = make_request(1, max_tokens=100, temperature=0.0, seed=None)
            stand_in.control(**AT_ONCE)
            one_shot = await engine.generate(row)
            stand_in.control(**SLOW)
            num_before = stand_in.count_requests()
            asking = asyncio.ensure_future(serving.generate(row))
            await until(lambda: stand_in.count_requests() == num_before + 3, "its third part begins")
            stand_in.kill(CHILD)
            stand_in.control(**AT_ONCE)
            with pytest.raises(EngineUnavailable):
                await asking
            answer = await persist(serving, row)
            assert (answer.token_ids, answer.usage) == (one_shot.token_ids, one_shot.usage)
            prompts = [len(call["prompt"]) for call in read_calls(stand_in.path) if "prompt" in call]
            assert [each - len(row.ids) for each in prompts if each > len(row.ids)] == [10, 20, 20, 40, 80]

    run(main())


def test_a_rank_that_is_not_there_is_refused_here(stand_in: StandIn) -> None:
    """The vendor's would end the engine."""

    async def main() -> None:
        async with opened(stand_in) as engine:
            with pytest.raises(RequestRejected, match="one of the engine's 2"):
                await engine.generate(replace(make_request(1), rank=2))

    run(main())
