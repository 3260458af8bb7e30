"""The HTTP client of the openai engine: how its connections are set up, and what their failures mean."""

import socket
from typing import Any

import aiohttp

from batchgen.errors import EngineUnavailable, RequestFailed
from batchgen.specs.engine import OpenAIEngineSpec

# Uvicorn, and so vLLM, closes a connection that was idle for 5 s; a request sent at that instant is lost.
KEEPALIVE_S = 3.0
# A host that vanishes answers nothing and resets nothing: the kernel asks after it, and gives up after about 75 s.
TCP_KEEPIDLE_S, TCP_KEEPINTVL_S, TCP_KEEPCNT = 30, 15, 3


def open_session(headers: dict[str, str], spec: OpenAIEngineSpec) -> aiohttp.ClientSession:
    """Bounded by the engine's own count, not by the pool: a wait for a connection must not eat a request's time."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S, socket_factory=make_socket)
    timeout = aiohttp.ClientTimeout(total=spec.request_timeout_s, sock_connect=spec.connect_timeout_s)
    return aiohttp.ClientSession(connector=connector, headers=headers, timeout=timeout, trust_env=True)


def make_socket(address: Any) -> socket.socket:
    """A socket whose kernel notices a host that vanished, where the system can be told how soon."""
    family, kind, protocol, _, _ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {"TCP_KEEPIDLE": TCP_KEEPIDLE_S, "TCP_KEEPINTVL": TCP_KEEPINTVL_S, "TCP_KEEPCNT": TCP_KEEPCNT}
    for name, value in options.items():
        if hasattr(socket, name):
            made.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return made


def describe(error: Exception, url: str) -> str:
    """Names the server and the kind of failure; a vendor's text could quote more."""
    return f"{url} can't be reached ({type(error).__name__})"


def make_transport_error(error: Exception, url: str) -> RequestFailed:
    """Not connected: not taken. Connected, and then nothing or no more: it may have been worked on."""
    if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
        return EngineUnavailable("unreachable", describe(error, url))
    if isinstance(error, TimeoutError):
        return RequestFailed("timeout", f"{url} did not answer in time (engine.request_timeout_s)")
    return RequestFailed("connection_lost", f"{url}: the connection was lost ({type(error).__name__})")
