"""Rows of one Arrow batch become requests, or failures where the row is at fault. Runs off the event loop.

This is where prompt and tokenizer meet: the chat template, the length check, the room left for the completion. Needs an
engine's tokenizer and limit, not the engine. For an engine without a tokenizer (a server that renders and counts itself)
the row's prompt goes into the request as it is, and nothing is checked against a length.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import pyarrow as pa

from batchgen.engines.base import Tokenizer
from batchgen.errors import BadRow
from batchgen.prompt import Row, list_row_columns, make_custom_id, make_prompt, make_row_sampling, make_seed
from batchgen.read import decode_rows
from batchgen.records import Failure, Prompt, Request, Result, RowId, SamplingParams, Timing
from batchgen.spec import JobSpec

Prepared = Request | Result


@dataclass(frozen=True, slots=True)
class Preparer:
    """Makes requests for one job on one engine. `refused`: sampling fields that the engine can't honour."""

    spec: JobSpec
    tokenizer: Tokenizer | None
    max_model_len: int | None
    refused: frozenset[str] = frozenset()

    def prepare(self, batch: pa.RecordBatch, file: str, first_row: int) -> tuple[list[Prepared], list[str | None]]:
        """(n requests or failures for each row, in order; custom_id of each row)."""
        rows = decode_rows(batch, list_row_columns(self.spec))
        prepared: list[Prepared] = []
        custom_ids = []
        for number, row in enumerate(rows, first_row):
            prepared += self._prepare_row(row, file, number)
            custom_ids.append(make_custom_id(row, self.spec.input.custom_id, file, number))
        return prepared, custom_ids

    def _prepare_row(self, row: Row, file: str, number: int) -> Iterable[Prepared]:
        row_ids = [RowId(file, number, sample) for sample in range(self.spec.sampling.n)]
        try:
            sampling = make_row_sampling(row, self.spec, self.refused)
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
            Request(row_id, token_ids, replace(sampling, seed=seed), prompt=kept)
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
        return tuple(tokenizer.encode_chat(prompt.messages, thinking=sampling.thinking))
    assert prompt.text is not None
    return tuple(tokenizer.encode(prompt.text))
