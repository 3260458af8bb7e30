"""Rows of a run that ask exactly the same: one is sent, the others wait for its answer and take a copy.

The driver says which (`queue.claims`): a worker asks before it sends the first of its rows with a fingerprint, and others
of its own wait behind that one. Where another worker's row was first, its answer is read from the journal or from that
row's shard file (`answers`). So of all requests of a run with one fingerprint one is sent, but for what a lost worker had
not journaled, for fingerprints among more than the driver can hold (`claim_table`), and for rows beyond `MAX_WAITING`,
which are sent. Every row ends by itself: where nobody works on the row that is waited for (its worker is gone, its shard
was given back), another is asked for; and an error is no answer: all that waited for it are sent, each for itself.

What waits is in no window, keeps no prompt (it is read again where it must be sent after all), and is no part of what a
worker is said to have to do, so its engine gets other rows. A copy has the answer's tokens in its row, no attempts and no
times, and counts to the batch of rows that were taken over. Belongs to the worker's event loop.
"""

import asyncio
import contextlib
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection
from itertools import groupby

from batchgen.errors import Refusal, StorageError
from batchgen.queue.orders import ClaimsDecided, DuplicateOrder, JournalSoon, LookAt
from batchgen.records import Request, Result, RowId, Slot
from batchgen.reuse.answers import Answer
from batchgen.reuse.copies import KeptAnswers, make_copy
from batchgen.reuse.desk import Alike, Asked, Desk, Question, is_gone
from batchgen.reuse.fingerprint import is_greedy
from batchgen.reuse.lookout import Around, Feed, Lookout
from batchgen.spec import JobSpec
from batchgen.worker.open_shard import OpenShard

MAX_WAITING = 2**18  # 250 bytes each
# Rows with their prompts that wait for the driver's word: a window, or these where it is small.
MIN_ASKED, MAX_ASKED_BYTES = 256, 32 * 2**20
MAX_APART = 2**16  # fingerprints of which one failed
LOOK_S, PRUNE_S = 0.5, 10.0
STRIDE = 256  # copies made at a time


class Duplicates:
    """`push` sends, `feed` reads rows of a shard and admits them again. `open` before anything else."""

    def __init__(self, spec: JobSpec, push: Callable[[OpenShard, list[Request]], Awaitable[None]], feed: Feed) -> None:
        self._copies_all, self._n, self._push, self._feed = spec.input.duplicates == "copy", spec.sampling.n, push, feed
        self._alike: dict[bytes, Alike] = {}
        self._led: dict[bytes, Alike] = {}  # those whose leader is sent here
        self._kept = KeptAnswers()
        self._apart: OrderedDict[bytes, None] = OrderedDict()
        self._copies: list[tuple[list[Asked], Answer]] = []
        self._max_asked = max(MIN_ASKED, spec.engine.max_inflight)
        self._num_waiting = self._num_asked = self._num_asked_bytes = self._num_pushing = 0

    def open(self, around: Around) -> None:
        self._around = around
        self._desk = Desk(around.worker_id, self._n, around.emit, asyncio.get_running_loop().call_later)
        self._lookout = Lookout(around.answers, self._give, self._part, self._ask_next)
        self._news, self._has_room = asyncio.Event(), asyncio.Event()

    # ---- rows --------------------------------------------------------------------------------------------------------

    def admit(self, shard: OpenShard, request: Request) -> bool:
        """Is it to be sent? Else it has its answer, waits for one, or is sent later if the driver says so."""
        fingerprint, slot = request.fingerprint, request.row_id.slot
        if fingerprint is None or shard.lease.only or not (self._copies_all or is_greedy(request.sampling)):
            return True
        if (known := self._kept.get(fingerprint)) is not None:
            shard.add(make_copy(request.row_id, known))
            return False
        if fingerprint in self._apart:
            return True
        if (alike := self._alike.get(fingerprint)) is None:
            self._alike[fingerprint] = alike = Alike(fingerprint, (shard, slot))
            self._ask(alike, (shard, slot), request)
            return False
        return self._may_send(alike, (shard, slot))

    def _may_send(self, alike: Alike, row: Asked) -> bool:
        """Of a fingerprint that is known here. The very row that the others wait for comes again where another worker had
        it meanwhile, or where it waited itself."""
        is_leader = alike.leader is not None and alike.leader == row
        if alike.owner is None and is_leader:
            return False
        place = self._desk.get_place(row)
        if alike.owner == place and (is_leader or alike.leader is None or is_gone(alike.leader)):
            self._lead(alike, row, place)
            return True
        if row[1] in row[0].waiting:
            return False
        if self._num_waiting >= MAX_WAITING:
            return True
        self._wait(alike, row)
        return False

    async def wait_room(self) -> None:
        """Until not too many rows wait for the driver's word, and none for room before the window."""
        while self._num_pushing or self._num_asked >= self._max_asked or self._num_asked_bytes >= MAX_ASKED_BYTES:
            self._has_room.clear()
            await self._has_room.wait()

    def note_result(self, shard: OpenShard, request: Request, result: Result) -> None:
        """A request that was sent has ended."""
        if request.fingerprint is None or (alike := self._alike.get(request.fingerprint)) is None:
            return
        if result.failure is None:
            self._give(alike, (shard.lease.batch_id, result))
        elif alike.leader == (shard, request.row_id.slot) and alike.owner is not None:
            self._part(alike)

    # ---- what becomes of those that are alike ------------------------------------------------------------------------

    def _lead(self, alike: Alike, row: Asked, place: int) -> None:
        """It is sent here."""
        self._desk.forget(alike)
        alike.leader, alike.owner = row, place
        self._led[alike.fingerprint] = alike

    def _wait(self, alike: Alike, row: Asked) -> None:
        alike.waiting.append(row)
        row[0].waiting.add(row[1])
        self._num_waiting += 1

    def _take_waiting(self, alike: Alike, rows: Collection[Asked]) -> None:
        """These don't wait any more."""
        gone = set(rows)
        kept = [row for row in alike.waiting if row not in gone]
        self._num_waiting -= len(alike.waiting) - len(kept)
        alike.waiting = kept
        for shard, slot in gone:
            shard.waiting.discard(slot)

    def _end(self, alike: Alike) -> list[Asked]:
        """Nothing more is known of it here; who waited."""
        self._desk.forget(alike)
        self._alike.pop(alike.fingerprint, None)
        self._led.pop(alike.fingerprint, None)
        if rows := alike.waiting:
            self._take_waiting(alike, rows)
        return rows

    def _give(self, alike: Alike, answer: Answer) -> None:
        """To all that waited; more than a few of them without holding the event loop."""
        self._kept.add(alike.fingerprint, answer)
        if rows := self._end(alike):
            self._copy(rows[:STRIDE], answer)
            if len(rows) > STRIDE:
                self._copies.append((rows[STRIDE:], answer))
                self._news.set()

    def _copy(self, rows: Collection[Asked], answer: Answer) -> None:
        for shard, slot in rows:
            if not shard.is_closed:
                shard.add(make_copy(RowId(shard.lease.shard.file.path, *slot), answer))

    def _part(self, alike: Alike) -> None:
        """The one that was sent failed: from here on each for itself."""
        self._apart[alike.fingerprint] = None
        if len(self._apart) > MAX_APART:
            self._apart.popitem(last=False)
        by_shard: dict[OpenShard, list[Slot]] = {}
        for shard, slot in self._end(alike):
            by_shard.setdefault(shard, []).append(slot)
        for shard, slots in by_shard.items():
            self._around.spawn(self._feed_again(shard, slots))

    async def _feed_again(self, shard: OpenShard, slots: Collection[Slot]) -> None:
        """They waited in vain: read, and admitted anew."""
        try:
            await self._feed(shard, frozenset(slots))
        except (StorageError, Refusal) as error:
            shard.close(error)

    def _ask_next(self, alike: Alike, told: int = 0) -> None:
        """Nobody's answer is waited for any more: the next one that waits asks."""
        self._desk.forget(alike)
        self._led.pop(alike.fingerprint, None)
        alike.leader = alike.owner = None
        self._take_waiting(alike, [row for row in alike.waiting if is_gone(row)])
        if alike.waiting:
            self._ask(alike, alike.waiting[0], told=told)
        else:
            self._end(alike)

    # ---- the driver --------------------------------------------------------------------------------------------------

    def _ask(self, alike: Alike, row: Asked, request: Request | None = None, *, told: int = 0) -> None:
        num_bytes = 0 if request is None else request.num_bytes
        self._num_asked += request is not None
        self._num_asked_bytes += num_bytes
        self._desk.ask(Question(alike, row, self._desk.get_place(row), request, num_bytes, told))

    async def obey(self, order: DuplicateOrder) -> None:
        match order:
            case ClaimsDecided():
                await self._decide(order)
            case LookAt():
                self._desk.hear(order, time.monotonic())
                self._news.set()
            case JournalSoon(number):
                for shard in self._around.shards.values():
                    shard.is_wanted |= shard.lease.shard.number == number

    async def _decide(self, order: ClaimsDecided) -> None:
        asked = [(question, self._note_owner(question, owner)) for question, owner in self._desk.take(order)]
        for look in order.looks:
            self._desk.hear(look, time.monotonic())
        self._news.set()
        pairs = [(question, is_sent) for question, is_sent in asked if question.request is not None]
        self._num_asked -= len(pairs)
        self._num_asked_bytes -= sum(question.num_bytes for question, _ in pairs)
        self._num_pushing += 1
        for shard, group in groupby(pairs, lambda pair: pair[0].row[0]):
            await self._push(shard, [question.request for question, is_sent in group if is_sent and question.request])
        self._num_pushing -= 1
        self._has_room.set()

    def _note_owner(self, question: Question, owner: int) -> bool:
        """Is the request to be sent, with which it was asked?"""
        alike, row, request = question.alike, question.row, question.request
        if self._alike.get(alike.fingerprint) is not alike:  # what became of it decides
            return request is not None and not is_gone(row) and self.admit(row[0], request)
        if owner == question.place:
            return self._note_own(question)
        alike.leader, alike.owner = None, owner
        if request is not None and not is_gone(row):
            self._wait(alike, row)
        own = next((other for other in alike.waiting if self._desk.get_place(other) == owner), None)
        if own is not None and not is_gone(own):  # that one waits here, behind the one that asked
            self._send_waiting(alike, own)
        elif alike.waiting:
            self._desk.wait_for(alike, owner)
        else:
            self._end(alike)
        return False

    def _note_own(self, question: Question) -> bool:
        alike, row = question.alike, question.row
        if is_gone(row):
            self._ask_next(alike)
            return False
        if question.request is None:
            self._send_waiting(alike, row)
            return False
        self._lead(alike, row, question.place)
        return True

    def _send_waiting(self, alike: Alike, row: Asked) -> None:
        self._take_waiting(alike, [row])
        self._lead(alike, row, self._desk.get_place(row))
        self._around.spawn(self._feed_again(row[0], [row[1]]))

    # ---- for ever ----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Look for answers of others, and for rows that wait for nothing."""
        scan_at = prune_at = 0.0
        while True:
            with contextlib.suppress(TimeoutError):  # a look without news
                async with asyncio.timeout(LOOK_S):
                    await self._news.wait()
            self._news.clear()
            now = time.monotonic()
            if now >= scan_at:
                scan_at = now + LOOK_S
                self._replace_gone()
            if now >= prune_at:
                prune_at = now + PRUNE_S
                self._prune(now)
            for number, source in self._desk.list_due(now):
                await self._lookout.look(number, source)
            await self._copy_rest()

    def _replace_gone(self) -> None:
        for alike in [alike for alike in self._led.values() if alike.leader is not None and is_gone(alike.leader)]:
            self._ask_next(alike)

    def _prune(self, now: float) -> None:
        """Rows of shards that were closed wait no more."""
        for alike in list(self._alike.values()):
            if closed := [row for row in alike.waiting if row[0].is_closed]:
                self._take_waiting(alike, closed)
            if not alike.waiting and alike.leader is None and alike.owner is not None:
                self._end(alike)
        self._desk.renew(now)

    async def _copy_rest(self) -> None:
        while self._copies:
            rows, answer = self._copies.pop()
            for start in range(0, len(rows), STRIDE):
                self._copy(rows[start : start + STRIDE], answer)
                await asyncio.sleep(0)


def make_duplicates(
    spec: JobSpec, push: Callable[[OpenShard, list[Request]], Awaitable[None]], feed: Feed
) -> Duplicates | None:
    """None where no row of the job can have a copy of another's answer."""
    policy, may_be_greedy = spec.input.duplicates, spec.sampling.temperature == 0 or spec.prompt.sampling is not None
    is_on = spec.output.row_fingerprints and (policy == "copy" or (policy == "auto" and may_be_greedy))
    return Duplicates(spec, push, feed) if is_on else None
