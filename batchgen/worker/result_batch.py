"""Results become Arrow, column by column, so that finished rows don't wait as Python objects. Pure.

A dict for each row first, and for each of its logprobs, took two and ten times as long.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, chain
from typing import Any

import pyarrow as pa

from batchgen.names import make_reused_id
from batchgen.records import Result, TokenLogprob, Usage
from batchgen.worker.answer import make_unstorable
from batchgen.write import LOGPROBS_TYPE

# A value of another type than its column's, or beyond its range. (pa.ArrowInvalid is a ValueError, and so on.)
REFUSED_BY_ARROW = (TypeError, ValueError, OverflowError)


def make_result_batch(results: Sequence[Result], batch_id: str, schema: pa.Schema) -> pa.RecordBatch:
    """Results as rows of the result schema, or of some of its columns. Raises ValueError for a result that is not
    exactly one of generation and failure, and what Arrow raises of values that their columns can't hold."""
    for result in results:
        if (result.generation is None) == (result.failure is None):
            raise ValueError(f"{result.row_id}: a result is a generation or a failure, exactly one of them")
    columns = {
        **make_answer_columns(results),
        **make_status_columns(results),
        "source_row": [result.row_id.source_row for result in results],
        "sample_index": [result.row_id.sample_index for result in results],
        "batch_id": make_batch_ids(results, batch_id),
    }
    arrays = [
        make_logprobs([result.generation.logprobs if result.generation else None for result in results])
        if field.name == "logprobs"
        else pa.array(columns[field.name], type=field.type)
        for field in schema
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def make_storable_batch(
    results: Sequence[Result], batch_id: str, schema: pa.Schema
) -> tuple[pa.RecordBatch, dict[str, int]]:
    """(the same, with a failure in place of each generation that Arrow refuses; those failures by type)."""
    try:
        return make_result_batch(results, batch_id, schema), {}
    except REFUSED_BY_ARROW:
        kept = [_make_storable(result, batch_id, schema) for result in results]
    changed = [new.failure for new, old in zip(kept, results, strict=True) if new is not old]
    refused = Counter(failure.error_type for failure in changed if failure is not None)
    return make_result_batch(kept, batch_id, schema), dict(refused)


def _make_storable(result: Result, batch_id: str, schema: pa.Schema) -> Result:
    try:
        make_result_batch([result], batch_id, schema)
    except REFUSED_BY_ARROW as error:
        if result.generation is None or result.failure is not None:
            raise
        return make_unstorable(result, error)
    return result


def make_batch_ids(results: Sequence[Result], batch_id: str) -> list[str]:
    """What was copied is none of the batch's own work."""
    reused_id = make_reused_id(batch_id)
    return [batch_id if result.reused_from is None else reused_id for result in results]


def make_answer_columns(results: Sequence[Result]) -> dict[str, Sequence[object]]:
    answers = [result.generation for result in results]
    usages = [
        Usage(prompt_tokens=result.prompt_tokens) if result.generation is None else result.generation.usage
        for result in results
    ]
    return {
        "text": [result.text for result in results],
        "reasoning": [result.reasoning for result in results],
        "finish_reason": [answer and answer.finish_reason for answer in answers],
        "prompt_tokens": [usage.prompt_tokens for usage in usages],
        "completion_tokens": [usage.completion_tokens for usage in usages],
        "cached_tokens": [usage.cached_tokens for usage in usages],
        "token_ids": [answer and answer.token_ids for answer in answers],
        "tool_calls": [answer and answer.tool_calls for answer in answers],
    }


def make_status_columns(results: Sequence[Result]) -> dict[str, Sequence[object]]:
    failures = [result.failure for result in results]
    timings = [result.timing for result in results]
    return {
        "status": ["error" if failure else "ok" for failure in failures],
        "error_type": [failure and failure.error_type for failure in failures],
        "error_message": [failure and failure.message for failure in failures],
        "is_retryable": [failure and failure.is_retryable for failure in failures],
        "num_attempts": [result.num_attempts for result in results],
        "queued_s": [timing.queued_s for timing in timings],
        "ttft_s": [timing.ttft_s for timing in timings],
        "latency_s": [timing.latency_s for timing in timings],
        "row_fingerprint": [result.fingerprint for result in results],
        "reused_from": [result.reused_from for result in results],
    }


def make_logprobs(answers: Sequence[Sequence[TokenLogprob] | None]) -> pa.Array:
    """The column `logprobs`, from flat arrays; None is null."""
    tokens = list(chain.from_iterable(answer for answer in answers if answer))
    tops = [pair for token in tokens for pair in token.top]
    top = pa.ListArray.from_arrays(
        pa.array(accumulate((len(token.top) for token in tokens), initial=0), pa.int32()),
        _make_struct([pair[0] for pair in tops], [pair[1] for pair in tops]),
    )
    values = _make_struct([token.token_id for token in tokens], [token.logprob for token in tokens], top)
    ends = list(accumulate((len(answer or ()) for answer in answers), initial=0))
    starts = [None if answer is None else start for answer, start in zip(answers, ends, strict=False)]
    return pa.ListArray.from_arrays(pa.array([*starts, ends[-1]], pa.int32()), values, type=LOGPROBS_TYPE)


def read_logprobs(tokens: Iterable[Mapping[str, Any]] | None) -> tuple[TokenLogprob, ...] | None:
    """A cell of that column."""
    if tokens is None:
        return None
    tops = ((token, tuple((top["token_id"], top["logprob"]) for top in token["top"] or ())) for token in tokens)
    return tuple(TokenLogprob(token["token_id"], token["logprob"], top) for token, top in tops)


def _make_struct(token_ids: Sequence[int | None], logprobs: Sequence[float], *more: pa.Array) -> pa.StructArray:
    columns = [pa.array(token_ids, pa.int32()), pa.array(logprobs, pa.float32()), *more]
    return pa.StructArray.from_arrays(columns, names=["token_id", "logprob", "top"][: len(columns)])
