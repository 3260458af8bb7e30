"""Rows of one Arrow batch become requests, or failures where the row is at fault; and their key and passthrough columns
become what the output holds of them. Runs off the event loop.

This is where prompt and tokenizer meet: the chat template, the length check, the room left for the completion. Needs an
engine's tokenizer and limit, not the engine. For an engine without a tokenizer (a server that renders and counts itself)
the row's prompt goes into the request as it is, and nothing is checked against a length.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa

from batchgen.answer import make_quarantined, make_unreadable
from batchgen.engines.base import Tokenizer
from batchgen.errors import BadRow, InputError, SpecError
from batchgen.prompt import Row, list_row_columns, make_custom_id, make_prompt, make_row_sampling, make_seed
from batchgen.read import Unreadable, decode_rows
from batchgen.records import Failure, Prompt, Request, Result, RowId, SamplingParams, Timing
from batchgen.row_ranges import RowRanges, has_row
from batchgen.spec import JobSpec

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


@dataclass(frozen=True, slots=True)
class Preparer:
    """Makes requests for one job on one engine. `refused`: sampling fields that the engine can't honour. Raises SpecError
    for a job that asks the model to think, or to use tools, where it can't."""

    spec: JobSpec
    tokenizer: Tokenizer | None
    max_model_len: int | None
    refused: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        check_thinking(self.spec, self.tokenizer)
        check_tools(self.spec, self.tokenizer)

    def prepare(
        self, batch: pa.RecordBatch, file: str, first_row: int, only: RowRanges = (), quarantined: RowRanges = ()
    ) -> tuple[list[Prepared], list[str | None]]:
        """(n requests or failures for each row, in order; custom_id of each row). `only`: nothing of other rows, where it
        isn't empty. Neither those nor `quarantined` ones are rendered or tokenised: it may be that which kills."""
        rows = decode_rows(batch, list_row_columns(self.spec))
        prepared: list[Prepared] = []
        custom_ids = []
        for number, row in enumerate(rows, first_row):
            if quarantined and has_row(quarantined, number):
                prepared += [make_quarantined(RowId(file, number, sample)) for sample in range(self.spec.sampling.n)]
            elif not only or has_row(only, number):
                prepared += self._prepare_row(row, file, number)
            custom_ids.append(make_custom_id(row, self.spec.input.custom_id, file, number))
        return prepared, custom_ids

    def make_unreadable(self, rows: Unreadable, file: str, first_row: int) -> list[Prepared]:
        """n failures for each row."""
        numbers = range(first_row, first_row + rows.num_rows)
        row_ids = [RowId(file, number, sample) for number in numbers for sample in range(self.spec.sampling.n)]
        return [make_unreadable(row_id, rows.reason) for row_id in row_ids]

    def _prepare_row(self, row: Row, file: str, number: int) -> Iterable[Prepared]:
        row_ids = [RowId(file, number, sample) for sample in range(self.spec.sampling.n)]
        try:
            sampling = make_row_sampling(row, self.spec, self.refused)
            if sampling.thinking and self.tokenizer is not None and self.tokenizer.think_end is None:
                raise BadRow("bad_sampling", f"column '{self.spec.prompt.sampling}': thinking: {NO_MARKS}")
            prompt = make_prompt(row, self.spec.prompt)
            token_ids = self._tokenize(prompt, sampling, self.tokenizer) if self.tokenizer is not None else None
        except BadRow as error:
            failure = Failure(error.error_type, error.message, is_retryable=False)
            return [Result(row_id, num_attempts=0, timing=Timing(), failure=failure) for row_id in row_ids]
        if token_ids is not None and self.max_model_len is not None:
            sampling = replace(sampling, max_tokens=min(sampling.max_tokens, self.max_model_len - len(token_ids)))
        kept = prompt if token_ids is None else None
        seeds = [make_seed(sampling.seed, row_id) for row_id in row_ids]
        return [
            Request(row_id, token_ids, replace(sampling, seed=seed), prompt=kept, has_tools=prompt.tools is not None)
            for row_id, seed in zip(row_ids, seeds, strict=True)
        ]

    def _tokenize(self, prompt: Prompt, sampling: SamplingParams, tokenizer: Tokenizer) -> tuple[int, ...]:
        token_ids = encode(prompt, sampling, tokenizer)
        if not token_ids:
            raise BadRow("empty_prompt", "the prompt has no token")
        if self.max_model_len is None or len(token_ids) < self.max_model_len:
            return token_ids
        if self.spec.prompt.on_overflow == "error":
            raise BadRow(
                "prompt_too_long",
                f"{len(token_ids)} prompt tokens; the model takes {self.max_model_len} with the completion "
                "(prompt.on_overflow: truncate_left cuts them)",
            )
        # Room for the completion asked for, but never more than half of the context.
        return token_ids[-(self.max_model_len - min(sampling.max_tokens, self.max_model_len // 2)) :]


def encode(prompt: Prompt, sampling: SamplingParams, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The whole prompt as token ids. Raises BadRow for what the tokenizer does not take."""
    if prompt.token_ids is not None:
        bad = next((token for token in prompt.token_ids if token >= tokenizer.vocab_size), None)
        if bad is not None:
            raise BadRow("bad_token_ids", f"token id {bad} is outside the vocabulary of {tokenizer.vocab_size}")
        return prompt.token_ids
    if prompt.messages is not None:
        return tuple(tokenizer.encode_chat(prompt.messages, thinking=sampling.thinking, tools=prompt.tools))
    assert prompt.text is not None
    return tuple(tokenizer.encode(prompt.text))


# ---- input columns ---------------------------------------------------------------------------------------------------


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
