"""Ray Data with one actor and one async call a row that answers at once: a row at a time, or a batch's gathered; of a
function that returns a constant, or of the engine that batchgen runs with."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import ray

from batchgen.bench.child import Child
from batchgen.engines.simulated import SimulatedEngine
from batchgen.records import Request, RowId, SamplingParams
from batchgen.specs.engine import SimulatedEngineSpec


async def generate(prompt: Sequence[int]) -> str:
    return f"of {len(prompt)} tokens"


class AskOne:
    async def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"id": row["id"], "text": await generate(row["prompt_token_ids"])}


class AskEngine:
    """What any user of the engine must do: open it, make a request of the row, await its answer."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._engine, self._is_open = SimulatedEngine(SimulatedEngineSpec(**spec)), False

    async def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        if not self._is_open:
            await self._engine.open()
            self._is_open = True
        row_id = RowId("rows", int(row["id"]), 0)
        answer = await self._engine.generate(Request(row_id, tuple(row["prompt_token_ids"]), SamplingParams()))
        return {"id": row["id"], "text": answer.text}


class Ask:
    async def __call__(self, batch: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        texts = await asyncio.gather(*(generate(prompt) for prompt in batch["prompt_token_ids"]))
        yield {"id": batch["id"], "text": texts}


def main() -> None:
    child = Child()
    ray.init(address=child["ray_address"], logging_level="warning", log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    with child.job():
        rows = ray.data.read_parquet(child["input"])
        pool = ray.data.ActorPoolStrategy(size=1)
        if spec := child.settings.get("engine"):
            done = rows.map(AskEngine, fn_constructor_args=[spec], compute=pool)
        elif size := child["batch_size"]:
            done = rows.map_batches(Ask, batch_size=size, compute=pool)
        else:
            done = rows.map(AskOne, compute=pool)
        done.write_parquet(child["output"])
    child.close("ray")


if __name__ == "__main__":
    main()
