"""A batch's JSONL becomes its job's input: Parquet files of bounded size, one row a choice. Blocking.

Nothing of it is held at once but one file's rows: 50,000 lines cost what one part costs. Each try writes into a folder of
its own, and the batch's record names the one that counts: a conductor that was frozen in between spoils nothing.
"""

import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from batchgen.serve.batch_spec import CUSTOM_ID, PROMPT_COLUMNS, SAMPLING, TOOLS
from batchgen.serve.bodies import Asked, make_refusal, read_body
from batchgen.serve.body_sampling import Abilities
from batchgen.serve.errors import ApiError, bad_request
from batchgen.serve.lines import Line, LineCheck, LineTooLong, split_lines
from batchgen.serve.records import BatchRecord, JobInput
from batchgen.serve.spec import Limits
from batchgen.serve.state import State
from batchgen.serve.wire import CHAT, BatchError
from batchgen.specs.sections import PromptForm
from batchgen.write import make_parquet

FILE_BYTES = 4 * 2**20
FILE_ROWS = 10_000


@dataclass(slots=True)
class Converted:
    """What came of it: rows that lie there, or errors. `num_requests`: lines."""

    input: JobInput | None
    model: str
    num_requests: int
    errors: list[BatchError] = field(default_factory=list)


def convert(
    state: State, record: BatchRecord, pieces: Iterable[bytes], abilities: dict[str, Abilities], limits: Limits
) -> Converted:
    """Reads all of the file, and writes Parquet until the first error."""
    check, errors = LineCheck(record.batch.endpoint, abilities), list[BatchError]()
    folder = f"t/{record.tenant}/inputs/{record.id}/{secrets.token_hex(8)}"
    writer = _RowWriter(state, folder, record.batch.endpoint)
    try:
        for number, raw in split_lines(pieces, limits.max_line_bytes):
            found = check.check(number, raw)
            if check.num_lines > limits.max_requests:
                errors.insert(0, _make_too_many(limits.max_requests))
                break
            if isinstance(found, BatchError):
                errors.append(found)
                if len(errors) >= limits.max_errors:
                    break
            elif not errors:
                writer.add(found, abilities[str(check.model)])
    except LineTooLong as error:
        told = f"This line is longer than {limits.max_line_bytes} bytes."
        errors.append(BatchError(code="line_too_long", message=told, line=error.number))
    if check.num_lines == 0 and not errors:
        errors.append(BatchError(code="empty_file", message="The input file has no requests."))
    if errors:
        writer.abandon()
        return Converted(None, check.model or "", check.num_lines, errors)
    return Converted(writer.close(), str(check.model), check.num_lines)


def _make_too_many(max_requests: int) -> BatchError:
    told = f"A batch may have {max_requests} requests at most; cut the file, or name a Parquet dataset."
    return BatchError(code="too_many_requests", message=told, line=max_requests + 1)


class _RowWriter:
    """Rows to Parquet files. The first body that is none of a row's 400 decides the form of all prompts."""

    def __init__(self, state: State, folder: str, endpoint: str) -> None:
        self._state, self._folder, self._endpoint = state, folder, endpoint
        self._rows: list[dict[str, Any]] = []
        self._num_bytes = 0
        self._num_rows = 0
        self._paths: list[str] = []
        self._form: PromptForm | None = None
        self._has_tools = False

    def add(self, line: Line, can: Abilities) -> None:
        key = {CUSTOM_ID: line.custom_id, "line": line.number}
        try:
            asked = self._read(line, can)
        except ApiError as error:
            self._append({**key, "choice": 0, "samples": 1, "refusal": make_refusal(error)}, 256)
            return
        self._has_tools = self._has_tools or asked.has_tools
        for choice, row in enumerate(asked.rows):
            self._append({**key, "choice": choice, "samples": asked.num_samples, **row}, _measure(row))

    def _read(self, line: Line, can: Abilities) -> Asked:
        asked = read_body(self._endpoint, line.body, can)
        if asked.is_stream:
            raise bad_request("a batch's answers are not streamed; leave stream out", "stream", "unsupported_value")
        self._form = self._form or asked.form
        if asked.form != self._form:
            raise bad_request("the prompts of a batch are all text or all token ids", "prompt", "unsupported_value")
        return asked

    def _append(self, row: dict[str, Any], num_bytes: int) -> None:
        self._rows.append(row)
        self._num_bytes += num_bytes
        self._num_rows += 1
        if self._num_bytes >= FILE_BYTES or len(self._rows) >= FILE_ROWS:
            self._flush()

    def _flush(self) -> None:
        path = f"{self._folder}/part-{len(self._paths):06d}.parquet"
        table = pa.Table.from_pylist(self._rows, schema=self._make_schema())
        self._state.storage.put(path, make_parquet(table))
        self._paths.append(path)
        self._rows, self._num_bytes = [], 0

    def _make_schema(self) -> pa.Schema:
        """Both forms of a completion's prompt: which one the batch has may be known late."""
        messages = [(PROMPT_COLUMNS["messages"], pa.string())]
        prompts = [(PROMPT_COLUMNS["text"], pa.string()), (PROMPT_COLUMNS["token_ids"], pa.list_(pa.int32()))]
        return pa.schema(
            [
                (CUSTOM_ID, pa.string()),
                ("line", pa.int64()),
                ("choice", pa.int32()),
                ("samples", pa.int32()),
                ("refusal", pa.string()),
                *(messages if self._endpoint == CHAT else prompts),
                (SAMPLING, pa.string()),
                (TOOLS, pa.string()),
            ]
        )

    def close(self) -> JobInput:
        if self._rows:
            self._flush()
        form: PromptForm = self._form or ("messages" if self._endpoint == CHAT else "text")
        url = self._state.storage.url(self._folder)
        return JobInput(url=url, form=form, has_tools=self._has_tools, num_rows=self._num_rows)

    def abandon(self) -> None:
        self._state.storage.delete_many(self._paths)


def _measure(row: dict[str, Any]) -> int:
    return 64 + sum(len(value) * (1 if isinstance(value, str) else 8) for value in row.values() if value is not None)
