"""The nouns that flow through batchgen. Frozen values, no behaviour beyond what they are, no I/O.

A *row* of the input becomes n *requests*, each ends as one *result*: a *generation* or a *failure*. A *shard* is a
contiguous range of rows of one input file; a *lease* lends it to a worker for one *attempt*; what that worker did for it
is a *batch*. Units end a name: `_s` seconds, `_at` seconds since the Unix epoch, `_bytes`, `_tokens`. None is unknown.
"""

from dataclasses import dataclass
from typing import Any

from batchgen.names import make_batch_id, make_data_path
from batchgen.row_ranges import RowRanges

TOKEN_BYTES = 36  # a Python int and its place in a tuple
Slot = tuple[int, int]  # (source_row, sample_index): a request of a shard whose file is known


@dataclass(frozen=True, slots=True, order=True)
class RowId:
    """Identity of one output row. `source_row` counts from 0 in `source_file`; `sample_index` from 0 to n - 1."""

    source_file: str
    source_row: int
    sample_index: int

    @property
    def slot(self) -> Slot:
        return self.source_row, self.sample_index


@dataclass(frozen=True, slots=True)
class Guided:
    """What an answer is held to; exactly one is set. `json_schema` is JSON text, `grammar` EBNF."""

    json_schema: str | None = None
    regex: str | None = None
    grammar: str | None = None


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Resolved sampling of one request, in OpenAI's and TensorRT-LLM's words. None: the engine's neutral value."""

    temperature: float = 1.0
    top_p: float = 0.95
    max_tokens: int = 1024
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logprobs: int | None = None
    thinking: bool = False
    guided: Guided | None = None


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a row asks, untokenised: exactly one of text, messages, token_ids is set, and `tools` with messages only."""

    text: str | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    token_ids: tuple[int, ...] | None = None
    tools: tuple[dict[str, Any], ...] | None = None

    @property
    def num_bytes(self) -> int:
        """Rough size in memory: a dict for each message and tool."""
        size = TOKEN_BYTES * len(self.token_ids or ()) + 2 * len(self.text or "")
        parts = (*(self.messages or ()), *(self.tools or ()))
        return size + sum(400 + 2 * sum(len(str(value)) for value in part.values()) for part in parts)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One generated token: natural logs, `top` the likeliest (token id, logprob). No id where a server tells texts only."""

    token_id: int | None
    logprob: float
    top: tuple[tuple[int | None, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Partial:
    """An answer so far, which another request may go on with: at least one token, none of them its last. `logprobs` goes
    with `token_ids`; `cached_tokens` and the two times are the first part's."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    cached_tokens: int | None = None
    ttft_s: float | None = None
    queued_s: float | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """What an engine is sent. Exactly one is set: `token_ids`, the whole rendered prompt with its special tokens, for an
    engine with a tokenizer on our side; `prompt`, the row's own, for one that renders and tokenises itself. `has_tools`:
    the answer may call tools. `expected_tokens`: of the completion, where anything is known of it (`lengths`).
    `partial`: what was generated for it before, with `token_ids` only; the engine gives what comes after that, at most
    `sampling.max_tokens` more. `rank`: the attention-DP rank that must take it, None for any. `fingerprint`: `reuse`'s.
    `is_urgent`: somebody waits for this one; it goes before the others, where the engine can choose."""

    row_id: RowId
    token_ids: tuple[int, ...] | None
    sampling: SamplingParams
    attempt: int = 1
    prompt: Prompt | None = None
    has_tools: bool = False
    expected_tokens: float | None = None
    partial: Partial | None = None
    rank: int | None = None
    fingerprint: bytes | None = None
    is_urgent: bool = False

    @property
    def ids(self) -> tuple[int, ...]:
        """The prompt and what was generated before, for an engine whose requests have token ids. Raises ValueError for
        one that was not tokenised."""
        if self.token_ids is None:
            raise ValueError(f"{self.row_id}: this engine takes token ids, and the request has none")
        return self.token_ids if self.partial is None else self.token_ids + self.partial.token_ids

    @property
    def num_bytes(self) -> int:
        """Rough size in memory while it waits or is in flight."""
        own = TOKEN_BYTES * len(self.token_ids) if self.token_ids is not None else (self.prompt or Prompt()).num_bytes
        return own if self.partial is None else own + TOKEN_BYTES * len(self.partial.token_ids)


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one result. `cached_tokens` are prompt tokens the engine did not compute again."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds on the worker's monotonic clock. `queued_s`: from ready to be sent until the engine began; the other two
    count from the moment the request was sent to the engine."""

    queued_s: float | None = None
    ttft_s: float | None = None
    latency_s: float | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """An engine's answer to one request. `text` holds everything it generated and reasoning is cut from it later, unless
    the engine did that: then `reasoning` is set. `tool_calls` is JSON text, as the engine gave them."""

    text: str
    token_ids: tuple[int, ...] | None
    finish_reason: str
    usage: Usage
    ttft_s: float | None = None
    queued_s: float | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    reasoning: str | None = None
    tool_calls: str | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a request has no generation. `message` never holds prompt or generated text."""

    error_type: str
    message: str
    is_retryable: bool


@dataclass(frozen=True, slots=True)
class Result:
    """The end of one request: exactly one of generation, failure is set. `text` and `reasoning` are the cut answer,
    `reused_from` the batch that generated it, where this request was never sent."""

    row_id: RowId
    num_attempts: int
    timing: Timing
    generation: Generation | None = None
    failure: Failure | None = None
    text: str | None = None
    reasoning: str | None = None
    prompt_tokens: int | None = None
    fingerprint: bytes | None = None
    reused_from: str | None = None


@dataclass(frozen=True, slots=True)
class InputFile:
    """One planned input file, frozen with the version that every later read is conditional on."""

    path: str
    num_bytes: int
    version: str
    num_rows: int
    row_group_rows: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Shard:
    """Rows `row_start` <= source_row < `row_end` of one file: the unit of work and of commit. What the plan knows of their
    lengths: completion tokens that hints promise, in sum over all samples and of the longest one, and about how many
    bytes their prompts take."""

    number: int
    file: InputFile
    row_start: int
    row_end: int
    expected_tokens: float | None = None
    max_expected_tokens: float | None = None
    prompt_bytes: float | None = None

    @property
    def id(self) -> str:
        return f"shard-{self.number:09d}"

    @property
    def num_rows(self) -> int:
        return self.row_end - self.row_start

    @property
    def data_path(self) -> str:
        return make_data_path(self.number)


@dataclass(frozen=True, slots=True)
class JournalRef:
    """Where journaled rows of one shard lie: a segment's path and the row group of that shard in it."""

    path: str
    row_group: int


@dataclass(frozen=True, slots=True)
class Lease:
    """A shard lent to a worker for one attempt. `epoch` is the driver's; `is_last_resort` means: generate nothing,
    commit what the journal holds and an error row for each row that is missing (the retry policy has given up). `only`,
    where it isn't empty: generate and journal these rows, nothing else beside them, and give the shard back without a
    commit. `quarantined` rows end as errors: engines died of them."""

    shard: Shard
    attempt: int
    epoch: int
    worker_id: str
    journal: tuple[JournalRef, ...] = ()
    replaces: str | None = None
    is_last_resort: bool = False
    reason: str | None = None
    only: RowRanges = ()
    quarantined: RowRanges = ()

    @property
    def batch_id(self) -> str:
        return make_batch_id(self.shard.number, self.epoch, self.attempt)


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """What a worker says of itself when it is up. `build` must equal the driver's or it is turned away."""

    worker_id: str
    build: str
    node: str
    engine_kind: str
    engine_version: str
    num_gpus: float
    window: int
    startup_s: float
    can_move: bool = False  # rows that its engine has begun can be stopped there and gone on with elsewhere


@dataclass(frozen=True, slots=True)
class ShardProgress:
    """An open lease: input rows with all n samples finished; failed samples, and those by type; requests not finished,
    sent, given to another worker nor waiting; requests in flight; requests that wait for a copy of another's answer."""

    batch_id: str
    num_rows_done: int
    num_rows_error: int
    num_unsent: int = 0
    error_types: tuple[tuple[str, int], ...] = ()
    num_inflight: int = 0
    num_waiting: int = 0


@dataclass(frozen=True, slots=True)
class Share:
    """Requests of a lent shard that another worker generates for its owner. `lease` is the helper's, an attempt of its own;
    `owner_batch_id` that of the owner, who alone commits. Which requests they are stands in the handoff in the store."""

    lease: Lease
    owner_id: str
    owner_batch_id: str
