"""SIGINT and SIGTERM as a wish to stop, seen at the next turn of the loop instead of wherever the program happens to be."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from batchgen.errors import Cancelled


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], None]]:
    """A check that raises Cancelled after the first signal; a second SIGINT is an ordinary KeyboardInterrupt.

    Entered after joining a cluster, because Ray sets a handler of its own then. Outside the main thread Python allows
    no handlers: the check never raises there.
    """
    asked = threading.Event()

    def check() -> None:
        if asked.is_set():
            raise Cancelled("stopped by a signal")

    def ask(number: int, _: object) -> None:
        if asked.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.set()

    if threading.current_thread() is not threading.main_thread():
        yield check
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
