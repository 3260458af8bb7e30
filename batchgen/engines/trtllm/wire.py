"""What the actor and the engine's process say to each other, and how it travels. Imports nothing of the vendor.

The actor asks, the engine's process answers, over one local socket that both inherit from nobody else. Token ids go in,
token ids and metrics come out; text never crosses. A message is a frozen value of this module, pickled behind its length:
both ends are one build of batchgen on one machine, and the socket has no name that anybody else could open.

Order: `Start` is the first message in, `Started` or `StartFailed` the first one out (progress of a slow start comes as
`Note` before it). After that every `Submit` ends in exactly one `Finished` or `Failed`, unless the process dies; `Abort`
makes that end come soon and is a no-op for a request that has ended. `Beat` comes at least every `beat_s` while the
process is alive enough to send one, whatever the engine does.
"""

import asyncio
import pickle
import struct
from dataclasses import dataclass, field
from typing import Any, Literal

from batchgen.records import SamplingParams, TokenLogprob

HEADER = struct.Struct("!I")
MAX_MESSAGE_BYTES = 2**31
BEAT_S = 1.0

# Whose fault a failure is, decided where the vendor's error is caught. `request`: the row's own, never again;
# `retry`: this engine may do it later; `engine`: a new engine is needed.
Blame = Literal["request", "retry", "engine"]


@dataclass(frozen=True, slots=True)
class Start:
    """Build the engine. `llm` are the keyword arguments of the vendor's `LLM`; `probes` are (messages, thinking,
    rendered) conversations that our own chat encoding rendered, to be compared with the engine's own tokenizer. `beat_s`:
    how often it must say that it lives."""

    llm: dict[str, Any]
    has_perf_metrics: bool = False
    probes: tuple[tuple[tuple[dict[str, Any], ...], bool, str], ...] = ()
    beat_s: float = BEAT_S


@dataclass(frozen=True, slots=True)
class Submit:
    """One request. `rank`: the attention-DP rank that must take it, None for any."""

    number: int
    token_ids: tuple[int, ...]
    sampling: SamplingParams
    rank: int | None = None


@dataclass(frozen=True, slots=True)
class Abort:
    """Nobody waits for this request any more."""

    number: int


@dataclass(frozen=True, slots=True)
class Stop:
    """Shut the engine down in order and exit."""


@dataclass(frozen=True, slots=True)
class Note:
    """A stage of a slow start, for people: 'loading weights'. Never prompt or generated text."""

    text: str


@dataclass(frozen=True, slots=True)
class Started:
    """The engine is up. `facts`: what was found out about it (versions, whether a hang detector exists, limits), for the
    logs and for `max_model_len`. None is unknown."""

    version: str
    max_model_len: int | None
    pids: tuple[int, ...]
    facts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StartFailed:
    """It can't be. `is_spec`: the spec asks for what this version does not take, and no retry helps."""

    message: str
    is_spec: bool


@dataclass(frozen=True, slots=True)
class Finished:
    """A request's answer. Times are seconds from its `Submit`; None where the engine didn't say.

    `token_ids` end before the end-of-text token, the stop token or the stop string that ended it. Where a stop string
    begins inside a token, that token and the rest of it stay: whoever makes text of them cuts it once more, with
    `stops.cut_text`. No token at all, with finish_reason 'stop' and without a `stop_reason`, is an answer that
    the engine failed to give: a true empty one holds its end-of-text token. `num_tokens`: how many it generated, those
    that were cut off included; None: as many as there are.
    """

    number: int
    token_ids: tuple[int, ...]
    finish_reason: str
    stop_reason: int | str | None
    cached_tokens: int | None
    queued_s: float | None
    ttft_s: float | None
    logprobs: tuple[TokenLogprob, ...] | None = None
    num_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """A request's failure, already mapped. The message never holds prompt or generated text."""

    number: int
    blame: Blame
    error_type: str
    message: str


@dataclass(frozen=True, slots=True)
class Beat:
    """The process lives. `total_tokens` ever generated, those of unfinished requests included; `rss_bytes` of the whole
    group of processes; `is_healthy`: the vendor's own word."""

    total_tokens: int
    num_inflight: int
    rss_bytes: int
    is_healthy: bool


ToEngine = Start | Submit | Abort | Stop
FromEngine = Note | Started | StartFailed | Finished | Failed | Beat


def pack(message: ToEngine | FromEngine) -> bytes:
    """The message as it travels."""
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return HEADER.pack(len(body)) + body


async def read_message(reader: asyncio.StreamReader) -> Any:
    """The next message; None when the other end is gone, in the middle of a message or not. Raises ValueError for what is
    no message of ours."""
    try:
        (length,) = HEADER.unpack(await reader.readexactly(HEADER.size))
        if length > MAX_MESSAGE_BYTES:
            raise ValueError(f"a message of {length} bytes")
        return pickle.loads(await reader.readexactly(length))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
