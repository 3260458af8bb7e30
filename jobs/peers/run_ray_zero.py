"""Ray Data with one actor and one async call a row that answers at once: a row at a time, or a batch's gathered."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import ray

from batchgen.bench.child import Child


async def generate(prompt: Sequence[int]) -> str:
    return f"of {len(prompt)} tokens"


class AskOne:
    async def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"id": row["id"], "text": await generate(row["prompt_token_ids"])}


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
        size = child["batch_size"]
        done = rows.map_batches(Ask, batch_size=size, compute=pool) if size else rows.map(AskOne, compute=pool)
        done.write_parquet(child["output"])
    child.close("ray")


if __name__ == "__main__":
    main()
