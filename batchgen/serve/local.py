"""The endpoint from one command: join or start Ray, serve the application on one port, drain at a signal."""

import signal
import threading
from collections.abc import Callable

from ray import serve

from batchgen.ray_pool import connect
from batchgen.serve.deployment import AppArgs, app
from batchgen.spec import ClusterSpec

NAME = "batchgen"


def serve_until_stopped(
    spec: str, *, host: str, port: int, keys: str | None, no_keys: bool, say: Callable[[str], None]
) -> None:
    """Until SIGINT or SIGTERM. Raises Refusal for what can't be served."""
    connect(ClusterSpec())
    application = app(AppArgs(spec=spec, keys=keys, no_keys=no_keys))
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        serve.start(http_options={"host": host, "port": port})
        serve.run(application, name=NAME, route_prefix="/")
        say(f"serving at http://{host}:{port}/v1; Ctrl-C drains and stops")
        stop.wait()
        say("draining; batches go on at the next start")
    finally:
        serve.shutdown()
        for number, handler in before.items():
            signal.signal(number, handler)
