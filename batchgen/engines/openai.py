"""The engine for any server that speaks OpenAI's API, or several that serve the same model.

One pool of connections, as many requests in flight as the spec allows, each on the server with the fewest. Nothing is
tried again here: a request that fails is the sender's to send again, outside its window, and `breaker` keeps requests
from a server that is down. Answers are streamed only when the time to the first token is asked for.

Invariants: a request that was not taken (no connection, 429, 503, every server shut off) raises EngineUnavailable and
costs its row no attempt; one that was cut off may have been worked on and does. No message but a row's own error quotes
what a server says. The key is read from the environment of the worker, by name.
"""

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Coroutine
from typing import Any

import aiohttp

from batchgen.engines.base import Tokenizer
from batchgen.engines.breaker import Server, Servers
from batchgen.engines.openai_errors import (
    RATE_LIMITED,
    make_error,
    make_error_body,
    parse_error_body,
    parse_retry_after,
)
from batchgen.engines.openai_http import describe, make_transport_error, open_session
from batchgen.engines.openai_stream import StreamedAnswer
from batchgen.engines.openai_wire import make_body, parse_answer, parse_json
from batchgen.errors import BatchgenError, EngineDied, EngineUnavailable, RequestFailed, RequestRejected
from batchgen.records import Generation, Request
from batchgen.spec import ModelSpec
from batchgen.specs.engine import OpenAIEngineSpec

PATHS = {"chat": "/chat/completions", "completions": "/completions"}
ASK_AGAIN_S = 0.25
MAX_ERROR_BYTES = 64 * 2**10


class OpenAIEngine:
    """As the `Engine` protocol. With `send_token_ids` it has the tokenizer of `model.path`; else it has none."""

    kind = "openai"

    def __init__(self, model: ModelSpec, spec: OpenAIEngineSpec) -> None:
        self.version = "unknown"
        self.tokenizer: Tokenizer | None = None
        self.max_model_len: int | None = model.max_model_len
        self.total_tokens = 0
        self._model_spec, self._spec = model, spec
        self._model = spec.model or model.path
        self._servers = Servers(spec.base_urls, spec.breaker_failures, spec.give_up_s)
        self._room = asyncio.Semaphore(spec.max_inflight)
        self._death: str | None = "the engine is not open"
        self._session: aiohttp.ClientSession | None = None
        self._asking: set[asyncio.Task[Generation]] = set()

    async def open(self) -> None:
        """Raises EngineDied when no server answers in `open_timeout_s`, or one refuses the key."""
        headers = self._make_headers()
        if self._spec.send_token_ids:
            self.tokenizer = await asyncio.to_thread(load_tokenizer, self._model_spec)
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(self.close)
            self._session = open_session(headers, self._spec)
            await self._wait_for_server()
            self._death = None
            stack.pop_all()

    async def generate(self, request: Request) -> Generation:
        self._check_alive()
        async with self._room:
            self._check_alive()
            try:
                return await self._end_with_us(self._choose_and_ask(request))
            except RequestFailed as error:
                self._check_hope(str(error) if isinstance(error, EngineUnavailable) else error.error_type)
                raise
            except EngineDied as error:
                self._death = self._death or str(error)
                raise

    async def _choose_and_ask(self, request: Request) -> Generation:
        return await self._ask(await self._choose(), request)

    async def _end_with_us(self, asking: Coroutine[Any, Any, Generation]) -> Generation:
        """A closed session was seen to leave the reader of a stream waiting for ever, on a busy machine: each request is a
        task of its own, which `close` ends."""
        task = asyncio.ensure_future(asking)
        self._asking.add(task)
        try:
            return await task
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if task.cancelled() and current is not None and not current.cancelling():
                self._check_alive()
            raise
        finally:
            self._asking.discard(task)

    async def close(self) -> None:
        self._death = "the engine was closed"
        for task in self._asking:
            task.cancel()
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    # ---- servers -----------------------------------------------------------------------------------------------------

    def _make_headers(self) -> dict[str, str]:
        name = self._spec.api_key_env
        key = os.environ.get(name, "").strip()
        if not key and "api_key_env" in self._spec.model_fields_set:
            raise EngineDied(f"engine.api_key_env: {name} is not set on {socket.gethostname()}; set it on every worker")
        return {"Authorization": f"Bearer {key}"} if key else {}

    def _check_alive(self) -> None:
        if self._death is not None:
            raise EngineDied(self._death)

    def _check_hope(self, reason: str) -> None:
        if self._servers.is_hopeless(time.monotonic()):
            self._death = f"no server has answered for {self._spec.give_up_s:g} s (engine.give_up_s); last: {reason}"
            raise EngineDied(self._death)

    async def _wait_for_server(self) -> None:
        give_up_at = time.monotonic() + self._spec.open_timeout_s
        while True:
            reasons = [await self._ask_how_it_is(server) for server in self._servers.all]
            if None in reasons:
                return
            if time.monotonic() > give_up_at:
                raise EngineDied(f"no server answered within {self._spec.open_timeout_s:g} s; the first: {reasons[0]}")
            await asyncio.sleep(ASK_AGAIN_S)

    async def _choose(self) -> Server:
        """The server to send to. Raises EngineUnavailable at once when all are shut off."""
        while (server := self._servers.choose(time.monotonic())) is not None:
            if not server.is_asked:
                return server
            try:
                reason = await self._ask_how_it_is(server)
            finally:
                server.is_asked = False  # also when this request was cancelled while it asked
            if reason is None:
                self._servers.note_up(server)
                return server
            self._servers.note_failure(server, time.monotonic())
        now = time.monotonic()
        self._servers.note_refusal(now)
        self._check_hope("all servers are shut off")
        raise EngineUnavailable("unavailable", "no server answers just now", self._servers.get_pause_s(now))

    async def _ask_how_it_is(self, server: Server) -> str | None:
        """None: it is up; else why not. A server without a list of models counts as up: its answers will tell."""
        url = f"{server.url}/models"
        timeout = aiohttp.ClientTimeout(total=self._spec.connect_timeout_s)
        try:
            async with self._get_session().get(url, timeout=timeout, allow_redirects=False) as response:
                if response.status == 200:
                    return self._note_models(await response.read(), url)
                await self._check_status(response, url, is_proven=True)
        except (aiohttp.ClientError, TimeoutError) as error:
            return describe(error, url)
        except EngineUnavailable as error:
            return None if error.error_type == "not_found" else str(error)
        except RequestRejected:
            return None
        except RequestFailed:
            return f"{url} answered {response.status}"
        return None

    def _note_models(self, data: bytes, url: str) -> str | None:
        """vLLM says how long its context is; everybody says who serves. An empty list tells nothing: `transformers serve`
        never lists a local folder, and a Dynamo without its model yet answers 404, which costs a row no attempt."""
        try:
            value = parse_json(data)
        except ValueError:
            return f"{url} answered what is not JSON"
        models = value.get("data") if isinstance(value, dict) else None
        found = [m for m in models if isinstance(m, dict)] if isinstance(models, list) else []
        ours = next((model for model in found if model.get("id") == self._model), None)
        if ours is not None:
            self.version = str(ours.get("owned_by") or self.version)[:100]
            if self.max_model_len is None and isinstance(ours.get("max_model_len"), int):
                self.max_model_len = ours["max_model_len"]
        return None

    # ---- one request -------------------------------------------------------------------------------------------------

    def _get_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise EngineDied(self._death or "the engine is not open")
        return self._session

    async def _ask(self, server: Server, request: Request) -> Generation:
        server.num_inflight += 1
        server.num_sent += 1
        try:
            generation = await self._send(f"{server.url}{PATHS[self._spec.api]}", request)
        except RequestRejected:
            self._servers.note_answer(server)
            raise
        except RequestFailed as error:
            if error.error_type == RATE_LIMITED:
                self._servers.note_refusal(time.monotonic())
            else:
                self._servers.note_failure(server, time.monotonic())
            raise
        finally:
            server.num_inflight -= 1
        self._servers.note_answer(server)
        return generation

    async def _send(self, url: str, request: Request) -> Generation:
        started, body = time.monotonic(), make_body(request, self._model, self._spec)
        headers = {"Content-Type": "application/json"}
        try:
            async with self._get_session().post(url, data=body, headers=headers, allow_redirects=False) as response:
                await self._check_status(response, url, is_proven=self._servers.is_proven)
                if self._spec.measure_ttft and response.content_type == "text/event-stream":
                    return await self._read_stream(response, request, started)
                return self._read_whole(await response.read(), request, url)
        except (aiohttp.ClientError, TimeoutError) as error:
            self._check_alive()  # closed meanwhile: the connection was ours to end
            raise make_transport_error(error, url) from error

    async def _check_status(self, response: aiohttp.ClientResponse, url: str, *, is_proven: bool) -> None:
        """Raises the error that this answer means, unless it is a 200."""
        if response.status == 200:
            return
        error = parse_error_body(await response.content.read(MAX_ERROR_BYTES))
        raise self._make_error(response.status, error, url, is_proven, parse_retry_after(response.headers, time.time()))

    def _make_error(
        self, status: int, error: Any, url: str, is_proven: bool, retry_after_s: float | None = None
    ) -> BatchgenError:
        key = self._spec.api_key_env
        return make_error(status, error, where=url, key_env=key, is_proven=is_proven, retry_after_s=retry_after_s)

    def _read_whole(self, data: bytes, request: Request, url: str) -> Generation:
        try:
            value = parse_json(data)
        except ValueError:
            raise RequestFailed("bad_response", "the server's answer is not JSON") from None
        if isinstance(value, dict) and value.get("error"):
            self._raise_told(value, url)
        generation = parse_answer(value, request, None)
        self.total_tokens += generation.usage.completion_tokens or 0
        return generation

    async def _read_stream(self, response: aiohttp.ClientResponse, request: Request, started: float) -> Generation:
        answer, ttft_s, counted = StreamedAnswer(), None, 0
        async for data in response.content.iter_any():
            answer.feed(data)
            if answer.error is not None:
                self._raise_told({"error": answer.error}, str(response.url))
            if ttft_s is None and answer.num_parts:
                ttft_s = time.monotonic() - started
            # Progress only, until the server says how many they were.
            self.total_tokens += answer.num_parts - counted
            counted = answer.num_parts
        generation = parse_answer(answer.make_answer(), request, ttft_s)
        if generation.usage.completion_tokens is not None:
            self.total_tokens += generation.usage.completion_tokens - counted
        return generation

    def _raise_told(self, value: dict[str, Any], url: str) -> None:
        """Some servers say 200 first, and what went wrong in the body; vLLM puts the status into `code`."""
        error = value["error"]
        code = error.get("code") if isinstance(error, dict) else None
        status = code if isinstance(code, int) and 400 <= code < 600 else 500
        raise self._make_error(status, make_error_body(value), url, self._servers.is_proven)


def load_tokenizer(model: ModelSpec) -> Tokenizer:
    from batchgen.engines.hf_tokenizer import HFTokenizer

    return HFTokenizer(model)
