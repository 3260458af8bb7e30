"""The engine's process of TensorRT-LLM over the real wire. The vendor's package is the stand-in of `tests/stand_in`."""

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from trtllm_child_util import LLM, MODEL, PROMPT, SAMPLED, Child, read_calls, running, until

from batchgen.engines.hf_tokenizer import HFTokenizer
from batchgen.engines.trtllm.wire import Abort, Failed, Finished, Start, Started, StartFailed, Stop, Submit
from batchgen.spec import ModelSpec
from batchgen.worker.stops import cut_text

GREEDY = replace(SAMPLED, temperature=0.0)
LONG = replace(SAMPLED, max_tokens=400)
SLOW = {"token_s": 0.01, "max_natural_tokens": 4000}
PAIRS = {"om", "pu", "te", "at", "is", "an", "ac", "bt", "fr"}
MESSAGES = ({"role": "system", "content": "be brief"}, {"role": "user", "content": "1+1"})


def drive(
    folder: Path, test: Callable[[Child], Coroutine[Any, Any, None]], control: dict[str, Any] | None = None, **env: str
) -> None:
    """A process for this test, started with the usual arguments."""

    async def run() -> None:
        async with running(folder, control=control, **env) as child:
            started = await child.start()
            assert isinstance(started, Started), started
            await test(child)

    asyncio.run(run())


def start_only(folder: Path, start: Start, control: dict[str, Any] | None = None, **env: str) -> Started | StartFailed:
    async def run() -> Started | StartFailed:
        async with running(folder, control=control, **env) as child:
            answer = await child.start(start.llm, has_perf_metrics=start.has_perf_metrics, probes=start.probes)
            if isinstance(answer, StartFailed):
                assert await child.wait() == 1
                await until(lambda: child.list_gpu_holders() == [])  # a SIGKILL takes its time
            return answer

    return asyncio.run(run())


Shared = Callable[[Callable[[Child], Coroutine[Any, Any, None]]], None]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    """One process for all tests that leave it as it was: runs a test with it."""
    with asyncio.Runner() as runner:
        context = running(tmp_path_factory.mktemp("shared"))
        child = runner.run(context.__aenter__())
        assert isinstance(runner.run(child.start()), Started)

        def drive_shared(test: Callable[[Child], Coroutine[Any, Any, None]]) -> None:
            child.begin()
            runner.run(test(child))
            assert child.process.poll() is None

        try:
            yield drive_shared
        finally:
            runner.run(context.__aexit__(None, None, None))


@pytest.fixture(scope="module")
def tokenizer() -> HFTokenizer:
    return HFTokenizer(ModelSpec(path=MODEL))


# ---- answers


def test_the_same_ids_and_seed_give_the_same_tokens(shared: Shared) -> None:
    async def test(child: Child) -> None:
        same, again, seed, prompt = await child.ask(
            (PROMPT, SAMPLED), (PROMPT, SAMPLED), (PROMPT, replace(SAMPLED, seed=2)), (PROMPT[1:], SAMPLED)
        )
        assert same.token_ids == again.token_ids
        assert len({same.token_ids, seed.token_ids, prompt.token_ids}) == 3
        assert [call["prompt"] for call in child.read_requests()] == [list(PROMPT)] * 3 + [list(PROMPT[1:])]
        assert all(call["streaming"] for call in child.read_requests())

    shared(test)


def test_greedy_only_when_asked_and_never_by_default(shared: Shared) -> None:
    async def test(child: Child) -> None:
        seeds = [replace(SAMPLED, seed=seed) for seed in range(4)]
        sampled = await child.ask(*((PROMPT, sampling) for sampling in seeds))
        greedy = await child.ask(*((PROMPT, replace(sampling, temperature=0.0)) for sampling in seeds))
        assert len({answer.token_ids for answer in sampled}) == 4
        assert len({answer.token_ids for answer in greedy}) == 1
        assert all({"temperature", "top_p"} <= call["sampling"].keys() for call in child.read_requests())

    shared(test)


def test_an_answer_ends_by_itself_or_at_max_tokens(shared: Shared, tokenizer: HFTokenizer) -> None:
    async def test(child: Child) -> None:
        whole = await child.ask_one(sampling=LONG)
        size = len(whole.token_ids)
        assert (whole.finish_reason, whole.stop_reason) == ("stop", None)
        assert tokenizer.eos_id not in whole.token_ids
        cut = await child.ask_one(sampling=replace(LONG, max_tokens=size - 1))
        assert (cut.finish_reason, cut.token_ids) == ("length", whole.token_ids[:-1])
        # The vendor's own default of 32 would have cut this one.
        child.control(max_natural_tokens=4000)
        long = await child.ask_one(sampling=LONG)
        assert (long.finish_reason, len(long.token_ids)) == ("length", 400)
        # It clips silently where the context ends.
        end = await child.ask_one(tuple([40] * 500), LONG)
        assert (end.finish_reason, len(end.token_ids)) == ("length", 12)
        assert (await child.read_beat()).total_tokens >= 2 * size + 400

    shared(test)


def test_times_cached_tokens_and_rank_are_passed_on(tmp_path: Path) -> None:
    async def run() -> None:
        async with running(tmp_path, control={"cached_tokens": 7}) as child:
            started = await child.start(has_perf_metrics=True)
            assert isinstance(started, Started)
            assert started.facts["perf_metrics"] == "yes"
            (answer,) = await child.ask((PROMPT, SAMPLED), rank=1)
            assert answer.cached_tokens == 7
            assert answer.ttft_s is not None
            assert answer.queued_s is not None
            assert 0 <= answer.queued_s <= answer.ttft_s < 100
            await child.ask((PROMPT, SAMPLED), rank=0)
            assert [call["rank"] for call in child.read_requests()] == [1, 0]

    asyncio.run(run())


def test_without_perf_metrics_the_queue_time_is_unknown(shared: Shared) -> None:
    async def test(child: Child) -> None:
        answer = await child.ask_one()
        assert answer.queued_s is None
        assert answer.ttft_s > 0

    shared(test)


@pytest.mark.parametrize("old", ["0", "1"])
def test_a_stop_string_ends_the_answer_and_is_no_part_of_it(tmp_path: Path, tokenizer: HFTokenizer, old: str) -> None:
    async def test(child: Child) -> None:
        child.control(max_natural_tokens=4000)
        whole = await child.ask_one(sampling=LONG)
        text = tokenizer.decode(whole.token_ids)
        # The second one is a token of its own, and here two letters spell it.
        for at in (3, next(at for at in range(400) if text[at : at + 2] in PAIRS)):
            stop = text[at : at + 2]
            answer = await child.ask_one(sampling=replace(LONG, stop=("never there", stop)))
            said = cut_text(tokenizer.decode(answer.token_ids), (stop,))
            assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)
            assert said == text[: text.index(stop)]
            assert len(answer.token_ids) <= at
        assert [call["sampling"]["detokenize"] for call in child.read_requests()] == [False, True, True]
        # It does not go on behind our back: by token ids the vendor found the first, and the other's text is ours to see.
        assert [call for call in read_calls(child.folder) if "abort" in call] == [{"abort": 4}]

    drive(tmp_path, test, STAND_IN_OLD=old)


def test_a_stop_token_ends_the_answer_and_is_no_part_of_it(shared: Shared) -> None:
    async def test(child: Child) -> None:
        whole = await child.ask_one(sampling=GREEDY)
        stop = whole.token_ids[3]
        answer = await child.ask_one(sampling=replace(GREEDY, stop_token_ids=(stop,)))
        assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)
        assert answer.token_ids == whole.token_ids[: whole.token_ids.index(stop)]

    shared(test)


def test_logprobs_go_with_the_tokens(shared: Shared) -> None:
    async def test(child: Child) -> None:
        two, drawn_only, none = await child.ask(
            (PROMPT, replace(SAMPLED, logprobs=2)), (PROMPT, replace(SAMPLED, logprobs=0)), (PROMPT, SAMPLED)
        )
        assert two.token_ids == drawn_only.token_ids == none.token_ids
        assert tuple(each.token_id for each in two.logprobs) == two.token_ids
        for each in two.logprobs:
            (_, best), (_, second) = each.top
            assert best > second
            assert (each.token_id, each.logprob) in each.top or each.logprob < second
        assert tuple(each.token_id for each in drawn_only.logprobs) == two.token_ids
        assert {each.top for each in drawn_only.logprobs} == {()}
        assert none.logprobs is None

    shared(test)


def test_five_hundred_at_once_all_end_once(shared: Shared) -> None:
    async def test(child: Child) -> None:
        answers = await child.ask(*(((*PROMPT, 40 + number % 100), SAMPLED) for number in range(500)))
        assert all(isinstance(answer, Finished) for answer in answers)
        assert len({answer.token_ids for answer in answers}) == 100

    shared(test)


# ---- refusals and faults of requests


def test_what_the_vendor_refuses_is_the_rows_fault(tmp_path: Path) -> None:
    async def run() -> None:
        async with running(tmp_path) as child:
            started = await child.start({**LLM, "max_num_tokens": 100})
            assert isinstance(started, Started)
            over_context, over_batch, no_such_token, bad_sampling, good = await child.ask(
                (tuple([40] * 512), SAMPLED),
                (tuple([40] * 101), SAMPLED),
                ((40, 100_000), SAMPLED),
                (PROMPT, replace(SAMPLED, top_p=1.5)),
                (PROMPT, SAMPLED),
            )
            assert over_batch.error_type == over_context.error_type == no_such_token.error_type == "request_refused"
            assert bad_sampling.error_type == "bad_sampling"
            refused = [over_context, over_batch, no_such_token, bad_sampling]
            assert {answer.blame for answer in refused} == {"request"}
            assert isinstance(good, Finished)

    asyncio.run(run())


def test_a_chunked_prompt_past_the_context_is_the_rows_fault_too(tmp_path: Path) -> None:
    async def run() -> None:
        async with running(tmp_path) as child:
            await child.start({**LLM, "max_num_tokens": 100, "enable_chunked_prefill": True})
            long, fits = await child.ask((tuple([40] * 512), SAMPLED), (tuple([40] * 300), SAMPLED))
            assert (long.blame, long.error_type) == ("request", "request_refused")
            assert isinstance(fits, Finished)

    asyncio.run(run())


def test_an_abort_ends_one_request_soon_and_no_other(tmp_path: Path) -> None:
    async def test(child: Child) -> None:
        child.send(Submit(1, PROMPT, LONG))
        child.send(Submit(2, PROMPT, replace(LONG, max_tokens=20)))
        child.send(Abort(1))
        child.send(Abort(99))
        first, second = await child.read(), await child.read()
        assert isinstance(first, Failed)
        assert (first.number, first.blame, first.error_type) == (1, "retry", "cancelled")
        assert isinstance(second, Finished)
        child.send(Abort(2))  # it has ended
        child.control()
        child._number = 2
        assert isinstance(await child.ask_one(), Finished)

    drive(tmp_path, test, SLOW)


def test_a_ranks_failure_fails_its_requests_for_another_try(tmp_path: Path) -> None:
    async def test(child: Child) -> None:
        for number, rank in ((1, 0), (2, 0), (3, 1)):
            child.send(Submit(number, PROMPT, replace(LONG, max_tokens=60), rank))
        await until(lambda: len(child.read_requests()) == 3)
        child.control(**{**SLOW, "token_s": 0.0}, fail_active=1)
        answers = {answer.number: answer for answer in [await child.read() for _ in range(3)]}
        assert [(answers[number].blame, answers[number].error_type) for number in (1, 2)] == [
            ("retry", "request_failed")
        ] * 2
        assert isinstance(answers[3], Finished)

    drive(tmp_path, test, SLOW)


def test_an_answer_without_a_token_is_passed_on_as_it_is(shared: Shared) -> None:
    async def test(child: Child) -> None:
        child.control(empty_answers=1)
        empty, whole = await child.ask_one(), await child.ask_one()
        assert (empty.token_ids, empty.finish_reason, empty.stop_reason) == ((), "stop", None)
        assert len(whole.token_ids) > 0

    shared(test)


@pytest.mark.parametrize("fault", ["crash", "unhealthy"])
def test_an_engine_that_shut_itself_down_is_to_blame(tmp_path: Path, fault: str) -> None:
    async def test(child: Child) -> None:
        child.control(**{fault: 1})
        answer = await child.ask_one()
        assert (answer.blame, answer.error_type) == ("engine", "engine_error")
        while (await child.read_beat()).is_healthy:
            pass

    drive(tmp_path, test)


# ---- a process that is alive, and what it can't do


@pytest.mark.parametrize("fault", ["hang", "die"])
def test_beats_go_on_while_the_engine_is_stuck(tmp_path: Path, fault: str) -> None:
    """A hang and a rank's silent death look alike: requests that never end, and an engine that calls itself healthy."""

    async def test(child: Child) -> None:
        child.send(Submit(1, PROMPT, LONG, 0))
        await until(lambda: len(child.read_requests()) == 1)
        child.control(**SLOW, **{fault: 1})
        totals = []
        while len(totals) < 6 or len(set(totals[-6:])) > 1:  # at 100 tokens a second, six beats alike are no accident
            beat = await child.read_beat()
            totals.append(beat.total_tokens)
        assert (beat.num_inflight, beat.is_healthy) == (1, True)
        await until(lambda: len(child.list_gpu_holders()) == (1 if fault == "die" else 2))

    drive(tmp_path, test, SLOW)


def test_beats_come_while_it_starts_and_show_memory(tmp_path: Path) -> None:
    async def run() -> None:
        async with running(tmp_path, control={"start_s": 0.3}) as child:
            assert isinstance(await child.start(), Started)
            assert len(child.beats) >= 3
            assert child.notes[0] == "importing TensorRT-LLM"
            before = await child.read_beat()
            child.control(rss_bytes_per_request=64 * 2**20)
            await child.ask((PROMPT, SAMPLED), (PROMPT, SAMPLED))
            while (await child.read_beat()).rss_bytes < before.rss_bytes + 100 * 2**20:
                pass

    asyncio.run(run())


# ---- start


def test_it_says_what_it_found_out(tmp_path: Path, tokenizer: HFTokenizer) -> None:
    probes = tuple(
        (MESSAGES, thinking, tokenizer.render_chat(MESSAGES, thinking=thinking)) for thinking in (False, True)
    )
    started = start_only(tmp_path, Start({**LLM, "max_batch_size": 64}, probes=probes))
    assert isinstance(started, Started)
    assert (started.version, started.max_model_len, len(started.pids)) == ("1.2.1", 512, 2)
    assert started.facts == {
        "version": "1.2.1",
        "hang_detector": "yes",
        "health_probe": "yes",
        "perf_metrics": "off",
        "chat_probes": "2",
        "tool_probes": "0",
        "bos": "one",
        "max_seq_len": "512",
        "max_num_tokens": "8192",
        "max_batch_size": "64",
    }
    old = start_only(tmp_path, Start(LLM), STAND_IN_OLD="1")
    assert isinstance(old, Started)
    assert old.facts["hang_detector"] == "no"


def test_a_chat_that_the_engine_renders_in_another_way_is_refused(tmp_path: Path, tokenizer: HFTokenizer) -> None:
    good = tokenizer.render_chat(MESSAGES, thinking=False)
    probes = ((MESSAGES, False, good), (MESSAGES, True, good))
    failed = start_only(tmp_path, Start(LLM, probes=probes))
    assert isinstance(failed, StartFailed)
    assert failed.is_spec
    assert "chat probe 2 of 2 (system, user; thinking on)" in failed.message
    assert "be brief" not in failed.message
    strange = ((({"role": "wizard", "content": ""},), False, good),)
    failed = start_only(tmp_path, Start(LLM, probes=strange))
    assert isinstance(failed, StartFailed)
    assert failed.is_spec
    assert "can't render chat probe 1 of 1" in failed.message


@pytest.mark.parametrize(
    ("llm", "said"),
    [
        ({"max_new_tokens": 3}, "got invalid argument: max_new_tokens"),
        ({"kv_cache_config": {"free_memory": 0.8}}, "free_memory"),
        ({"moe_config": {"backend": "FASTEST"}}, "backend"),
        ({"custom_tokenizer": "deepseek_v99"}, "deepseek_v99"),
        ({"skip_tokenizer_init": True}, "skip_tokenizer_init"),
    ],
)
def test_what_the_version_does_not_take_is_the_specs_fault(tmp_path: Path, llm: dict[str, Any], said: str) -> None:
    failed = start_only(tmp_path, Start({**LLM, **llm}))
    assert isinstance(failed, StartFailed)
    assert failed.is_spec
    assert said in failed.message


@pytest.mark.parametrize(("fault", "said"), [("oom", "out of memory"), ("worker_died", "died during initialization")])
def test_a_failed_start_may_be_tried_again(tmp_path: Path, fault: str, said: str) -> None:
    failed = start_only(tmp_path, Start(LLM), {"start_fault": fault})
    assert isinstance(failed, StartFailed)
    assert not failed.is_spec
    assert said in failed.message


def test_without_the_package_the_start_says_so(tmp_path: Path) -> None:
    failed = start_only(tmp_path, Start(LLM), PYTHONPATH=str(Path(__file__).parent.parent))
    assert isinstance(failed, StartFailed)
    assert failed.is_spec
    assert "not installed" in failed.message


# ---- the end


def test_it_stops_in_order_and_leaves_nothing(tmp_path: Path) -> None:
    async def run() -> None:
        async with running(tmp_path, arguments=("-m", "batchgen.engines.trtllm.child")) as child:
            assert isinstance(await child.start(), Started)
            assert len(child.list_gpu_holders()) == 2
            child.send(Stop())
            assert await child.read() is None
            assert await child.wait() == 0
            assert child.list_gpu_holders() == []

    asyncio.run(run())


def test_the_end_of_the_socket_ends_a_half_made_engine_and_its_ranks(tmp_path: Path) -> None:
    """Ranks that would outlive it, at that; and that they don't hold the socket is why there is an end at all."""

    async def run() -> None:
        async with running(tmp_path, control={"start_fault": "hang", "orphans": True}) as child:
            child.send(Start(LLM))
            await until(lambda: len(child.list_gpu_holders()) == 2)
            child._writer.close()
            assert await child.wait() == 2
            await until(lambda: child.list_gpu_holders() == [])

    asyncio.run(run())


def test_ranks_do_not_inherit_the_socket(tmp_path: Path) -> None:
    async def test(child: Child) -> None:
        child.control(orphans=True)
        for pid in child.list_gpu_holders():
            links = [str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir()]
            assert [link for link in links if link.startswith("socket:")] == []
            assert os.getsid(pid) == pid

    drive(tmp_path, test)


def test_killed_it_leaves_orphans_that_hold_memory(tmp_path: Path) -> None:
    """Why something outside has to look after it; and that the stand-in shows it."""

    async def run() -> None:
        async with running(tmp_path, control={"orphans": True}) as child:
            started = await child.start()
            assert isinstance(started, Started)
            os.kill(child.process.pid, signal.SIGKILL)
            assert await child.read() is None
            await child.wait()
            for pid in started.pids:
                os.kill(pid, signal.SIGTERM)
            assert sorted(child.list_gpu_holders()) == sorted(started.pids)
            for pid in started.pids:
                os.kill(pid, signal.SIGKILL)
            await until(lambda: child.list_gpu_holders() == [])

    asyncio.run(run())


def test_a_shutdown_that_hangs_is_cut_short(tmp_path: Path) -> None:
    async def run() -> None:
        hurried = "from batchgen.engines.trtllm import child; child.SHUTDOWN_S = 0.3; child.main()"
        async with running(tmp_path, arguments=("-c", hurried), control={"hang_shutdown": True}) as child:
            assert isinstance(await child.start(), Started)
            child.send(Stop())
            assert await child.wait() == 0
            await until(lambda: child.list_gpu_holders() == [])

    asyncio.run(run())
