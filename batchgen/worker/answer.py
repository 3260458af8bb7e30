"""An engine's answer, or its error, becomes the result of a request. Pure; times are given."""

from dataclasses import dataclass, replace
from typing import Protocol

from batchgen.errors import RowError
from batchgen.records import Failure, Generation, Lease, Partial, Request, Result, RowId, Timing


@dataclass(frozen=True, slots=True)
class Parsed:
    """An answer taken apart. `tool_calls`: OpenAI's list as JSON text; None where it calls none, or where the calls can't
    be read, and then `text` holds them as they were written."""

    text: str
    reasoning: str | None
    tool_calls: str | None = None


class Parse(Protocol):
    """`Tokenizer.parse`."""

    def __call__(self, text: str, *, thinking: bool, has_tools: bool) -> Parsed: ...


def split_reasoning(text: str, *, thinking: bool, think_end: str | None) -> tuple[str, str | None]:
    """(text, reasoning) of a completion. In thinking mode it starts inside the think block, and where the block never
    ends (cut by max_tokens) all of it is reasoning. A model without a mark (`think_end` None) never reasons apart."""
    if not thinking or think_end is None:
        return text, None
    reasoning, mark, answer = text.partition(think_end)
    return (answer, reasoning) if mark else ("", reasoning)


def make_encodable(text: str) -> str:
    """The text as UTF-8 can hold it: halves of a surrogate pair are joined, those without the other half become U+FFFD.

    An engine behind JSON may answer with either; Arrow refuses both."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def make_result(
    request: Request, generation: Generation, *, parse: Parse | None, waited_s: float, latency_s: float
) -> Result:
    """The result of an answered request. `parse`: the model's own, for what the engine didn't take apart itself; None
    where that is a server's business. `waited_s`: from ready to sent; the engine's own queue is added to it."""
    text = make_encodable(generation.text)
    reasoning = None if generation.reasoning is None else make_encodable(generation.reasoning)
    if parse is not None:
        thinking = request.sampling.thinking and reasoning is None
        parsed = parse(text, thinking=thinking, has_tools=request.has_tools and generation.tool_calls is None)
        text, reasoning = parsed.text, parsed.reasoning if reasoning is None else reasoning
        generation = add_tool_calls(generation, parsed.tool_calls)
    return Result(
        request.row_id,
        num_attempts=request.attempt,
        timing=Timing(waited_s + (generation.queued_s or 0.0), generation.ttft_s, latency_s),
        generation=generation,
        text=text,
        reasoning=reasoning,
        fingerprint=request.fingerprint,
    )


def add_tool_calls(generation: Generation, tool_calls: str | None) -> Generation:
    """The generation with calls that were read from its text. As OpenAI says it, an answer that stopped because it calls
    is no 'stop'; one that was cut off is still that."""
    if tool_calls is None:
        return generation
    finish_reason = "tool_calls" if generation.finish_reason == "stop" else generation.finish_reason
    return replace(generation, tool_calls=make_encodable(tool_calls), finish_reason=finish_reason)


def count_values(answer: Generation | Partial | None) -> int:
    """Token ids and logprobs of an answer: what packing it takes time for, and keeping it takes memory."""
    if answer is None:
        return 0
    logprobs = answer.logprobs or ()
    return len(answer.token_ids or ()) + len(logprobs) * (1 + len(logprobs[0].top) if logprobs else 1)


def count_prompt(request: Request) -> int | None:
    """Prompt tokens, where they were counted here."""
    return None if request.token_ids is None else len(request.token_ids)


def make_failed(request: Request, error: RowError, *, waited_s: float, latency_s: float) -> Result:
    """The result of a request that failed for good, or once too often."""
    return Result(
        request.row_id,
        num_attempts=request.attempt,
        timing=Timing(queued_s=waited_s, latency_s=latency_s),
        failure=Failure(error.error_type, make_encodable(error.message), error.is_retryable),
        prompt_tokens=count_prompt(request),
        fingerprint=request.fingerprint,
    )


def make_unreadable(row_id: RowId, reason: str) -> Result:
    """The result of a sample whose row can't be read from its file. Reading it again would find the same."""
    return Result(row_id, 0, Timing(), failure=Failure("unreadable_input", reason, is_retryable=False))


def make_unstorable(result: Result, error: Exception) -> Result:
    """What takes the place of a generation that no output file can hold. Only the error's kind is told: its text may
    quote the answer."""
    reason = f"the engine's answer has a value that its column can't hold ({type(error).__name__})"
    failure = Failure("bad_answer", reason, is_retryable=False)
    return Result(result.row_id, result.num_attempts, result.timing, failure=failure)


def make_given_up(request: Request, lease: Lease) -> Result:
    """The result of a request whose shard lost its workers too often; another run tries it again."""
    reason = f"given up at attempt {lease.attempt}, the last one lost: {lease.reason}"
    failure = Failure("worker_lost", reason, is_retryable=True)
    return Result(request.row_id, 0, Timing(), failure=failure, prompt_tokens=count_prompt(request))


def make_quarantined(row_id: RowId) -> Result:
    """The result of a sample whose row killed engines. Only a run with `retry.errors: all` tries it again."""
    failure = Failure("quarantined", "engines died with this row alone in flight", is_retryable=False)
    return Result(row_id, 0, Timing(), failure=failure)
