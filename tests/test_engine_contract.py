"""The contract suite over every engine, and over the one in docs/engines.md, as its readers would run it."""

import asyncio
import random
import re
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from makers import make_job_spec
from openai_server import MODEL, OpenAIServer

from batchgen.engines import contract
from batchgen.engines.contract import CHECKS, Subject
from batchgen.engines.simulated import SimulatedEngine
from batchgen.errors import RequestRejected
from batchgen.records import Generation, Prompt, Request, SamplingParams

ROOT = Path(__file__).parent.parent
# More tokens than the embedded model's context has.
TOO_LONG = Prompt(text="word " * 2000)
TOO_LONG_CHAT = Prompt(messages=({"role": "user", "content": "word " * 2000},))
# At this temperature the embedded model goes on for long.
HOT = SamplingParams(temperature=3.0, top_p=1.0, max_tokens=800, seed=3)

Check = Callable[[Subject], Awaitable[None]]
every_check = pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)


def make_simulated() -> Subject:
    rates = {"decode_tokens_per_s": 200, "prefill_tokens_per_s": 20_000, "slots": 4, "mean_tokens": 20}
    engine = {"kind": "simulated", "max_inflight": 6, "reject_text": "poison", **rates}
    long = SamplingParams(max_tokens=10_000, seed=1)
    spec = make_job_spec(engine=engine, prompt={"column": "prompt", "chat": False})
    return Subject(spec, long_sampling=long, rejected=Prompt(text="some poison"))


@every_check
def test_simulated(check: Check) -> None:
    asyncio.run(check(make_simulated()))


@every_check
def test_transformers(check: Check) -> None:
    spec = make_job_spec(engine={"kind": "transformers", "max_inflight": 6, "max_batch_size": 4})
    asyncio.run(check(Subject(spec, long_sampling=HOT, rejected=TOO_LONG_CHAT)))


OPENAI: dict[str, dict[str, Any]] = {
    "chat": {},
    "streamed": {"measure_ttft": True},
    "text": {"api": "completions"},
    "token ids": {"api": "completions", "send_token_ids": True},
}


@pytest.mark.parametrize("way", OPENAI)
@every_check
def test_openai(check: Check, way: str, openai_server: OpenAIServer) -> None:
    engine = {"kind": "openai", "base_urls": openai_server.base_url, "model": MODEL, "max_inflight": 6, **OPENAI[way]}
    prompt = {"column": "prompt", "chat": way != "text"}
    subject = Subject(
        make_job_spec(engine=engine, prompt=prompt),
        long_sampling=HOT,
        rejected=TOO_LONG if way == "text" else TOO_LONG_CHAT,
        read_max_inflight=lambda: int(openai_server.read()["max_inflight"]),
    )
    asyncio.run(check(subject))


# ---- the suite itself: each of these engines breaks the contract in one way, and one check says so


class Broken(SimulatedEngine):
    """Every method as it should be, until a subclass spoils one."""


class LeavesATask(Broken):
    async def open(self) -> None:
        await super().open()
        asyncio.get_running_loop().create_task(asyncio.sleep(60), name="forgotten")


class BlocksTheLoop(Broken):
    async def generate(self, request: Request) -> Generation:
        time.sleep(1.1 if request.row_id.source_row == 2 else 0)
        return await super().generate(request)


class AnswersAfterClose(Broken):
    async def close(self) -> None:
        pass


class NeverEndsAtClose(Broken):
    async def generate(self, request: Request) -> Generation:
        if self._death is not None and request.sampling.max_tokens > 1000:
            await asyncio.sleep(60)
        return await super().generate(request)


class MixesAnswers(Broken):
    async def generate(self, request: Request) -> Generation:
        answer = await super().generate(request)
        usage = replace(answer.usage, prompt_tokens=(answer.usage.prompt_tokens or 0) + 1)
        return replace(answer, usage=usage)


class IgnoresSeeds(Broken):
    async def generate(self, request: Request) -> Generation:
        return replace(await super().generate(request), text=str(random.random()))


class HasOneSeed(Broken):
    async def generate(self, request: Request) -> Generation:
        return await super().generate(replace(request, sampling=replace(request.sampling, seed=1)))


class IgnoresTopK(Broken):
    async def generate(self, request: Request) -> Generation:
        answer = await super().generate(request)
        return replace(answer, text=answer.text + str(random.random())) if request.sampling.temperature else answer


class SwapsTexts(Broken):
    """Whoever asks first is answered with what the next one asked."""

    last = "first"

    async def generate(self, request: Request) -> Generation:
        answer = await super().generate(request)
        answer, self.last = replace(answer, text=self.last), answer.text
        return answer


class GoesOnForTheCancelled(Broken):
    async def generate(self, request: Request) -> Generation:
        return await asyncio.shield(asyncio.ensure_future(super().generate(request)))


class IgnoresStop(Broken):
    async def generate(self, request: Request) -> Generation:
        return await super().generate(replace(request, sampling=replace(request.sampling, stop=())))


class GoesOnTooLong(Broken):
    async def generate(self, request: Request) -> Generation:
        return await super().generate(replace(request, sampling=replace(request.sampling, max_tokens=99)))


class RaisesItsOwn(Broken):
    async def generate(self, request: Request) -> Generation:
        try:
            return await super().generate(request)
        except RequestRejected as error:
            raise ValueError("no") from error


class CountsNothing(Broken):
    async def generate(self, request: Request) -> Generation:
        answer = await super().generate(request)
        self.total_tokens = 0
        return answer


class SaysNothing(Broken):
    version = ""


class LosesThePlaceOfTheCancelled(Broken):
    async def generate(self, request: Request) -> Generation:
        await self._slots[0].acquire()
        answer = await super().generate(request)
        self._slots[0].release()
        return answer


class ForgetsThePartialAnswer(Broken):
    async def generate(self, request: Request) -> Generation:
        return await super().generate(replace(request, partial=None))


class TakesAnyRank(Broken):
    async def generate(self, request: Request) -> Generation:
        return await super().generate(replace(request, rank=0))


@pytest.mark.parametrize(
    ("broken", "check", "sentence"),
    [
        (ForgetsThePartialAnswer, contract.check_partial_answers_go_on, "does not go on as the whole one did"),
        (TakesAnyRank, contract.check_ranks_are_there, "a rank that is not there took a request"),
        (LeavesATask, contract.check_close_leaves_nothing_behind, "close left behind"),
        (BlocksTheLoop, contract.check_it_never_blocks_the_loop, "stood still"),
        (AnswersAfterClose, contract.check_it_must_be_open, "a closed engine answered"),
        (NeverEndsAtClose, contract.check_close_ends_what_is_in_flight, "close left a request waiting"),
        (MixesAnswers, contract.check_each_request_is_answered_once, "another prompt's"),
        (CountsNothing, contract.check_each_request_is_answered_once, "total_tokens"),
        (IgnoresSeeds, contract.check_seeds_decide, "the same seed gave another answer"),
        (HasOneSeed, contract.check_seeds_decide, "every seed gave the same answer"),
        (SwapsTexts, contract.check_answers_are_not_mixed_up, "text is another request's"),
        (GoesOnForTheCancelled, contract.check_the_cancelled_is_not_worked_on, "generated to its end"),
        (IgnoresTopK, contract.check_capabilities_are_honest, "top_k: 1 is not greedy"),
        (IgnoresStop, contract.check_stop_strings, "the stop string is in the text"),
        (GoesOnTooLong, contract.check_limits_of_length, "max_tokens"),
        (RaisesItsOwn, contract.check_errors_are_ours, "a bad request raised ValueError"),
        (LosesThePlaceOfTheCancelled, contract.check_a_cancelled_request_is_gone, "its place was not given back"),
        (SaysNothing, contract.check_it_says_what_it_is, "version is empty"),
    ],
)
def test_a_broken_engine_fails_the_suite(
    broken: type[Broken], check: Check, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contract, "END_S", 1.0)
    subject = replace(make_simulated(), create=lambda spec: broken(spec.engine))
    with pytest.raises(AssertionError, match=sentence):
        asyncio.run(check(subject))


def test_the_documented_engine_passes_when_it_is_installed(tmp_path: Path) -> None:
    """The two programs of docs/engines.md, with the entry point as a wheel would leave it on the path."""
    engine, suite = re.findall(r"```python\n(.*?)```", (ROOT / "docs/engines.md").read_text(), re.DOTALL)
    entry = re.findall(r'^(\w+) = "(.*)"$', (ROOT / "docs/engines.md").read_text(), re.MULTILINE)
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package/backwards.py").write_text(engine)
    info = tmp_path / "my_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    lines = ["[batchgen.engines]", *(f"{name} = {target}" for name, target in entry)]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "test_it.py").write_text(suite)
    path = f"{tmp_path}:{ROOT}"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_it.py"],
        cwd=tmp_path,
        env={"PYTHONPATH": path, "PATH": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert f"{len(CHECKS)} passed" in done.stdout, done.stdout + done.stderr
