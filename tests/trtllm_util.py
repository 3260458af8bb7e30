"""TensorRT-LLM engines under the stand-in: real processes, a ledger for the GPUs' memory, faults on request."""

import asyncio
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from makers import make_job_spec
from ray_cluster import list_marked

from batchgen.engines.tensorrt_llm import TensorRTLLMEngine
from batchgen.errors import EngineUnavailable
from batchgen.records import Generation, Request, RowId, SamplingParams
from batchgen.spec import ModelSpec
from batchgen.specs.tensorrt_llm import TensorRTLLMEngineSpec

STAND_IN = Path(__file__).parent / "stand_in"
sys.path.insert(0, str(STAND_IN))

from gpu_ledger import hold_gpu, read_holders  # noqa: E402
from stand_in_control import NODE, make_env, read_calls, write_control  # noqa: E402

__all__ = ["hold_gpu", "read_calls"]

NUM_RANKS = 2
CHILD, KEEPER, RANK = "trtllm.child", "trtllm/keeper.py", "rank.py"
SMALL: dict[str, Any] = {
    "kind": "tensorrt_llm",
    "custom_tokenizer": None,
    "tensor_parallel_size": NUM_RANKS,
    "moe_expert_parallel_size": NUM_RANKS,
    "max_batch_size": 4,
    "max_inflight": 6,
    "stream_interval": 1,
    "start_timeout_s": 20,
}


@dataclass
class StandIn:
    """The stand-in of one test: everything that it starts has this folder in its environment."""

    path: Path

    @property
    def gpus(self) -> Path:
        return self.path / "gpus"

    @property
    def env(self) -> dict[str, str]:
        """What its engines' actors need in their environment."""
        return {name: os.environ[name] for name in os.environ if name.startswith("STAND_IN_") or name == "PYTHONPATH"}

    def control(self, **values: Any) -> None:
        write_control(self.path, **values)

    def count_llms(self) -> int:
        return sum("llm" in call for call in read_calls(self.path))

    def count_requests(self) -> int:
        path = self.path / "calls.jsonl"  # counted without reading it as JSON: whoever waits for one looks often
        return path.read_bytes().count(b'{"prompt":') if path.exists() else 0

    def read_max_inflight(self) -> int:
        """The most requests that one engine of its had at once."""
        return max(call["num_inflight"] for call in read_calls(self.path) if "prompt" in call)

    def list_pids(self, command: str = "") -> list[int]:
        """Processes of its engines that run, those of one command line."""
        found = [pid for pid in list_marked(str(self.gpus), command) if not is_zombie(pid)]
        # The keeper's command line ends with that of the engine's process.
        others = list_marked(str(self.gpus), KEEPER) if command == CHILD else []
        return [pid for pid in found if pid not in others]

    def list_held(self) -> dict[int, list[int]]:
        return {gpu: pids for gpu, pids in read_holders(self.gpus).items() if pids}

    def kill(self, command: str) -> int:
        """SIGKILL to the one process of this command line; its id."""
        (pid,) = self.list_pids(command)
        os.kill(pid, signal.SIGKILL)
        return pid

    def check_nothing_left(self, timeout_s: float = 60.0) -> None:
        wait_until(lambda: not self.list_pids() and not self.list_held(), "nothing is left of the engine", timeout_s)


def create_stand_in(path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    for name, value in make_env(path, NUM_RANKS).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tempfile, "tempdir", str(path))
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)  # the real one, where another test's vendor has loaded it
    monkeypatch.syspath_prepend(NODE)
    return StandIn(path)


def make_section(**fields: Any) -> TensorRTLLMEngineSpec:
    return TensorRTLLMEngineSpec(**{**SMALL, **fields})


def make_engine(_: StandIn, *, model: ModelSpec | None = None, **fields: Any) -> TensorRTLLMEngine:
    spec = make_job_spec(engine={**SMALL, **fields})
    assert isinstance(spec.engine, TensorRTLLMEngineSpec)
    return TensorRTLLMEngine(model or spec.model, spec.engine)


@asynccontextmanager
async def opened(stand_in: StandIn, **fields: Any) -> AsyncIterator[TensorRTLLMEngine]:
    """Up, and closed at the end, whatever happens; then nothing is left of it."""
    engine = make_engine(stand_in, **fields)
    await engine.open()
    try:
        yield engine
    finally:
        await engine.close()
    stand_in.check_nothing_left()


def make_request(row: int = 0, length: int = 8, **sampling: Any) -> Request:
    ids = tuple(40 + (row + step) % 50 for step in range(length))
    return Request(RowId("in.parquet", row, 0), ids, SamplingParams(**{"max_tokens": 24, "seed": row, **sampling}))


async def persist(engine: TensorRTLLMEngine, request: Request) -> Generation:
    """As the sender does: come back when the engine says that it did not take the request."""
    while True:
        try:
            return await engine.generate(request)
        except EngineUnavailable as error:
            await asyncio.sleep(error.retry_after_s or 0.0)


async def catch(engine: TensorRTLLMEngine, request: Request) -> Generation | BaseException:
    (end,) = await asyncio.gather(engine.generate(request), return_exceptions=True)
    return end


async def until(condition: Callable[[], Any], what: str, timeout_s: float = 60.0) -> None:
    give_up_at = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up_at, f"never happened: {what}"
        await asyncio.sleep(0.01)


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float = 60.0) -> None:
    give_up_at = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up_at, f"never happened: {what}"
        time.sleep(0.01)


def is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True
