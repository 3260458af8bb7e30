"""The door of the app, before any handler: request id, keys, rates, body size, audit line. Pure ASGI: holds up no stream.

Every answer has `x-request-id`, that to a fault of our own too. All paths but `OPEN` need a key; what has none is 401,
before its body is read. The audit line names who called what and what came of it, never a query, a body or a key.
"""

import json
import logging
import secrets
import time
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from batchgen.errors import BatchgenError
from batchgen.logs import name_fault
from batchgen.serve.endpoint import Endpoint, Tenant
from batchgen.serve.errors import ApiError, too_many
from batchgen.serve.keys import LOCAL_TENANT
from batchgen.serve.rates import Rates
from batchgen.serve.spec import Limits

audit = logging.getLogger("batchgen.audit")
log = logging.getLogger("batchgen.serve")
OPEN = frozenset({"/health", "/ready", "/openapi.json", "/", "/page.css", "/page.js"})
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
# Boundaries and headers of a multipart body.
MULTIPART_BYTES = 2**16
MAX_DIGITS = 18
MAX_ID_CHARS = 64
# In the audit line, of a caller that went away first.
NOT_ANSWERED = 499


class Guard:
    """ASGI middleware, outermost."""

    def __init__(self, app: ASGIApp, endpoint: Endpoint) -> None:
        self._app, self._endpoint, self._rates = app, endpoint, Rates()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id, started = self._make_id(scope), time.monotonic()
        seen: dict[str, Any] = {"status": NOT_ANSWERED, "tenant": None}

        async def send_marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                seen["status"] = message["status"]
                headers = MutableHeaders(scope=message)
                if not self._endpoint.has_front_ids:  # else there would be two
                    headers["x-request-id"] = request_id
                headers["x-content-type-options"] = "nosniff"
            await send(message)

        try:
            await self._serve(scope, receive, send_marked, seen)
        # Whatever it is, the client gets the contract's body for it, and the log its kind and place without any text.
        except Exception as error:
            told = f"{request_id}: {name_fault(error)}"
            log.error(told)
            log.debug(told, exc_info=True)
            if seen["status"] != NOT_ANSWERED:  # the answer breaks off; the server logs this in the error's place
                raise RuntimeError(told) from None
            await make_response(make_fault(error))(scope, receive, send_marked)
        finally:
            line = {
                "request_id": request_id,
                "tenant": seen["tenant"],
                "method": scope["method"],
                "path": scope["path"][:200],
                "status": seen["status"],
                "ms": round(1000 * (time.monotonic() - started)),
            }
            audit.info(json.dumps(line))

    def _make_id(self, scope: Scope) -> str:
        given = Headers(scope=scope).get("x-request-id", "")[:MAX_ID_CHARS] if self._endpoint.has_front_ids else ""
        return given or f"req_{secrets.token_hex(12)}"

    async def _serve(self, scope: Scope, receive: Receive, send: Send, seen: dict[str, Any]) -> None:
        try:
            if scope["path"] not in OPEN:
                tenant = self._admit(Headers(scope=scope))
                seen["tenant"] = tenant.name
                scope.setdefault("state", {})["tenant"] = tenant
            receive = self._limit(scope, receive)
        except ApiError as error:
            await make_response(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _admit(self, headers: Headers) -> Tenant:
        name = self._find_tenant(headers)
        tenant = self._endpoint.make_tenant(name)
        per_minute = tenant.spec.requests_per_minute or self._endpoint.spec.limits.requests_per_minute
        wait_s = self._rates.take(name, per_minute, time.monotonic())
        if wait_s is not None:
            raise too_many(f"More than {per_minute} requests a minute; wait {wait_s} s.", wait_s)
        return tenant

    def _find_tenant(self, headers: Headers) -> str:
        keys = self._endpoint.keys
        if keys is None:
            check_local(headers)
            return LOCAL_TENANT
        scheme, _, key = headers.get("authorization", "").partition(" ")
        tenant = keys.find_tenant(key.strip()) if scheme.lower() == "bearer" else None
        if tenant is None:
            told = "Incorrect API key provided." if key else "You didn't provide an API key: Authorization: Bearer KEY"
            raise ApiError(401, told, code="invalid_api_key")
        return tenant

    def _limit(self, scope: Scope, receive: Receive) -> Receive:
        most = find_most(scope["path"], self._endpoint.spec.limits)
        length = Headers(scope=scope).get("content-length", "0")
        if not length.isdecimal() or len(length) > MAX_DIGITS or int(length) > most:
            raise make_too_large(most)
        left = most

        async def receive_limited() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise make_too_large(most)
            return message

        return receive_limited


def find_most(path: str, limits: Limits) -> int:
    """Bytes that a body may have."""
    if path == "/v1/files":
        return limits.max_file_bytes + MULTIPART_BYTES
    if path.startswith("/v1/uploads/") and path.endswith("/parts"):
        return min(limits.max_part_bytes, limits.max_file_bytes) + MULTIPART_BYTES
    return limits.max_body_bytes


def make_too_large(most: int) -> ApiError:
    return ApiError(413, f"The body is larger than the {most} bytes that are taken here.", code="request_too_large")


def make_fault(error: Exception) -> ApiError:
    """Our own fault: the caller is told nothing of it."""
    code = "internal_error" if not isinstance(error, BatchgenError) else "state_damaged"
    return ApiError(500, "Something went wrong here.", kind="server_error", code=code)


def check_local(headers: Headers) -> None:
    """Without keys only this machine's own programs may call: no page of another site, no name that someone else made point
    here."""
    host, origin = headers.get("host", ""), headers.get("origin")
    try:
        is_local = urlsplit(f"//{host}").hostname in LOOPBACK and (origin is None or urlsplit(origin).netloc == host)
    except ValueError:  # half an IPv6 address, say
        is_local = False
    if not is_local:
        told = "Without API keys this endpoint answers programs of this machine only."
        raise ApiError(403, told, kind="permission_error", code="not_local")


def make_response(error: ApiError) -> JSONResponse:
    """OpenAI's error body. A conflict stays one, so the SDKs are told not to try it again."""
    headers = {} if error.retry_after_s is None else {"retry-after": str(error.retry_after_s)}
    if error.status == 409:
        headers["x-should-retry"] = "false"
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error.make_body(), error.status, headers)
