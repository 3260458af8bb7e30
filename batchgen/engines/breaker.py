"""Which of several servers gets a request, and when one is left alone: a circuit breaker for each. Pure: time is an
argument (monotonic seconds).

A server that failed several times in a row is *shut off*: it gets no request for a second, then for twice as long, up
to a bound. When that time is over, whoever comes first asks it how it is (no row is risked on it), and one more failure
shuts it off again. All servers together are hopeless when none has answered for `give_up_s` and nothing is in flight.
"""

from collections.abc import Sequence
from dataclasses import dataclass

FIRST_PAUSE_S = 1.0
MAX_PAUSE_S = 10.0
# While somebody else asks a server how it is.
ASKING_S = 0.5


@dataclass(slots=True, eq=False)
class Server:
    """One base URL. `shut_until` is None while it gets requests; `num_failures` in a row."""

    url: str
    num_inflight: int = 0
    num_sent: int = 0
    num_failures: int = 0
    num_pauses: int = 0
    shut_until: float | None = None
    is_asked: bool = False

    def is_due(self, now: float) -> bool:
        """Is it time to ask a server that is shut off how it is?"""
        return self.shut_until is not None and not self.is_asked and self.shut_until <= now


class Servers:
    """See the module. `is_proven`: a server has answered a request, so the spec's URL and model can work."""

    def __init__(self, urls: Sequence[str], max_failures: int, give_up_s: float) -> None:
        self.all = [Server(url) for url in urls]
        self.is_proven = False
        self._max_failures, self._give_up_s = max_failures, give_up_s
        self._down_since: float | None = None

    def choose(self, now: float) -> Server | None:
        """One to be asked how it is (`is_due`; it is then marked so), else the one with the fewest in flight. None: all
        are shut off."""
        due = next((server for server in self.all if server.is_due(now)), None)
        if due is not None:
            due.is_asked = True
            return due
        on = [server for server in self.all if server.shut_until is None]
        return min(on, key=lambda server: (server.num_inflight, server.num_sent), default=None)

    def get_pause_s(self, now: float) -> float:
        """Until one of them may be tried again."""
        times = [ASKING_S if server.is_asked else (server.shut_until or now) - now for server in self.all]
        return max(0.0, min(times))

    def note_up(self, server: Server) -> None:
        """It said that it is up: it gets requests, and one more failure shuts it off again."""
        server.shut_until, server.is_asked = None, False
        server.num_failures = self._max_failures - 1

    def note_answer(self, server: Server) -> None:
        """It answered a request, be it with a refusal of that row."""
        server.shut_until, server.num_failures, server.num_pauses = None, 0, 0
        self.is_proven, self._down_since = True, None

    def note_refusal(self, now: float) -> None:
        """A request was not taken."""
        self._down_since = now if self._down_since is None else self._down_since

    def note_failure(self, server: Server, now: float) -> None:
        """A request or a question failed. Those of a whole window that fail at once shut it off once."""
        self.note_refusal(now)
        server.num_failures += 1
        server.is_asked = False
        if server.num_failures >= self._max_failures and (server.shut_until is None or server.shut_until <= now):
            server.shut_until = now + min(MAX_PAUSE_S, FIRST_PAUSE_S * 2**server.num_pauses)
            server.num_pauses = min(server.num_pauses + 1, 30)

    def is_hopeless(self, now: float) -> bool:
        """Requests in flight are hope: a server at its limit refuses more for as long as its answers take."""
        is_late = self._down_since is not None and now - self._down_since > self._give_up_s
        return is_late and not any(server.num_inflight for server in self.all)
