"""Rows of one Arrow batch become requests, or failures where the row is at fault; and their key and passthrough columns
become what the output holds of them. Runs off the event loop.

This is where prompt and tokenizer meet: the chat template, the length check, the room left for the completion. Needs an
engine's tokenizer and limit, not the engine. For an engine without a tokenizer (a server that renders and counts itself)
the row's prompt goes into the request as it is, and nothing is checked against a length.
"""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc

from batchgen.engines.base import Tokenizer
from batchgen.errors import BadRow, InputError, SpecError
from batchgen.lengths import BYTES_PER_TOKEN, LengthPrior, expect_tokens
from batchgen.prompt import (
    Row,
    get_cell,
    list_prompt_columns,
    list_row_columns,
    make_custom_id,
    make_prompt,
    make_row_sampling,
    make_sampling_params,
    make_seed,
)
from batchgen.read import Unreadable, decode_rows, is_binary
from batchgen.records import Failure, Prompt, Request, Result, RowId, SamplingParams, Timing
from batchgen.reuse.fingerprint import Fingerprinter
from batchgen.spec import JobSpec
from batchgen.worker.answer import make_unreadable

Prepared = Request | Result
CUSTOM_ID = pa.field("custom_id", pa.string())
NO_TOOLS = "the model's chat template shows no tools"
NO_MARKS = "the model's tokenizer has no think marks, so reasoning can't be told from the answer"


def check_thinking(spec: JobSpec, tokenizer: Tokenizer | None) -> None:
    """Raises SpecError where the job asks for reasoning that could not be cut from the answers. A server does that
    itself."""
    if spec.sampling.thinking and tokenizer is not None and tokenizer.think_end is None:
        raise SpecError(f"sampling.thinking: {NO_MARKS}; leave it out or choose another model")


def check_tools(spec: JobSpec, tokenizer: Tokenizer | None) -> None:
    """Raises SpecError where the job gives tools that the model would never see. A server sees to that itself."""
    if spec.prompt.tools is not None and tokenizer is not None and not tokenizer.can_use_tools:
        raise SpecError(f"prompt.tools: {NO_TOOLS}; leave it out or choose another model")


class Preparer:
    """Makes requests for one job on one engine. `refused`: sampling fields that the engine can't honour. `prior`: what an
    earlier run measured of lengths. Raises SpecError for a job that asks the model to think, or to use tools, where it
    can't. Thread-safe."""

    def __init__(
        self,
        spec: JobSpec,
        tokenizer: Tokenizer | None,
        max_model_len: int | None,
        refused: frozenset[str] = frozenset(),
        prior: LengthPrior | None = None,
    ) -> None:
        check_thinking(spec, tokenizer)
        check_tools(spec, tokenizer)
        self._spec, self._tokenizer, self._max_model_len, self._refused = spec, tokenizer, max_model_len, refused
        self._prior = prior
        self._columns = list_row_columns(spec)
        self._sampling = make_sampling_params(spec.sampling)
        self._fingerprinter = Fingerprinter(spec) if spec.output.row_fingerprints else None

    def expect(self, batch: pa.RecordBatch) -> list[float | None] | None:
        """Completion tokens expected of each row's requests, by its hint, its template and its prompt's rough size: known
        before a prompt is rendered, so that rows can be put in order. None where nothing is known of any."""
        if self._spec.input.length_hint is None and self._prior is None:
            return None
        named = [name for name in (self._spec.input.length_hint, self._spec.input.length_template) if name is not None]
        rows = decode_rows(batch, named) if named else [{}] * batch.num_rows
        sizes = estimate_prompt_tokens(batch, list_prompt_columns(self._spec.prompt))
        # A row's own sampling may allow more than the job's, and is not looked at here.
        most = self._spec.sampling.max_tokens if self._spec.prompt.sampling is None else sys.maxsize
        return [self._expect(row, size, most) for row, size in zip(rows, sizes, strict=True)]

    def prepare(self, batch: pa.RecordBatch, file: str, numbers: Sequence[int]) -> list[Prepared]:
        """n requests or failures for each row, in order. `numbers`: the rows' own, in the file."""
        rows = decode_rows(batch, self._columns)
        return [
            item for row, number in zip(rows, numbers, strict=True) for item in self._prepare_row(row, file, number)
        ]

    def _prepare_row(self, row: Row, file: str, number: int) -> Iterable[Prepared]:
        row_ids = [RowId(file, number, sample) for sample in range(self._spec.sampling.n)]
        try:
            sampling = self._make_sampling(row)
            prompt = make_prompt(row, self._spec.prompt)
            token_ids = self._tokenize(prompt, sampling, self._tokenizer) if self._tokenizer is not None else None
        except BadRow as error:
            failure = Failure(error.error_type, error.message, is_retryable=False)
            return [Result(row_id, num_attempts=0, timing=Timing(), failure=failure) for row_id in row_ids]
        if token_ids is not None and self._max_model_len is not None:
            room = self._max_model_len - len(token_ids)
            sampling = sampling if room >= sampling.max_tokens else replace(sampling, max_tokens=room)
        kept, has_tools = prompt if token_ids is None else None, prompt.tools is not None
        size, n = None if token_ids is None else len(token_ids), len(row_ids)
        expected = self._expect(row, size, sampling.max_tokens)
        fingerprints = self._fingerprinter.make(token_ids, prompt, sampling, n) if self._fingerprinter else [None] * n
        return [
            Request(
                row_id,
                token_ids,
                seed_sampling(sampling, row_id),
                prompt=kept,
                has_tools=has_tools,
                expected_tokens=expected,
                fingerprint=fingerprint,
            )
            for row_id, fingerprint in zip(row_ids, fingerprints, strict=True)
        ]

    def _make_sampling(self, row: Row) -> SamplingParams:
        column = self._spec.prompt.sampling
        if column is None or get_cell(row, column) is None:
            return self._sampling
        sampling = make_row_sampling(row, self._spec, self._refused)
        if sampling.thinking and self._tokenizer is not None and self._tokenizer.think_end is None:
            raise BadRow("bad_sampling", f"column '{column}': thinking: {NO_MARKS}")
        return sampling

    def _expect(self, row: Row, prompt_tokens: int | None, max_tokens: int) -> float | None:
        hint, template = self._spec.input.length_hint, self._spec.input.length_template
        return expect_tokens(
            row[hint] if hint is not None else None,
            prompt_tokens=prompt_tokens,
            max_tokens=max_tokens,
            prior=self._prior,
            template=row[template] if template is not None else None,
        )

    def _tokenize(self, prompt: Prompt, sampling: SamplingParams, tokenizer: Tokenizer) -> tuple[int, ...]:
        token_ids, limit = encode(prompt, sampling, tokenizer), self._max_model_len
        if not token_ids:
            raise BadRow("empty_prompt", "the prompt has no token")
        if limit is None or len(token_ids) < limit:
            return token_ids
        if self._spec.prompt.on_overflow == "error":
            raise BadRow(
                "prompt_too_long",
                f"{len(token_ids)} prompt tokens; the model takes {limit} with the completion "
                "(prompt.on_overflow: truncate_left cuts them)",
            )
        # Room for the completion asked for, but never more than half of the context.
        return token_ids[-(limit - min(sampling.max_tokens, limit // 2)) :]


def estimate_prompt_tokens(batch: pa.RecordBatch, columns: Sequence[str]) -> list[int | None]:
    """About how many tokens each row's prompt has; None for what can't be told without rendering it."""
    sizes = [_measure(batch.column(name)) for name in columns]
    return [None if None in row else round(sum(size or 0.0 for size in row)) for row in zip(*sizes, strict=True)]


def _measure(column: pa.Array) -> list[float | None]:
    kind = column.type
    if (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_integer(kind.value_type):
        return list(pc.list_value_length(column).to_pylist())
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or is_binary(kind):
        return list(pc.divide(pc.cast(pc.binary_length(column), pa.float64()), BYTES_PER_TOKEN).to_pylist())
    return [None] * len(column)


def seed_sampling(sampling: SamplingParams, row_id: RowId) -> SamplingParams:
    """The request's own: the same, but for a seed of its own where the job has one."""
    return sampling if sampling.seed is None else replace(sampling, seed=make_seed(sampling.seed, row_id))


def make_unreadables(rows: Unreadable, file: str, first_row: int, n: int) -> list[Result]:
    """n failures for each row."""
    numbers = range(first_row, first_row + rows.num_rows)
    return [make_unreadable(RowId(file, number, sample), rows.reason) for number in numbers for sample in range(n)]


def encode(prompt: Prompt, sampling: SamplingParams, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The whole prompt as token ids. Raises BadRow for what the tokenizer does not take."""
    if prompt.token_ids is not None:
        largest = max(prompt.token_ids)
        if largest >= tokenizer.vocab_size:
            raise BadRow("bad_token_ids", f"token id {largest} is outside the vocabulary of {tokenizer.vocab_size}")
        return prompt.token_ids
    if prompt.messages is not None:
        return tuple(tokenizer.encode_chat(prompt.messages, thinking=sampling.thinking, tools=prompt.tools))
    assert prompt.text is not None
    return tuple(tokenizer.encode(prompt.text))


# ---- input columns ---------------------------------------------------------------------------------------------------


def make_custom_ids(batch: pa.RecordBatch, column: str | None, file: str, first_row: int) -> list[str | None]:
    """Each row's key, from the job's `input.custom_id`."""
    rows = decode_rows(batch, [column]) if column is not None else [{}] * batch.num_rows
    return [make_custom_id(row, column, file, number) for number, row in enumerate(rows, first_row)]


def make_inputs(batch: pa.RecordBatch, custom_ids: Sequence[str | None], passthrough: pa.Schema, file: str) -> pa.Table:
    """custom_id and passthrough columns of some rows, with the job's types; text that is not UTF-8 becomes null, for no
    reader would open the output with it. Raises InputError for a value that the job's type can't hold."""
    columns = [_make_input(batch.column(field.name), field, file) for field in passthrough]
    return pa.Table.from_arrays(
        [pa.array(custom_ids, pa.string()), *columns], schema=pa.schema([CUSTOM_ID, *passthrough])
    )


def make_unknown_inputs(num_rows: int, passthrough: pa.Schema) -> pa.Table:
    """The same of rows that can't be read: all null."""
    fields = [CUSTOM_ID, *passthrough]
    return pa.Table.from_arrays([pa.nulls(num_rows, field.type) for field in fields], schema=pa.schema(fields))


def _make_input(column: pa.Array, field: pa.Field, file: str) -> pa.Array:
    column = drop_broken_text(column)
    try:
        return column.cast(field.type)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
        raise InputError(
            f"{file}: passthrough column '{field.name}' is {column.type} and has values that {field.type}, its type in "
            "the output, can't hold; write all files with one type or leave it out of input.passthrough"
        ) from error


def drop_broken_text(column: pa.Array) -> pa.Array:
    """The column with null for each cell that holds text which is not UTF-8."""
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        return _drop_broken_cells(column)
    return column


def _drop_broken_cells(column: pa.Array) -> pa.Array:
    """Looks at each cell: Arrow tells of the first broken one only, and of a list's neighbours too."""
    if pa.types.is_dictionary(column.type):
        coded = _drop_broken_cells(column.dictionary_decode()).dictionary_encode()
        kind = column.type
        return pa.DictionaryArray.from_arrays(
            coded.indices.cast(kind.index_type), coded.dictionary, ordered=kind.ordered
        )
    cells = [
        pa.nulls(1, column.type) if _is_broken(column[row]) else column.slice(row, 1) for row in range(len(column))
    ]
    return pa.concat_arrays(cells)


def _is_broken(cell: pa.Scalar) -> bool:
    try:
        cell.as_py()
    except UnicodeDecodeError:
        return True
    except (ValueError, OverflowError):  # a date that Python can't hold is fine for Arrow
        return False
    return False
