"""Drives the engine's process over the real wire, with the stand-in for the vendor's package."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import batchgen
from batchgen.engines.trtllm.wire import (
    Beat,
    Failed,
    Finished,
    FromEngine,
    Start,
    Started,
    StartFailed,
    Submit,
    ToEngine,
    pack,
    read_message,
)
from batchgen.records import SamplingParams

STAND_IN = Path(__file__).parent / "stand_in"
sys.path.insert(0, str(STAND_IN))

from gpu_ledger import read_holders  # noqa: E402
from stand_in_control import make_env, read_calls, write_control  # noqa: E402

MODEL = str(Path(batchgen.__file__).parent / "embedded")
LLM = {"model": MODEL, "tensor_parallel_size": 2, "custom_tokenizer": "deepseek_v32", "max_seq_len": 512}
LLM |= {"enable_attention_dp": True}
SAMPLED = SamplingParams(temperature=1.0, top_p=0.95, max_tokens=40, seed=1)
PROMPT = tuple(range(40, 52))
CHILD = ("-m", "batchgen.engines.trtllm.child")
BEAT_S = 0.05
WAIT_S = 30.0


class Child:
    """The actor's end, as small as can be. `beats`: all that came."""

    def __init__(self, process: subprocess.Popen[bytes], reader: Any, writer: Any, folder: Path) -> None:
        self.process, self.folder = process, folder
        self._reader, self._writer = reader, writer
        self.beats: list[Beat] = []
        self.notes: list[str] = []
        self._number = self._num_old_calls = 0

    def begin(self) -> None:
        """A new test, on a process that others have used: nothing of theirs is asked of it, or shown, any more."""
        self.control()
        self.beats, self.notes = [], []
        self._num_old_calls = len(read_calls(self.folder))

    def send(self, message: ToEngine) -> None:
        self._writer.write(pack(message))

    async def read(self) -> FromEngine | None:
        """The next message that is neither a beat nor a note; None at the end."""
        while True:
            message = await asyncio.wait_for(read_message(self._reader), WAIT_S)
            if isinstance(message, Beat):
                self.beats.append(message)
            elif message is None or hasattr(message, "number") or isinstance(message, Started | StartFailed):
                return message
            else:
                self.notes.append(message.text)

    async def read_beat(self) -> Beat | None:
        """The next beat, whatever comes before it being lost."""
        while True:
            message = await asyncio.wait_for(read_message(self._reader), WAIT_S)
            if message is None or isinstance(message, Beat):
                return message

    async def start(self, llm: dict[str, Any] = LLM, **start: Any) -> Started | StartFailed:
        self.send(Start(llm, beat_s=BEAT_S, **start))
        answer = await self.read()
        assert isinstance(answer, Started | StartFailed), answer
        return answer

    async def ask(self, *requests: tuple[tuple[int, ...], SamplingParams], rank: int | None = None) -> list[Any]:
        """The answers, in the order of the requests."""
        first = self._number + 1
        for token_ids, sampling in requests:
            self._number += 1
            self.send(Submit(self._number, token_ids, sampling, rank))
        answers: dict[int, FromEngine] = {}
        while len(answers) < len(requests):
            answer = await self.read()
            assert isinstance(answer, Finished | Failed), answer
            assert answer.number not in answers, "a second end of one request"
            answers[answer.number] = answer
        return [answers[first + at] for at in range(len(requests))]

    async def ask_one(self, token_ids: tuple[int, ...] = PROMPT, sampling: SamplingParams = SAMPLED) -> Any:
        return (await self.ask((token_ids, sampling)))[0]

    def control(self, **control: Any) -> None:
        write_control(self.folder, **control)

    def read_requests(self) -> list[dict[str, Any]]:
        """What the vendor was asked in this test, the canary left out."""
        calls = read_calls(self.folder)[self._num_old_calls :]
        return [call for call in calls if "prompt" in call][0 if self._num_old_calls else 1 :]

    def list_gpu_holders(self) -> list[int]:
        return [pid for pids in read_holders(self.folder / "gpus").values() for pid in pids]

    async def wait(self) -> int:
        return await asyncio.to_thread(self.process.wait, WAIT_S)


@asynccontextmanager
async def running(
    folder: Path, *, control: dict[str, Any] | None = None, arguments: Sequence[str] = CHILD, **env: str
) -> AsyncIterator[Child]:
    """The process, not started yet; gone afterwards with all its ranks."""
    ours, theirs = socket.socketpair()
    environ = {**os.environ, **make_env(folder), **env}
    write_control(folder, **(control or {}))
    command = [sys.executable, "-P", *arguments, str(theirs.fileno())]
    output = (folder / "child.log").open("ab")
    with theirs, output:
        process = subprocess.Popen(
            command, env=environ, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    reader, writer = await asyncio.open_connection(sock=ours)
    child = Child(process, reader, writer, folder)
    try:
        yield child
    finally:
        writer.close()
        for pid in child.list_gpu_holders():
            os.kill(pid, signal.SIGKILL)
        process.kill()
        process.wait(WAIT_S)


async def until(holds: Callable[[], bool]) -> None:
    """Another process's doing, which only looking shows."""
    end = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < end, "it never came"
        await asyncio.sleep(0.01)
