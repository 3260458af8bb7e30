"""An OpenAI-compatible server in a process of its own, over the embedded model, that misbehaves when it is told to.

It speaks /v1/models, /v1/chat/completions and /v1/completions (text or token ids), streamed and whole, as vLLM does. A
second listener takes orders: `server.misbehave(...)` for the next requests, `server.go_away(seconds)`, which closes the
listener and every connection and comes back on the same port. It counts calls and the most requests in flight. It dies
with its parent, however that ends.
"""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from email.utils import formatdate
from typing import Any

from aiohttp import web

KEY = "sk-secret-test-key"
MODEL = "sums"
TOO_LONG = "context_length_exceeded"


# ---- for tests -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OpenAIServer:
    port: int
    control_port: int

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def misbehave(self, kind: str, times: int = 1, match: str | None = None, **how: Any) -> None:
        """The next `times` requests (whose body contains `match`) go wrong in this way."""
        self._order({"kind": kind, "times": times, "match": match, "how": how})

    def go_away(self, seconds: float) -> None:
        """Returns once it is gone."""
        self._order({"away_s": seconds})

    def reset(self) -> None:
        """Behave, require no key, forget all counts."""
        self._order({"reset": True})

    def require_key(self) -> None:
        self._order({"key": KEY})

    def read(self) -> dict[str, Any]:
        """num_calls, max_inflight, num_inflight, peers (a port for each connection), bodies (the last 50), statuses,
        called_at (Unix time of each call)."""
        return self._order({})

    def _order(self, order: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(f"http://127.0.0.1:{self.control_port}/", json.dumps(order).encode())
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=60) as response:
            return dict(json.load(response))


@contextlib.contextmanager
def run_openai_server() -> Iterator[OpenAIServer]:
    with subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield OpenAIServer(*map(int, process.stdout.readline().split()))
        finally:
            process.kill()


# ---- the server ------------------------------------------------------------------------------------------------------


@dataclass
class Order:
    kind: str
    times: int
    match: str | None
    how: dict[str, Any]


@dataclass
class Counts:
    num_calls: int = 0
    num_inflight: int = 0
    max_inflight: int = 0
    peers: list[int] = field(default_factory=list)
    statuses: dict[str, int] = field(default_factory=dict)
    bodies: list[Any] = field(default_factory=list)
    called_at: list[float] = field(default_factory=list)


class Server:
    """One engine, one API listener that comes and goes, one listener for orders."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.orders: list[Order] = []
        self.counts = Counts()
        self.key: str | None = None
        self.port = 0
        self._runner: web.AppRunner | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def listen(self) -> None:
        app = web.Application(client_max_size=2**26)
        app.router.add_get("/v1/models", self.models)
        app.router.add_post("/v1/chat/completions", self.complete)
        app.router.add_post("/v1/completions", self.complete)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.01, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def leave(self, seconds: float) -> None:
        """Closes the listener and cuts every connection."""
        assert self._runner is not None
        for connection in self._runner.server.connections if self._runner.server else []:
            if connection.transport is not None:
                connection.transport.abort()
        await self._runner.cleanup()

        async def come_back() -> None:
            await asyncio.sleep(seconds)
            await self.listen()

        task = asyncio.create_task(come_back())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def control(self, request: web.Request) -> web.Response:
        order = await request.json()
        if order.get("reset"):
            self.orders, self.key = [], None
            self.counts = Counts(num_inflight=self.counts.num_inflight)
        if "key" in order:
            self.key = order["key"]
        if "kind" in order:
            self.orders.append(Order(**order))
        if "away_s" in order:
            await self.leave(order["away_s"])
        return web.json_response(asdict(self.counts))

    def is_allowed(self, request: web.Request) -> bool:
        return self.key is None or request.headers.get("Authorization") == f"Bearer {self.key}"

    def take_order(self, body: str) -> Order | None:
        for order in self.orders:
            if order.times > 0 and (order.match is None or order.match in body):
                order.times -= 1
                return order
        return None

    async def models(self, request: web.Request) -> web.StreamResponse:
        if not self.is_allowed(request):
            return refuse(401, "invalid_api_key", f"Incorrect API key provided: {KEY}")
        if any(order.kind == "loading" and order.times > 0 for order in self.orders):
            self.take_order("")
            return refuse(503, "unavailable", "still loading")
        if any(order.kind == "unlisted" for order in self.orders):
            return web.json_response({"object": "list", "data": []})
        return web.json_response({"data": [{"id": MODEL, "owned_by": "tests", "max_model_len": 1024}]})

    async def complete(self, request: web.Request) -> web.StreamResponse:
        counts = self.counts
        counts.num_calls += 1
        counts.called_at.append(time.time())
        if (peer := request.transport and request.transport.get_extra_info("peername")) and peer[1] not in counts.peers:
            counts.peers.append(peer[1])
        counts.num_inflight += 1
        counts.max_inflight = max(counts.max_inflight, counts.num_inflight)
        try:
            response = await self.answer(request)
            counts.statuses[str(response.status)] = counts.statuses.get(str(response.status), 0) + 1
            return response
        finally:
            counts.num_inflight -= 1

    async def answer(self, request: web.Request) -> web.StreamResponse:
        text = await request.text()
        body = json.loads(text)
        self.counts.bodies = [*self.counts.bodies[-49:], body]
        if not self.is_allowed(request):
            return refuse(401, "invalid_api_key", f"Incorrect API key provided: {KEY}")
        if body["model"] != MODEL:
            return refuse(404, "model_not_found", f"no model {body['model']}")
        order = self.take_order(text)
        if order is not None and order.kind != "slow":
            return await misbehave(request, order.kind, order.how)
        if order is not None:
            await asyncio.sleep(order.how["seconds"])
        return await self.generate(request, body)

    async def generate(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        from batchgen.errors import RequestRejected

        is_chat = request.path.endswith("/chat/completions")
        ours = self.make_request(body, is_chat)
        try:
            answer = await self.engine.generate(ours)
        except RequestRejected as error:
            code = TOO_LONG if error.error_type == "prompt_too_long" else error.error_type
            return refuse(400, code, f"{error.message}; you said: {json.dumps(body.get('messages'))}")
        whole = make_answer(answer, body, is_chat)
        if not body.get("stream"):
            return web.json_response(whole)
        return await stream(request, whole, len(answer.token_ids), is_chat)

    def make_request(self, body: dict[str, Any], is_chat: bool) -> Any:
        from batchgen.records import Request, RowId, SamplingParams

        tokenizer = self.engine.tokenizer
        thinking = bool(body.get("chat_template_kwargs", {}).get("thinking"))
        if is_chat:
            ids = tokenizer.encode_chat(body["messages"], thinking=thinking)
        else:
            ids = tokenizer.encode(body["prompt"]) if isinstance(body["prompt"], str) else body["prompt"]
        names = ("temperature", "top_p", "max_tokens", "top_k", "min_p", "seed", "repetition_penalty")
        given = {name: body[name] for name in names if name in body}
        logprobs = body.get("top_logprobs") if is_chat else body.get("logprobs")
        stop = {"stop": tuple(body.get("stop", ())), "stop_token_ids": tuple(body.get("stop_token_ids", ()))}
        sampling = SamplingParams(**given, **stop, logprobs=logprobs, thinking=thinking)
        return Request(RowId("server", 0, 0), tuple(ids), sampling)


def refuse(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> web.Response:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return web.json_response({"error": error}, status=status, headers=headers)


async def misbehave(request: web.Request, kind: str, how: dict[str, Any]) -> web.StreamResponse:
    """One request gone wrong."""
    if kind == "refuse":
        headers = dict(how.get("headers", {}))
        if "after_date_s" in how:
            headers["Retry-After"] = formatdate(time.time() + how["after_date_s"], usegmt=True)
        return refuse(how["status"], how.get("code", "code"), how.get("message", "because"), headers)
    if kind == "hang":
        await asyncio.sleep(3600)
    if kind == "body":
        return web.Response(body=how["body"].encode(), content_type=how.get("content_type", "application/json"))
    response = web.StreamResponse(headers={"Content-Type": how.get("content_type", "application/json")})
    if kind == "reset":
        response.content_length = 1000
    await response.prepare(request)
    await response.write(how.get("body", '{"choices": [').encode())
    if kind == "reset":
        await asyncio.sleep(0.05)
        assert request.transport is not None
        request.transport.abort()
    return response


def make_answer(answer: Any, body: dict[str, Any], is_chat: bool) -> dict[str, Any]:
    """As vLLM says it: text without reasoning, `token_id:` names when asked for."""
    is_named = bool(body.get("return_tokens_as_token_ids"))
    usage = {
        "prompt_tokens": answer.usage.prompt_tokens,
        "completion_tokens": answer.usage.completion_tokens,
        "total_tokens": answer.usage.prompt_tokens + answer.usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    choice: dict[str, Any] = {"index": 0, "finish_reason": answer.finish_reason, "logprobs": None}
    if body.get("return_token_ids"):
        choice["token_ids"] = list(answer.token_ids)
    if is_chat:
        choice["message"] = {"role": "assistant", "content": answer.text, "reasoning_content": None}
    else:
        choice["text"] = answer.text
    if answer.logprobs is not None:
        choice["logprobs"] = make_logprobs(answer.logprobs, is_chat, "token_id:{}" if is_named else "t{}")
    return {"id": "x", "object": "x", "created": 1, "model": MODEL, "choices": [choice], "usage": usage}


def make_logprobs(logprobs: Any, is_chat: bool, name: str) -> dict[str, Any]:
    if not is_chat:
        return {
            "tokens": [name.format(token.token_id) for token in logprobs],
            "token_logprobs": [token.logprob for token in logprobs],
            "top_logprobs": [{name.format(id_): value for id_, value in token.top} for token in logprobs],
        }
    return {
        "content": [
            {
                "token": name.format(token.token_id),
                "logprob": token.logprob,
                "top_logprobs": [{"token": name.format(id_), "logprob": value} for id_, value in token.top],
            }
            for token in logprobs
        ]
    }


async def stream(request: web.Request, whole: dict[str, Any], num_parts: int, is_chat: bool) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
    await response.prepare(request)
    for event in make_events(whole, num_parts, is_chat):
        await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        await asyncio.sleep(0.002)
    await response.write(b"data: [DONE]\n\n")
    return response


def make_events(whole: dict[str, Any], num_parts: int, is_chat: bool) -> Iterator[dict[str, Any]]:
    """A role, the text in pieces, the finish_reason, the usage."""
    choice = whole["choices"][0]
    text = choice["message"]["content"] if is_chat else choice["text"]
    size = max(1, -(-len(text) // max(1, num_parts)))

    def make(text: str | None, **fields: Any) -> dict[str, Any]:
        part = {"delta": {"content": text}} if is_chat else {"text": text or ""}
        return {"choices": [{"index": 0, "finish_reason": None, **part, **fields}]}

    yield {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]} if is_chat else make("")
    for start in range(0, len(text), size):
        yield make(text[start : start + size])
    yield make(None, finish_reason=choice["finish_reason"], logprobs=choice["logprobs"])
    yield {"choices": [], "usage": whole["usage"]}


async def serve() -> None:
    from batchgen.engines.transformers import TransformersEngine
    from batchgen.spec import ModelSpec
    from batchgen.specs.engine import TransformersEngineSpec

    engine = TransformersEngine(ModelSpec(), TransformersEngineSpec(kind="transformers"))
    await engine.open()
    server = Server(engine)
    await server.listen()
    app = web.Application()
    app.router.add_post("/", server.control)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(server.port, runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


def die_with_parent() -> None:
    """End of input: the parent is gone, or done with us."""
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    threading.Thread(target=die_with_parent, daemon=True).start()
    asyncio.run(serve())
