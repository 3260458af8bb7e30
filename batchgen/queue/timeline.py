"""How a run went over time, in a few hundred bins whatever its length. Pure: time is an argument.

Every figure of a bin is a sum over its time (rows, tokens, worker-seconds), so that neighbours merge without loss: when
there are too many bins, each takes in the next and stands for twice the time. What has been since no shard waits any more
is summed apart: the tail, where a worker that runs dry gets no other work.
"""

from dataclasses import dataclass, field

FIRST_BIN_S = 1.0
MAX_BINS = 240


@dataclass(frozen=True, slots=True)
class Moment:
    """A run as it is now. Counts of what was done since the run began, of workers, and of requests in flight."""

    num_rows: int
    num_errors: int
    num_tokens: int
    num_starting: int
    num_ready: int
    num_busy: int
    num_inflight: int
    window: int
    has_waiting: bool


@dataclass(slots=True)
class Span:
    """Sums over a time: `seconds` of it; rows, errors and tokens done in it; worker-seconds of those that start, are up,
    and have something to do; request-seconds in flight and of the windows."""

    seconds: float = 0.0
    rows: int = 0
    errors: int = 0
    tokens: int = 0
    starting_s: float = 0.0
    ready_s: float = 0.0
    busy_s: float = 0.0
    inflight_s: float = 0.0
    window_s: float = 0.0

    def add(self, other: "Span") -> None:
        for name in SPAN_FIELDS:
            setattr(self, name, getattr(self, name) + getattr(other, name))


SPAN_FIELDS = tuple(Span.__dataclass_fields__)


@dataclass(slots=True)
class Timeline:
    """`bins[i]` is from i x `bin_s` on, seconds since the run began. `tail` is of the time since `tail_began_s`."""

    began: float
    bin_s: float = FIRST_BIN_S
    bins: list[Span] = field(default_factory=list)
    total: Span = field(default_factory=Span)
    tail: Span = field(default_factory=Span)
    tail_began_s: float | None = None
    _last: Moment | None = None
    _last_at: float = 0.0

    def turn(self, moment: Moment, now: float) -> None:
        """Since the last turn all was as it was then, and now it is so."""
        at = now - self.began
        last, self._last = self._last, moment
        span = _make_span(last, moment, at - self._last_at) if last else Span()
        self._last_at = at
        self.total.add(span)
        self._find_bin(at).add(span)
        if moment.has_waiting:
            self.tail, self.tail_began_s = Span(), None
        elif self.tail_began_s is None:
            self.tail_began_s = at
        else:
            self.tail.add(span)

    def _find_bin(self, at: float) -> Span:
        while at >= self.bin_s * MAX_BINS:
            self.bins = [_merge(self.bins[place : place + 2]) for place in range(0, len(self.bins), 2)]
            self.bin_s *= 2
        place = int(at / self.bin_s)
        self.bins += [Span() for _ in range(place + 1 - len(self.bins))]
        return self.bins[place]


def _merge(spans: list[Span]) -> Span:
    merged = Span()
    for span in spans:
        merged.add(span)
    return merged


def _make_span(last: Moment, now: Moment, seconds: float) -> Span:
    return Span(
        seconds,
        rows=now.num_rows - last.num_rows,
        errors=now.num_errors - last.num_errors,
        tokens=now.num_tokens - last.num_tokens,
        starting_s=last.num_starting * seconds,
        ready_s=last.num_ready * seconds,
        busy_s=last.num_busy * seconds,
        inflight_s=last.num_inflight * seconds,
        window_s=last.window * seconds,
    )
