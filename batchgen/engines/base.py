"""The engine seam: the smallest thing a worker needs.

An engine lives on one event loop. `generate` may be called as often as the worker's window allows; the engine batches
as it likes. What may be lost: everything in flight, when `EngineDied` is raised. Cancelling the coroutine cancels the
request; an engine that can't stop it drops the answer. `open` may take minutes and must be awaited first; `close`
twice is a no-op.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from batchgen.records import Generation, Request


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an engine can honour. A spec that asks for more is refused at validation."""

    is_seeded: bool
    has_logprobs: bool
    has_sampling: bool


class Tokenizer(Protocol):
    """Text to token ids and back. Pure, thread-safe, called off the event loop. `think_end`: the mark that ends the
    reasoning of an answer; None where the model has none, and then `thinking` is never asked of it."""

    vocab_size: int
    think_end: str | None

    def encode(self, text: str) -> list[int]:
        """Ids of a bare text, with the model's own beginning-of-text token where it has one."""
        ...

    def encode_chat(self, messages: Sequence[dict[str, Any]], *, thinking: bool) -> list[int]:
        """Ids of a chat rendered by the model's template, ready for the answer. Raises BadRow where the template
        refuses the messages (unknown role, wrong order)."""
        ...

    def render_chat(self, messages: Sequence[dict[str, Any]], *, thinking: bool) -> str:
        """The same as text, special tokens visible: what `validate` shows."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of generated ids; end-of-text and padding left out, thinking marks kept."""
        ...


class Engine(Protocol):
    """One engine, made for one spec."""

    kind: str
    version: str
    tokenizer: Tokenizer
    max_model_len: int
    total_tokens: int

    async def open(self) -> None:
        """Load the model. Raises EngineDied with the reason when that is impossible."""
        ...

    async def generate(self, request: Request) -> Generation:
        """Raises RequestRejected (never again), RequestFailed (worth another try) or EngineDied. `total_tokens` grows
        while it works, so that a long answer shows as progress."""
        ...

    async def close(self) -> None:
        """Give everything back."""
        ...
