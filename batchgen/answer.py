"""An engine's answer, or its error, becomes the result of a request. Pure; times are given."""

from batchgen.errors import RowError
from batchgen.records import Failure, Generation, Lease, Request, Result, Timing


def split_reasoning(text: str, *, thinking: bool, think_end: str = "</think>") -> tuple[str, str | None]:
    """(text, reasoning) of a completion. In thinking mode it starts inside the think block, and where the block never
    ends (cut by max_tokens) all of it is reasoning."""
    if not thinking:
        return text, None
    reasoning, mark, answer = text.partition(think_end)
    return (answer, reasoning) if mark else ("", reasoning)


def make_result(request: Request, generation: Generation, *, waited_s: float, latency_s: float) -> Result:
    """The result of an answered request. `waited_s`: from ready to sent; the engine's own queue is added to it."""
    text, reasoning = generation.text, generation.reasoning
    if reasoning is None:
        text, reasoning = split_reasoning(text, thinking=request.sampling.thinking)
    return Result(
        request.row_id,
        num_attempts=request.attempt,
        timing=Timing(waited_s + (generation.queued_s or 0.0), generation.ttft_s, latency_s),
        generation=generation,
        text=text,
        reasoning=reasoning,
    )


def count_prompt(request: Request) -> int | None:
    """Prompt tokens, where they were counted here."""
    return None if request.token_ids is None else len(request.token_ids)


def make_failed(request: Request, error: RowError, *, waited_s: float, latency_s: float) -> Result:
    """The result of a request that failed for good, or once too often."""
    return Result(
        request.row_id,
        num_attempts=request.attempt,
        timing=Timing(queued_s=waited_s, latency_s=latency_s),
        failure=Failure(error.error_type, error.message, error.is_retryable),
        prompt_tokens=count_prompt(request),
    )


def make_given_up(request: Request, lease: Lease) -> Result:
    """The result of a request whose shard lost its workers too often; another run tries it again."""
    reason = f"given up at attempt {lease.attempt}, the last one lost: {lease.reason}"
    failure = Failure("worker_lost", reason, is_retryable=True)
    return Result(request.row_id, 0, Timing(), failure=failure, prompt_tokens=count_prompt(request))
