"""A plain asyncio client: a semaphore, one connection pool, the answers kept in memory and written once at the end."""

import asyncio
from pathlib import Path

import aiohttp
import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.bench.child import Child


async def run(rows: pa.Table, url: str, max_inflight: int) -> list[str]:
    room = asyncio.Semaphore(max_inflight)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def ask(prompt: str) -> str:
            body = {"model": "simulated", "messages": [{"role": "user", "content": prompt}]}
            async with room, session.post(f"{url}/v1/chat/completions", json=body) as response:
                answer = await response.json()
            return str(answer["choices"][0]["message"]["content"])

        return await asyncio.gather(*(ask(prompt) for prompt in rows["prompt"].to_pylist()))


def main() -> None:
    child = Child()
    with child.job():
        rows = pq.read_table(child["input"], columns=["id", "prompt"])
        texts = asyncio.run(run(rows, child["url"], child["max_inflight"]))
        Path(child["output"]).mkdir(parents=True)
        pq.write_table(pa.table({"id": rows["id"], "text": texts}), f"{child['output']}/out.parquet")
    child.close("aiohttp")


if __name__ == "__main__":
    main()
