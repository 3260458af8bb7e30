"""The engine process's end of the socket: two threads, so that nothing waits for the event loop, nor it for them.

One thread writes: what `send` was given, in order, and a `Beat` every `beat_s` in between, also while the engine is being
made and while the event loop is stuck. The other reads and hands each message over. A socket that is closed or broken
means the actor is gone: `on_gone` is called, on either thread, and must not return.
"""

import pickle
import queue
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

from batchgen.engines.trtllm.wire import HEADER, Beat, FromEngine, pack


class Port:
    """Thread-safe. Daemon threads: they never keep the process."""

    def __init__(self, sock: socket.socket, make_beat: Callable[[], Beat], on_gone: Callable[[], NoReturn]) -> None:
        self._sock = sock
        self._make_beat = make_beat
        self._on_gone = on_gone
        self._outbox: queue.SimpleQueue[FromEngine] = queue.SimpleQueue()
        self._num_sent = 0
        self._num_given = 0

    def receive(self) -> Any:
        """The next message, waited for on the calling thread; before `start_reading`."""
        try:
            (length,) = HEADER.unpack(self._read(HEADER.size))
            return pickle.loads(self._read(length))
        except (EOFError, OSError):
            self._on_gone()

    def start_writing(self, beat_s: float) -> None:
        threading.Thread(target=self._write_all, args=(beat_s,), daemon=True, name="beats").start()

    def start_reading(self, on_message: Callable[[Any], None]) -> None:
        """`on_message` is called on the reading thread, one message after the other."""
        threading.Thread(target=self._read_all, args=(on_message,), daemon=True, name="orders").start()

    def send(self, message: FromEngine) -> None:
        self._num_given += 1
        self._outbox.put(message)

    def flush(self, timeout_s: float) -> None:
        """Waits until all that was given is written, or the time is up. The caller sends no more."""
        end = time.monotonic() + timeout_s
        while self._num_sent < self._num_given and time.monotonic() < end:
            time.sleep(0.001)

    def _write_all(self, beat_s: float) -> None:
        beat_at = time.monotonic()
        while True:
            try:
                message = self._outbox.get(timeout=max(0.0, beat_at - time.monotonic()))
                self._write(message)
                self._num_sent += 1
            except queue.Empty:
                pass  # time for a beat
            if time.monotonic() >= beat_at:
                self._write(self._make_beat())
                beat_at = time.monotonic() + beat_s

    def _write(self, message: FromEngine) -> None:
        try:
            self._sock.sendall(pack(message))
        except OSError:
            self._on_gone()

    def _read_all(self, on_message: Callable[[Any], None]) -> None:
        while True:
            on_message(self.receive())

    def _read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            part = self._sock.recv(size - len(data))
            if not part:
                raise EOFError
            data += part
        return bytes(data)
