"""Answers that were given lately, and copies of them. Pure."""

from collections import OrderedDict
from dataclasses import replace

from batchgen.records import TOKEN_BYTES, Result, RowId, Timing
from batchgen.reuse.answers import Answer
from batchgen.worker.answer import count_values

MAX_BYTES = 64 * 2**20
# A logprob, of which a token may have twenty, takes a pair with a float where a token id is an int.
LOGPROB_IDS = 3


class KeptAnswers:
    """By fingerprint; those used last, up to `MAX_BYTES`."""

    def __init__(self) -> None:
        self._answers: OrderedDict[bytes, Answer] = OrderedDict()
        self._num_bytes = 0

    def get(self, fingerprint: bytes) -> Answer | None:
        if (answer := self._answers.get(fingerprint)) is not None:
            self._answers.move_to_end(fingerprint)
        return answer

    def add(self, fingerprint: bytes, answer: Answer) -> None:
        """One that is not there."""
        self._answers[fingerprint] = answer
        self._num_bytes += count_bytes(answer[1])
        while self._num_bytes > MAX_BYTES:
            _, (_, oldest) = self._answers.popitem(last=False)
            self._num_bytes -= count_bytes(oldest)


def make_copy(row_id: RowId, answer: Answer) -> Result:
    """The result of a request that was never sent."""
    batch_id, result = answer
    return replace(result, row_id=row_id, num_attempts=0, timing=Timing(), reused_from=batch_id)


def count_bytes(result: Result) -> int:
    """Rough size in memory."""
    answer = result.generation
    num_ids = len((answer and answer.token_ids) or ())
    num_ids += LOGPROB_IDS * (count_values(answer) - num_ids)
    texts = (result.text, result.reasoning, answer and answer.text, answer and answer.tool_calls)
    return 400 + TOKEN_BYTES * num_ids + sum(2 * len(text) for text in texts if text)
