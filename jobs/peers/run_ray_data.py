"""Ray Data's `map_batches` with an async class, as its LLM stages are built: a batch is a gather of one call a row."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import ray

from batchgen.bench.child import Child


class Ask:
    def __init__(self, url: str) -> None:
        self._url = f"{url}/v1/chat/completions"
        self._session: aiohttp.ClientSession | None = None

    async def __call__(self, batch: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        if self._session is None:
            self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        texts = await asyncio.gather(*(self._ask(self._session, prompt) for prompt in batch["prompt"]))
        yield {"id": batch["id"], "text": texts}

    async def _ask(self, session: aiohttp.ClientSession, prompt: str) -> str:
        body = {"model": "simulated", "messages": [{"role": "user", "content": str(prompt)}]}
        async with session.post(self._url, json=body) as response:
            answer = await response.json()
        return str(answer["choices"][0]["message"]["content"])


def main() -> None:
    child = Child()
    ray.init(address=child["ray_address"], logging_level="warning", log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    calls, size = child["calls"], child["batch_size"]
    pool = ray.data.ActorPoolStrategy(
        size=1, max_concurrent_calls_per_actor=calls, max_tasks_in_flight_per_actor=2 * calls
    )
    with child.job():
        rows = ray.data.read_parquet(child["input"]).select_columns(["id", "prompt"])
        if child["blocks"] is not None:
            rows = rows.repartition(child["blocks"])
        done = rows.map_batches(Ask, fn_constructor_args=(child["url"],), batch_size=size, compute=pool, num_cpus=1)
        done.write_parquet(child["output"])
    child.close("ray")


if __name__ == "__main__":
    main()
