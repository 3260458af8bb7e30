"""The simulated server of the benchmark, a process of its own: OpenAI's chat API over slots that only wait.

A request waits for a slot in order of arrival, holds it for its row's time, and is answered with its row's text. What is
measured is measured here, the same way for whoever sends: a row's slot time, the first start, the last end, the most
requests in flight. Times are of the machine's monotonic clock, which all its processes share.

`GET /stats?reset=1` gives them and forgets them, but for `num_open`: requests of anybody that are not answered yet. Whoever
hangs up gives its slot back. The process ends when its standard input closes, so that it never
outlives whoever started it.
"""

import argparse
import asyncio
import json
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from batchgen.bench.workload import Workload, count_tokens, make_text, parse_row

MODEL = "simulated"


@dataclass(slots=True)
class Stats:
    """`num_again`: requests for a row that was answered before. `service_s` is the sum over rows answered, each once;
    `busy_s` the time slots were really held, the loop's own lateness included."""

    num_requests: int = 0
    num_again: int = 0
    num_dropped: int = 0
    service_s: float = 0.0
    busy_s: float = 0.0
    first_at: float | None = None
    last_at: float | None = None
    num_inflight: int = 0
    max_inflight: int = 0
    rows: set[int] = field(default_factory=set)

    def make_json(self) -> dict[str, Any]:
        fields = asdict(self)
        return {**fields, "rows": len(self.rows)}


class Server:
    """Belongs to one event loop."""

    def __init__(self, work: Workload) -> None:
        self._work = work
        self._slots = asyncio.Semaphore(work.slots)
        self._stats = Stats()
        self._num_open = 0

    async def answer(self, row: int) -> dict[str, Any]:
        """Hold a slot for the row's time."""
        stats = self._stats
        stats.num_requests += 1
        stats.num_inflight += 1
        stats.max_inflight = max(stats.max_inflight, stats.num_inflight)
        self._num_open += 1
        try:
            async with self._slots:
                await self._hold(row, stats)
        except asyncio.CancelledError:
            stats.num_dropped += 1
            raise
        finally:
            stats.num_inflight -= 1
            self._num_open -= 1
        return make_answer(row, count_tokens(self._work.find_service_s(row)))

    async def _hold(self, row: int, stats: Stats) -> None:
        service_s, started = self._work.find_service_s(row), time.monotonic()
        stats.first_at = started if stats.first_at is None else stats.first_at
        await asyncio.sleep(service_s)
        stats.last_at = time.monotonic()
        stats.busy_s += stats.last_at - started
        if row in stats.rows:
            stats.num_again += 1
        else:
            stats.rows.add(row)
            stats.service_s += service_s

    def read_stats(self, *, reset: bool) -> dict[str, Any]:
        found = {**self._stats.make_json(), "num_open": self._num_open}
        if reset:
            self._stats = Stats()
        return found


def make_answer(row: int, num_tokens: int) -> dict[str, Any]:
    """A chat completion as OpenAI's API gives it."""
    message = {"role": "assistant", "content": make_text(row)}
    return {
        "id": f"chatcmpl-{row}",
        "object": "chat.completion",
        "created": 0,
        "model": MODEL,
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 16, "completion_tokens": num_tokens, "total_tokens": 16 + num_tokens},
    }


def read_prompt(body: dict[str, Any]) -> str:
    """The last message's text; some clients send it in parts."""
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


async def serve(work: Workload) -> None:
    """Prints the port, then answers until standard input ends."""
    from aiohttp import web

    server = Server(work)

    async def chat(request: web.Request) -> web.Response:
        try:
            row = parse_row(read_prompt(await request.json()))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            return web.json_response({"error": {"message": "not a prompt of this benchmark"}}, status=400)
        return web.json_response(await server.answer(row))

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": MODEL}]})

    async def stats(request: web.Request) -> web.Response:
        return web.json_response(server.read_stats(reset="reset" in request.query))

    app = web.Application()
    app.add_routes([web.post("/v1/chat/completions", chat), web.get("/v1/models", models), web.get("/stats", stats)])
    # A way that was killed must not hold slots that the next one wants.
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, backlog=4096)
    await site.start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await runner.cleanup()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workload", type=json.loads, help="fields of Workload, as JSON")
    asyncio.run(serve(Workload(**parser.parse_args().workload)))


if __name__ == "__main__":
    main()
