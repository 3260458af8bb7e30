"""The engine's own process: `python -m batchgen.engines.trtllm.child FD`, FD being its end of the socket to the actor.

It builds one engine, serves it and ends with it: `wire` has what is said and in which order. It lives no longer
than its parent and than the socket, and what it started ends with it wherever it still has the say; whoever started it
looks after the rest. Exit codes: 0 after `Stop`, 1 when the engine could not be made, 2 when the actor was gone.
"""

import asyncio
import os
import socket
import sys
import threading
from typing import Any, NoReturn

from batchgen.engines.trtllm.errors import judge_start
from batchgen.engines.trtllm.host import (
    die_with_parent,
    keep_descendants,
    kill_descendants,
    point_stdout_at_stderr,
    read_group_rss_bytes,
)
from batchgen.engines.trtllm.port import Port
from batchgen.engines.trtllm.probe import check_tokenizer, make_started
from batchgen.engines.trtllm.serve import Server
from batchgen.engines.trtllm.vendor import load_vendor
from batchgen.engines.trtllm.wire import Abort, Beat, Note, Start, StartFailed, Stop, Submit

# The vendor's shutdown is known to hang; what it has not ended by then is killed.
SHUTDOWN_S = 20.0
LAST_WORDS_S = 5.0


class Child:
    """The process. `server` is None until the engine is made."""

    def __init__(self, sock: socket.socket) -> None:
        self.port = Port(sock, self._make_beat, on_gone=self._end_at_once)
        self.server: Server | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = asyncio.Event()

    def run(self) -> NoReturn:
        start = self.port.receive()
        if not isinstance(start, Start):
            raise ValueError(f"the first message is {type(start).__name__}, not Start")
        self.port.start_writing(start.beat_s)
        self.port.start_reading(self._take)
        # Whatever the vendor raises, here or in the first answer, is an answer to `Start`; it calls sys.exit, too.
        try:
            vendor, llm = self._make_engine(start)
            asyncio.run(self._serve(vendor, llm, start))
        except (Exception, SystemExit) as error:  # noqa: BLE001
            self._fail(error)
        os._exit(0)

    def _make_engine(self, start: Start) -> tuple[Any, Any]:
        self.port.send(Note("importing TensorRT-LLM"))
        vendor = load_vendor()
        self.port.send(Note(f"TensorRT-LLM {vendor.version} loads the model"))
        llm = vendor.llm(**start.llm)
        check_tokenizer(llm)
        return vendor, llm

    async def _serve(self, vendor: Any, llm: Any, start: Start) -> None:
        """Until `Stop`, which does not return. Raises what the first answer raises, and nothing later."""
        server = Server(vendor, llm, self.port.send, has_perf_metrics=start.has_perf_metrics)
        self.port.send(Note("first answer"))
        has_perf_metrics = await server.call_canary()
        started = make_started(vendor, llm, start, has_perf_metrics=has_perf_metrics)
        self.server, self._loop = server, asyncio.get_running_loop()
        self.port.send(started)
        await self._stopping.wait()
        self._shut_down(llm)

    # ---- what comes in, on the reading thread

    def _take(self, message: Any) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._handle, message)
        elif isinstance(message, Stop):
            self._end_at_once(code=0)  # nobody waits for an engine that is half made

    def _handle(self, message: Any) -> None:
        assert self.server is not None
        if isinstance(message, Submit):
            self.server.submit(message)
        elif isinstance(message, Abort):
            self.server.abort(message)
        elif isinstance(message, Stop):
            self._stopping.set()

    # ---- what goes out

    def _make_beat(self) -> Beat:
        """On the writing thread."""
        if self.server is None:
            return Beat(0, 0, read_group_rss_bytes(), is_healthy=True)
        server = self.server
        return Beat(server.total_tokens, server.num_inflight, read_group_rss_bytes(), server.is_healthy)

    # ---- the end

    def _shut_down(self, llm: Any) -> NoReturn:
        ending = threading.Thread(target=llm.shutdown, daemon=True, name="shutdown")
        ending.start()
        ending.join(SHUTDOWN_S)
        self._end_at_once(code=0)

    def _fail(self, error: BaseException) -> NoReturn:
        message, is_spec = judge_start(error)
        self.port.send(StartFailed(message, is_spec))
        self.port.flush(LAST_WORDS_S)
        self._end_at_once(code=1)

    def _end_at_once(self, code: int = 2) -> NoReturn:
        """Without the vendor's own end: its exit handlers wait for ranks that may be stuck."""
        kill_descendants()
        os._exit(code)


def main() -> None:
    sock = socket.socket(fileno=int(sys.argv[1]))
    # Before anything else is started: a rank that inherits it would keep the actor waiting for an end of file.
    sock.set_inheritable(False)
    sock.setblocking(True)
    die_with_parent()
    keep_descendants()
    point_stdout_at_stderr()
    Child(sock).run()


if __name__ == "__main__":
    main()
