"""An S3 server for tests, and a proxy before it that misbehaves on demand.

The server is moto in a process of its own, on a free port of localhost; it dies with its parent, however that ends.
Facts about moto 5.2, and what is mended here so that it decides as S3 does:

- PutObject checks If-None-Match and If-Match, but looks first and writes later, in threads: two creators could both
  win. Every request that writes runs under one lock here.
- CompleteMultipartUpload checks If-None-Match, not If-Match: added here. A second completion of a finished upload is
  answered like the first (S3 does so for a while); 409 ConditionalRequestConflict never comes (`S3Proxy.answer`).
- DeleteObjects needs no Content-MD5; bodies' checksums and signatures are not verified.
"""

import asyncio
import contextlib
import http.client
import os
import random
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, urlsplit

_ERROR = "<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code><Message>{code}</Message></Error>"
_CONDITIONS = {"if-none-match", "if-match"}
# Longer than a test lets its client wait (`stores.s3.READ_TIMEOUT_S`).
HANG_S = 1.5
# Listings that may be stale: those that a run looks at for what others did. (A store that hides what a process wrote
# itself is refused by the probe.)
_STALE = re.compile(r"list-type=2.*prefix=[^&]*(data|journal)|prefix=[^&]*(data|journal).*list-type=2")


@dataclass(frozen=True, slots=True)
class S3Server:
    endpoint: str
    bucket: str

    @property
    def env(self) -> dict[str, str]:
        """For every process that shall use this server and nothing of this machine's own settings."""
        return make_env(self.endpoint)


def make_env(endpoint: str) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test-key",
        "AWS_SECRET_ACCESS_KEY": "test-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }


@contextlib.contextmanager
def run_s3_server(bucket: str = "bucket") -> Iterator[S3Server]:
    command = [sys.executable, __file__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            port = int(process.stdout.readline())
            create_bucket(f"http://127.0.0.1:{port}", bucket)
            yield S3Server(f"http://127.0.0.1:{port}", bucket)
        finally:
            process.kill()


def create_bucket(endpoint: str, bucket: str) -> None:
    connection = http.client.HTTPConnection(urlsplit(endpoint).netloc, timeout=30)
    connection.request("PUT", f"/{bucket}")
    assert connection.getresponse().status == 200
    connection.close()


# ---- the server process


def _serve() -> None:
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"  # keeps connections, as S3 does

        def log_request(self, code: int | str = "-", size: int | str = "-") -> None: ...

    app = _as_s3_decides(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Quiet)
    print(server.port, flush=True)
    # The parent holds the other end of stdin: it closes even when the parent is killed.
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    server.serve_forever()


def _as_s3_decides(app: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
    writing = threading.Lock()

    def decide(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] in {"GET", "HEAD"}:
            return app(environ, start_response)
        with writing:
            if _is_completion_of_stale(environ):
                start_response("412 Precondition Failed", [("Content-Type", "application/xml")])
                return [_ERROR.format(code="PreconditionFailed").encode()]
            return app(environ, start_response)

    return decide


def _is_completion_of_stale(environ: dict[str, Any]) -> bool:
    from moto.s3.models import s3_backends

    wanted = environ.get("HTTP_IF_MATCH", "")
    if not wanted or "uploadId" not in parse_qs(environ["QUERY_STRING"]):
        return False
    path = environ["PATH_INFO"].encode("latin-1").decode()
    bucket, _, key = path.lstrip("/").partition("/")
    found = s3_backends["123456789012"]["aws"].get_object(bucket, key)
    return found is None or found.etag.strip('"') != wanted.strip('"')


# ---- the proxy


@dataclass(frozen=True, slots=True)
class Seen:
    method: str
    path: str
    query: str
    conditions: frozenset[str]


class Held:
    """A request that the store has carried out and whose sender waits for the reply."""

    def __init__(self) -> None:
        self.is_forwarded = threading.Event()
        self._release: Callable[[], None] | None = None

    def release(self) -> None:
        assert self._release is not None
        self._release()


@dataclass(slots=True)
class _Rule:
    """`kind`: answer (not forwarded), hold or drop (forwarded first). `skip`: how many requests pass before."""

    kind: str
    method: str
    pattern: str
    times: int
    skip: int = 0
    status: int = 0
    code: str = ""
    held: Held | None = None

    def takes(self, method: str, path: str) -> bool:
        if self.times == 0 or method != (self.method or method) or not re.search(self.pattern, path):
            return False
        if self.skip:
            self.skip -= 1
            return False
        self.times -= 1
        return True


class S3Proxy:
    """Switches may be set at any time from the test's thread. `seen`: every request, in order of arrival."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = ""
        self.seen: list[Seen] = []
        self.refuses_conditions = False
        """Conditional writes get 501, and the bulk delete 400 for want of a Content-MD5."""
        self.ignores_conditions = False
        self.faults: Counter[str] = Counter()
        self._store = endpoint
        self._rules: list[_Rule] = []
        self._rng, self._rate = random.Random(), 0.0
        self._listings: dict[str, Any] = {}

    def hold_reply(self, pattern: str, *, nth: int = 1, method: str = "PUT") -> Held:
        """Of the n-th matching request: carried out by the store, answered on `release()` or never."""
        held = Held()
        self._rules.append(_Rule("hold", method, pattern, times=1, skip=nth - 1, held=held))
        return held

    def drop_reply(self, pattern: str, *, times: int = 1, method: str = "PUT") -> None:
        """The store carries it out, then the connection closes without a reply."""
        self._rules.append(_Rule("drop", method, pattern, times=times))

    def answer(self, status: int, code: str, *, pattern: str = "", times: int = -1, method: str = "") -> None:
        """Not forwarded. `times` -1: for ever."""
        self._rules.append(_Rule("answer", method, pattern, times=times, status=status, code=code))

    def misbehave(self, seed: int, rate: float) -> Counter[str]:
        """From now on this share of all requests fails, each in a way drawn by the seed; how often each has."""
        self._rng, self._rate, self.faults = random.Random(seed), rate, Counter()
        return self.faults

    def behave(self) -> None:
        self._rate = 0.0

    def _draw_fault(self, method: str, query: str, conditions: frozenset[str]) -> str:
        if self._rng.random() >= self._rate:
            return ""
        kinds = ["slow_down", "internal_error", "reset", "lost_reply", "expired", "timeout"]
        kinds += ["stale"] * 4 if query in self._listings else []
        kinds += ["truncated"] * 2 if method == "GET" else []
        kinds += ["conflict"] * 2 if conditions else []
        kind = self._rng.choice(kinds)
        self.faults[kind] += 1
        return kind

    async def _misbehave(self, request: Any, kind: str) -> Any:
        from aiohttp import web

        if kind in _ANSWERS:
            status, code = _ANSWERS[kind]
            return web.Response(status=status, text=_ERROR.format(code=code), content_type="application/xml")
        if kind == "stale":
            status, headers, body = self._listings[request.query_string]
            return web.Response(status=status, headers=headers, body=body)
        if kind == "timeout":
            await asyncio.sleep(HANG_S)
        response = await self._forward(request) if kind in ("lost_reply", "truncated") else web.Response()
        if kind == "truncated" and len(response.body) > 1:
            partial = web.StreamResponse(status=response.status, headers=response.headers)
            partial.content_length = len(response.body)
            await partial.prepare(request)
            await partial.write(response.body[: len(response.body) // 2])
        if request.transport is not None:  # the client may have gone first
            request.transport.abort()
        return response

    def slow_down(self, times: int) -> None:
        self.answer(503, "SlowDown", times=times)

    @contextlib.contextmanager
    def running(self) -> Iterator["S3Proxy"]:
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, name="s3-proxy")
        thread.start()
        try:
            stop = asyncio.run_coroutine_threadsafe(self._start(), loop).result(10)
            yield self
            asyncio.run_coroutine_threadsafe(stop(), loop).result(10)
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

    async def _start(self) -> Callable[[], Any]:
        import aiohttp
        from aiohttp import web

        self._session = aiohttp.ClientSession(auto_decompress=False)
        app = web.Application(client_max_size=2**30)  # unlike a bare web.Server it answers `Expect: 100-continue`
        app.router.add_route("*", "/{path:.*}", self._handle)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.endpoint = f"http://127.0.0.1:{runner.addresses[0][1]}"

        async def stop() -> None:
            await runner.cleanup()
            await self._session.close()

        return stop

    async def _handle(self, request: Any) -> Any:
        from aiohttp import web

        method, path = request.method, request.path
        conditions = frozenset(name.lower() for name in request.headers) & _CONDITIONS
        self.seen.append(Seen(method, path, request.query_string, conditions))
        if kind := self._draw_fault(method, request.query_string, conditions):
            return await self._misbehave(request, kind)
        rule = next((rule for rule in self._rules if rule.takes(method, path)), None)
        status, code = self._make_refusal(request, conditions) if rule is None else (rule.status, rule.code)
        if status:
            return web.Response(status=status, text=_ERROR.format(code=code), content_type="application/xml")
        response = await self._forward(request)
        if _STALE.search(request.query_string):  # as it was: a later listing may be answered with it
            self._listings.setdefault(request.query_string, (response.status, response.headers.copy(), response.body))
        if rule is not None and rule.kind == "drop":
            request.transport.abort()
        if rule is not None and rule.held is not None:
            await self._hold(rule.held)
        return response

    def _make_refusal(self, request: Any, conditions: frozenset[str]) -> tuple[int, str]:
        if self.refuses_conditions and conditions and request.method in {"PUT", "POST"}:
            return 501, "NotImplemented"
        if self.refuses_conditions and "delete" in request.query and "Content-MD5" not in request.headers:
            return 400, "InvalidRequest"
        return 0, ""

    async def _hold(self, held: Held) -> None:
        released = asyncio.Event()
        loop = asyncio.get_running_loop()
        held._release = lambda: loop.call_soon_threadsafe(released.set) and None
        held.is_forwarded.set()
        await released.wait()

    async def _forward(self, request: Any) -> Any:
        from aiohttp import web
        from yarl import URL

        dropped = {"host", "expect", "transfer-encoding", "content-length", "connection"}
        if self.ignores_conditions and request.method in {"PUT", "POST"}:
            dropped |= _CONDITIONS
        headers = {name: value for name, value in request.headers.items() if name.lower() not in dropped}
        url = URL(self._store + request.raw_path, encoded=True)
        async with self._session.request(request.method, url, headers=headers, data=await request.read()) as reply:
            kept = {name: value for name, value in reply.headers.items() if name.lower() not in _HOP_BY_HOP}
            if request.method != "HEAD":
                kept.pop("Content-Length", None)
            return web.Response(status=reply.status, headers=kept, body=await reply.read())


_ANSWERS = {
    "slow_down": (503, "SlowDown"),
    "internal_error": (500, "InternalError"),
    "conflict": (409, "ConditionalRequestConflict"),
    "expired": (400, "ExpiredToken"),
}
_HOP_BY_HOP = {"connection", "transfer-encoding", "date", "server"}

if __name__ == "__main__":
    _serve()
