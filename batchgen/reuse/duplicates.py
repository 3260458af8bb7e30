"""Rows of a run that ask exactly the same: one is sent, the others wait for its answer and take a copy.

What is promised: of requests with one fingerprint that a worker has at the same time, or within the last
`MAX_ANSWER_BYTES` of answers, one is sent. Across workers nothing is; after a crash one may be sent once more. Every row
ends by itself: where the one that was sent fails, is another worker's now, or its shard is closed, the next one is sent.
What waits is in no window, so the engine is kept busy with other rows; beyond `MAX_WAITING_BYTES` of it rows are sent.

A copy has the answer's tokens in its row, no attempts and no times, and counts to the batch of rows that were taken over.
Belongs to the worker's event loop.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

from batchgen.records import TOKEN_BYTES, Request, Result, Timing
from batchgen.reuse.fingerprint import is_greedy
from batchgen.spec import JobSpec
from batchgen.worker.answer import count_values
from batchgen.worker.open_shard import OpenShard

MAX_ANSWER_BYTES = 64 * 2**20
MAX_WAITING_BYTES = 64 * 2**20
LOOK_S = 0.5
# A logprob, of which a token may have twenty, takes a pair with a float where a token id is an int.
LOGPROB_IDS = 3

Asked = tuple[OpenShard, Request]


@dataclass(slots=True)
class Sent:
    """The one that was sent, and those that wait for it."""

    shard: OpenShard
    request: Request
    waiting: list[Asked] = field(default_factory=list)

    @property
    def is_gone(self) -> bool:
        """No answer of it will come here."""
        return self.shard.is_closed or self.shard.is_settled(*self.request.row_id.slot)


class Duplicates:
    """`send`: for a request that waited in vain."""

    def __init__(self, spec: JobSpec, send: Callable[[OpenShard, Request], Awaitable[None]]) -> None:
        self._copies_all, self._send = spec.input.duplicates == "copy", send
        self._sent: dict[bytes, Sent] = {}
        self._answers: OrderedDict[bytes, tuple[str, Result]] = OrderedDict()
        self._num_answer_bytes = self._num_waiting_bytes = 0

    def admit(self, shard: OpenShard, request: Request) -> bool:
        """Is it to be sent? Else it has its answer, or waits for one."""
        fingerprint = request.fingerprint
        if fingerprint is None or shard.lease.only or not (self._copies_all or is_greedy(request.sampling)):
            return True
        if (known := self._answers.get(fingerprint)) is not None:
            self._answers.move_to_end(fingerprint)
            shard.add(make_copy(request, *known))
            return False
        sent = self._sent.get(fingerprint)
        if sent is None or (sent.is_gone and not sent.waiting):
            self._sent[fingerprint] = Sent(shard, request)
            return True
        if sent.shard is shard and sent.request.row_id == request.row_id:
            return True  # another worker had it meanwhile
        if self._num_waiting_bytes + request.num_bytes > MAX_WAITING_BYTES:
            return True
        self._num_waiting_bytes += request.num_bytes
        sent.waiting.append((shard, request))
        shard.waiting.add(request.row_id.slot)
        return False

    def note_answer(self, shard: OpenShard, request: Request, result: Result) -> None:
        """A request was answered: whoever waits for it gets a copy."""
        fingerprint = request.fingerprint
        if fingerprint is None or (sent := self._sent.pop(fingerprint, None)) is None:
            return
        batch_id = shard.lease.batch_id
        self._keep(fingerprint, batch_id, result)
        for other, waiting in self._take_waiting(sent):
            if not other.is_closed:
                other.add(make_copy(waiting, batch_id, result))

    async def run(self) -> None:
        """For ever: look for those that wait for nothing."""
        while True:
            await asyncio.sleep(LOOK_S)
            for fingerprint in [fingerprint for fingerprint, sent in self._sent.items() if sent.is_gone]:
                # Others may have come meanwhile, while one was sent.
                sent = self._sent.pop(fingerprint, None)
                for shard, request in self._take_waiting(sent) if sent is not None else ():
                    if (
                        not shard.is_closed
                        and not shard.is_settled(*request.row_id.slot)
                        and self.admit(shard, request)
                    ):
                        await self._send(shard, request)

    def _take_waiting(self, sent: Sent) -> list[Asked]:
        self._num_waiting_bytes -= sum(request.num_bytes for _, request in sent.waiting)
        for shard, request in sent.waiting:
            shard.waiting.discard(request.row_id.slot)
        return sent.waiting

    def _keep(self, fingerprint: bytes, batch_id: str, result: Result) -> None:
        self._answers[fingerprint] = batch_id, result
        self._num_answer_bytes += count_bytes(result)
        while self._num_answer_bytes > MAX_ANSWER_BYTES:
            _, (_, oldest) = self._answers.popitem(last=False)
            self._num_answer_bytes -= count_bytes(oldest)


def make_duplicates(spec: JobSpec, send: Callable[[OpenShard, Request], Awaitable[None]]) -> Duplicates | None:
    """None where no row of the job can have a copy of another's answer."""
    policy, may_be_greedy = spec.input.duplicates, spec.sampling.temperature == 0 or spec.prompt.sampling is not None
    is_on = spec.output.row_fingerprints and (policy == "copy" or (policy == "auto" and may_be_greedy))
    return Duplicates(spec, send) if is_on else None


def make_copy(request: Request, batch_id: str, result: Result) -> Result:
    """The result of a request that was never sent. `batch_id`: whose answer it is."""
    return replace(result, row_id=request.row_id, num_attempts=0, timing=Timing(), reused_from=batch_id)


def count_bytes(result: Result) -> int:
    """Rough size in memory."""
    answer = result.generation
    num_ids = len((answer and answer.token_ids) or ())
    num_ids += LOGPROB_IDS * (count_values(answer) - num_ids)
    texts = (result.text, result.reasoning, answer and answer.text, answer and answer.tool_calls)
    return 400 + TOKEN_BYTES * num_ids + sum(2 * len(text) for text in texts if text)
