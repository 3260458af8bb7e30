"""What one worker asks the driver of exact duplicates, and what it has heard: pure but for the clock that it is given.

Questions travel together, one event at a time: the next goes when the last was answered, with all that came up meanwhile.
Rows that wait for another worker's answer are kept by that row's shard (`Source`), with where it was said to be looked.
A shard that nothing was heard of for a while is asked about again: a row never waits on one message.
"""

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from batchgen.queue.claim_table import get_shard, make_key, make_place
from batchgen.queue.events import ClaimsMade
from batchgen.queue.orders import ClaimsDecided, LookAt
from batchgen.records import JournalRef, Request, Slot
from batchgen.worker.open_shard import OpenShard

RENEW_S = 30.0
# Few rows wait a moment for others that ask: what an event costs the driver is the same for a hundred.
GATHER_S, MANY = 0.02, 128

# A request of an open shard.
Asked = tuple[OpenShard, Slot]


@dataclass(slots=True, eq=False)
class Alike:
    """Rows here with one fingerprint. `owner`: the place of the row whose answer they get; None: it is asked for.
    `leader`: the row that is asked for, or is sent: then it is the owner. None: another worker's is waited for."""

    fingerprint: bytes
    leader: Asked | None
    owner: int | None = None
    waiting: list[Asked] = field(default_factory=list)


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """May this row be sent? `request`: where it is at hand, and its size. `told`: whose answer was not to be found."""

    alike: Alike
    row: Asked
    place: int
    request: Request | None = None
    num_bytes: int = 0
    told: int = 0


@dataclass(slots=True, eq=False)
class Source:
    """Another's shard, rows of which are waited for by their places. `unread`: segments that may hold which of them;
    `ended`: those that nobody works on, and of which nothing more is heard; `look_at`: when there is something to be done,
    None: nothing."""

    places: dict[int, Alike] = field(default_factory=dict)
    unread: dict[JournalRef, set[int]] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)
    is_committed: bool = False
    heard_at: float = 0.0
    look_at: float | None = None


def is_gone(row: Asked) -> bool:
    """No answer of it will come here."""
    shard, slot = row
    return shard.is_closed or shard.is_settled(*slot)


class Desk:
    """See the module. `call_later` runs a function in so many seconds. `n`: requests a row."""

    def __init__(
        self,
        worker_id: str,
        n: int,
        emit: Callable[[ClaimsMade], None],
        call_later: Callable[[float, Callable[[], None]], object],
    ) -> None:
        self._worker_id, self._n, self._emit, self._call_later = worker_id, n, emit, call_later
        self._new, self._open = list[Question](), list[Question]()
        self._shards = set[int]()
        self._number, self._is_open = 0, False
        # Seconds after which the next event was said to go.
        self._due_s: float | None = None
        self.sources: dict[int, Source] = {}

    # ---- questions ---------------------------------------------------------------------------------------------------

    def get_place(self, row: Asked) -> int:
        shard, slot = row
        return make_place(shard.lease.shard.number, slot, self._n)

    def ask(self, question: Question) -> None:
        self._new.append(question)
        self._plan_emit()

    def _plan_emit(self) -> None:
        wait_s = 0.0 if len(self._new) >= MANY else GATHER_S
        if not self._is_open and (self._due_s is None or wait_s < self._due_s):
            self._due_s = wait_s
            self._call_later(wait_s, self._send)

    def _send(self) -> None:
        self._due_s = None
        if self._is_open or not (self._new or self._shards):
            return  # they went a moment ago
        self._is_open = True
        self._number += 1
        self._open, self._new = self._new, []
        keys = array("Q", (make_key(question.alike.fingerprint) for question in self._open))
        places = array("Q", (question.place for question in self._open))
        told = array("Q", (question.told for question in self._open))
        shards, self._shards = tuple(sorted(self._shards)), set()
        packed = keys.tobytes(), places.tobytes(), told.tobytes()
        self._emit(ClaimsMade(self._worker_id, self._number, *packed, shards))

    def take(self, order: ClaimsDecided) -> Iterator[tuple[Question, int]]:
        """Each question with the place of the row that answers."""
        if not self._is_open or order.number != self._number:
            return
        questions, self._open, self._is_open = self._open, [], False
        if self._new or self._shards:
            self._plan_emit()
        yield from zip(questions, array("Q", order.owners), strict=True)

    # ---- what is waited for ------------------------------------------------------------------------------------------

    def wait_for(self, alike: Alike, owner: int) -> None:
        """Where to look is heard next."""
        self.sources.setdefault(get_shard(owner), Source()).places[owner] = alike

    def forget(self, alike: Alike) -> None:
        """It waits for nothing."""
        if alike.owner is None or (source := self.sources.get(get_shard(alike.owner))) is None:
            return
        if source.places.get(alike.owner) is alike:
            del source.places[alike.owner]
        if not source.places:
            del self.sources[get_shard(alike.owner)]

    def hear(self, look: LookAt, now: float) -> None:
        if (source := self.sources.get(look.shard_number)) is None:
            return
        source.heard_at, source.look_at = now, 0.0
        source.is_committed |= look.is_committed
        source.ended.update(() if look.is_open or look.is_committed else source.places)
        for ref, places in look.found:
            source.unread.setdefault(ref, set()).update(place for place in places if place in source.places)

    def list_due(self, now: float) -> list[tuple[int, Source]]:
        """Of which there is news."""
        return [
            (n, source) for n, source in self.sources.items() if source.look_at is not None and source.look_at <= now
        ]

    def renew(self, now: float) -> None:
        """Ask about shards that nothing was heard of."""
        for number, source in self.sources.items():
            if now - source.heard_at > RENEW_S:
                source.heard_at = now
                self._shards.add(number)
        if self._shards:
            self._plan_emit()
