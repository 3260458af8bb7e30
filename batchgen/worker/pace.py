"""How long a heartbeat may wait, by how fast a worker sends. Pure: times are arguments.

The driver lends the next shard by what the last heartbeat said. Where rows take milliseconds a window is sent anew while a
heartbeat gets old, and the worker runs dry; where they take minutes a frequent heartbeat says nothing, a thousand times a
second on a large cluster. So the next one comes when about a quarter of the window will have been sent since the last.
"""

from dataclasses import dataclass

MIN_WAIT_S = 0.1
WINDOW_SHARE = 0.25


@dataclass(slots=True)
class Pace:
    """Of one worker: `num_sent` requests and the time at the last heartbeat, and what was waited for it."""

    window: int
    now: float
    num_sent: int = 0
    wait_s: float = MIN_WAIT_S

    def choose_wait_s(self, num_sent: int, now: float, max_wait_s: float) -> float:
        """For the next heartbeat; told at each. Twice the last wait at most, so that a start is not slept through."""
        sent, spent = num_sent - self.num_sent, now - self.now
        due_s = WINDOW_SHARE * self.window * spent / sent if sent > 0 else max_wait_s
        self.num_sent, self.now = num_sent, now
        self.wait_s = min(max_wait_s, max(MIN_WAIT_S, min(due_s, 2 * self.wait_s)))
        return self.wait_s
