"""The engine seam: the smallest thing a worker needs, and what is known of a kind of engine before one is made.

An engine lives on one event loop and never blocks it. `generate` may be called as often as the worker's window allows;
the engine batches as it likes. What may be lost: everything in flight, when `EngineDied` is raised. Cancelling the
coroutine cancels the request; an engine that can't stop it drops the answer. `open` may take minutes and must be
awaited first; `close` ends whatever is still in flight and twice is a no-op. `engines.contract` checks all of this on
any engine.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from batchgen.records import Generation, Request, RowId
from batchgen.spec import ModelSpec
from batchgen.specs.sections import EngineSection
from batchgen.worker.answer import Parsed

SectionT = TypeVar("SectionT", bound=EngineSection)


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an engine can honour. A spec that asks for more is refused at validation.

    `is_seeded`: a seed can be asked for, and the same request with the same seed draws the same tokens, as far as the
    engine's arithmetic allows. `has_logprobs`: of the drawn tokens and the likeliest ones. `has_sampling`: top_k, min_p
    and the three penalties. `is_guided`: answers can be held to a JSON schema, a regex or a grammar; which of them, the
    section's `guided_forms` says. `is_resumable`: it takes token ids, names those it generated, and goes on from prompt and
    partial answer (`Request.partial`); `resumable_fields` names the sampling fields beyond `budget.ALWAYS_RESUMABLE` that
    then mean the same as in one shot. `has_ranks`: a request can be pinned to a rank (`Request.rank`). `is_streaming`: it
    is a `StreamingEngine`. `has_urgency`: it serves urgent requests (`Request.is_urgent`) before all that wait.
    `quotes_prompts`: messages of its errors may quote the request, as a server's own words do; they stay in the rows.
    """

    is_seeded: bool
    has_logprobs: bool
    has_sampling: bool
    is_guided: bool = False
    is_resumable: bool = False
    resumable_fields: frozenset[str] = frozenset()
    has_ranks: bool = False
    is_streaming: bool = False
    has_urgency: bool = False
    quotes_prompts: bool = False


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What of its capabilities an engine has as it is set up and running, for token budgets and placement.
    `max_prompt_tokens`: no longer prompt is taken, even where prompt and completion fit `max_model_len`. `has_block_reuse`:
    a prompt that begins as an earlier one did costs the rest of it only. `num_ranks`: 1 where there is nothing to choose;
    `max_rank_rows`: requests that one rank decodes at once. `keeps_stop`: `token_ids` of an answer that a stop string ended
    hold that string's tokens."""

    is_resumable: bool = False
    max_prompt_tokens: int | None = None
    has_block_reuse: bool = False
    num_ranks: int = 1
    max_rank_rows: int | None = None
    keeps_stop: bool = True


class Tokenizer(Protocol):
    """Text to token ids and back. Pure, thread-safe, called off the event loop. `think_end`: the mark that ends the
    reasoning of an answer; None where the model has none, and then `thinking` is never asked of it. `can_use_tools`: a
    rendered chat shows the tools; where it can't, none are ever given."""

    vocab_size: int
    think_end: str | None

    @property
    def can_use_tools(self) -> bool: ...

    def encode(self, text: str) -> list[int]:
        """Ids of a bare text, with the model's own beginning-of-text token where it has one."""
        ...

    def encode_chat(
        self, messages: Sequence[dict[str, Any]], *, thinking: bool, tools: Sequence[dict[str, Any]] | None = None
    ) -> list[int]:
        """Ids of a chat rendered by the model's template, ready for the answer. `tools`: OpenAI's definitions. Raises
        BadRow where the template refuses the messages (unknown role, wrong order)."""
        ...

    def render_chat(
        self, messages: Sequence[dict[str, Any]], *, thinking: bool, tools: Sequence[dict[str, Any]] | None = None
    ) -> str:
        """The same as text, special tokens visible: what `validate` shows."""
        ...

    def parse(self, text: str, *, thinking: bool, has_tools: bool = False) -> Parsed:
        """The text of an answer taken apart, whatever it holds; raises nothing. Tool calls are read where the chat had
        tools and their format is known here."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of generated ids; end-of-text and padding left out, thinking marks kept."""
        ...


class Answering(Protocol):
    """What a sender of requests needs of an engine."""

    @property
    def tokenizer(self) -> Tokenizer | None: ...

    async def generate(self, request: Request) -> Generation:
        """Raises RequestRejected (never again), RequestFailed (worth another try), EngineUnavailable (it never took the
        request) or EngineDied."""
        ...


class Engine(Answering, Protocol):
    """One engine, made for one spec. Without a tokenizer its requests carry the row's prompt, else token ids.
    `max_model_len` is None where only a server knows it. All are there once `open` has returned. `total_tokens` grows while
    `generate` works, so that a long answer shows as progress."""

    kind: str
    version: str
    total_tokens: int

    @property
    def max_model_len(self) -> int | None: ...

    async def open(self) -> None:
        """Load the model. Raises EngineDied with the reason when that is impossible, SpecError when the spec asks for
        what is not to be had here."""
        ...

    async def close(self) -> None:
        """Give everything back. What is in flight, and every later `generate`, gets EngineDied."""
        ...


@runtime_checkable
class Peeking(Protocol):
    """An engine that can say what it has of an answer it works at. One that can't costs a row that is moved to another
    engine the part that was under way."""

    def peek(self, row_id: RowId) -> Generation | None:
        """The answer to the request in flight for this row so far, as one that is cut off here; None where there is
        nothing of it yet, or it has ended. Returns at once."""
        ...


class StreamingEngine(Engine, Protocol):
    """An engine that shows an answer while it grows."""

    async def generate_streaming(
        self, request: Request, on_tokens: Callable[[Sequence[int]], None] | None
    ) -> Generation:
        """As `generate`. `on_tokens` gets the tokens that came since its last call, in the caller's loop; all together they
        begin as the generation's `token_ids` do, and may go on with those of a stop string that these lack."""
        ...


@dataclass(frozen=True, slots=True)
class EngineKind(Generic[SectionT]):
    """All that is known of a kind of engine: what an entry point of the group `batchgen.engines` loads, under the name
    that `spec` gives to `kind`. Only its functions import the vendor. `create` returns an engine that is not open;
    `create_tokenizer` is what `validate` shows a rendered prompt with, and absent where the engine has none; `make_facts`
    tells what an engine with this section and of this version has of its capabilities: by default whether it is
    resumable, and one rank."""

    spec: type[SectionT]
    capabilities: Capabilities
    create: Callable[[ModelSpec, SectionT], Engine]
    create_tokenizer: Callable[[ModelSpec, SectionT], Tokenizer] | None = None
    make_facts: Callable[[SectionT, str], EngineFacts] | None = None
