"""Every error that TensorRT-LLM raises, mapped once: by its class, when it came, and what is known of the request; never by
text. Pure; the vendor's classes are given.

- while the engine is made: ValueError (pydantic's too), TypeError or no such package means that no retry helps; anything
  else may go better elsewhere or later (memory, a rank that died, MPI, a library that this node lacks).
- at submit: a RequestError is the front end's check of this prompt: the row's fault. ValueError and TypeError are its
  check of the sampling: the row's fault too.
- while waiting: a RequestError is one row's or all of a rank's, which its class does not tell: the row's fault if the
  prompt can't fit, else try again.
- any other error, and any error of an engine that says it is not healthy, is the engine's if it is unhealthy now; else
  the request is tried again, as UNKNOWN: something to count.

The message is the error's first line, shortened. The vendor puts lengths and limits there, and a rank's own error;
requests carry token ids only, so there is no prompt text in that process to quote, unless a stop string or a guide.
"""

from dataclasses import dataclass

from batchgen.engines.trtllm.wire import Blame, Failed

MAX_MESSAGE_CHARS = 300
# A start-up error is for the person who wrote the spec; pydantic's has a line for each field.
MAX_START_CHARS = 2000
IMAGE = "run in NVIDIA's image for it"
UNKNOWN = "unknown_error"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an error means for the request that met it."""

    blame: Blame
    error_type: str
    message: str

    def make_failed(self, number: int) -> Failed:
        return Failed(number, self.blame, self.error_type, self.message)


def judge_start(error: BaseException) -> tuple[str, bool]:
    """(message, is_spec) of an error while the engine was made."""
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == "tensorrt_llm":
        return (
            f"TensorRT-LLM 1.2.1 or newer is not installed here (no module {error.name}); install it, or {IMAGE}",
            True,
        )
    message = f"{type(error).__name__}: {str(error).strip()[:MAX_START_CHARS]}"
    return message, isinstance(error, ValueError | TypeError)


def judge_submit(error: Exception, request_error: type[Exception], *, is_healthy: bool) -> Verdict:
    """Of an error that `SamplingParams` or `generate_async` raised."""
    if not is_healthy:
        return Verdict("engine", "engine_error", describe(error))
    if isinstance(error, request_error):
        return Verdict("request", "request_refused", describe(error))
    if isinstance(error, ValueError | TypeError):
        return Verdict("request", "bad_sampling", describe(error))
    return Verdict("retry", UNKNOWN, describe(error))


def judge_answer(error: Exception, request_error: type[Exception], *, is_healthy: bool, can_never_fit: bool) -> Verdict:
    """Of an error that came instead of an answer. `can_never_fit`: the prompt is too long for the model, or holds a token
    that it doesn't have."""
    if not is_healthy:
        return Verdict("engine", "engine_error", describe(error))
    if not isinstance(error, request_error):
        return Verdict("retry", UNKNOWN, describe(error))
    if can_never_fit:
        return Verdict("request", "request_refused", describe(error))
    return Verdict("retry", "request_failed", describe(error))


def describe(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:MAX_MESSAGE_CHARS]}" if lines else type(error).__name__
