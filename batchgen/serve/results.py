"""The committed rows of a batch's job become its output file and its error file. Blocking.

Rows come in input order, so those of one line are neighbours, and no more than one line is ever held. What is written
depends on the committed rows only: written again after a crash, it is the same byte for byte.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from batchgen.parquet import ParquetFile
from batchgen.serve.answers import Decode, from_row, make_body, make_row_error
from batchgen.serve.batch_spec import PASSTHROUGH
from batchgen.serve.ids import make_digest
from batchgen.serve.parts import PartWriter
from batchgen.serve.records import BatchRecord, FileRecord, make_result_file_id
from batchgen.serve.state import State
from batchgen.serve.wire import BatchUsage, InputDetails, Json, OutputDetails, RequestCounts
from batchgen.storage import Storage

READ_ROWS = 512
UNFINISHED = {
    "expired": ("batch_expired", "This request could not be executed before the completion window expired."),
    "cancelled": ("batch_cancelled", "This request was not executed because the batch was cancelled."),
    "failed": ("batch_failed", "This request was not executed because the batch failed before."),
}
TIMED_OUT = "timed_out"
#: What the closing run makes of a row that nobody generated.
LEFT_OVER = "worker_lost"


@dataclass(slots=True)
class Tally:
    """What all lines together came to. `is_counted`: the engine counted the tokens of each line that succeeded."""

    completed: int = 0
    failed: int = 0
    is_counted: bool = True
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int | None = 0
    has_reasoning: bool = False

    def add(self, usage: Json | None, rows: Iterable[Json]) -> None:
        self.has_reasoning = self.has_reasoning or any(row["reasoning"] for row in rows)
        if usage is None:
            self.is_counted = False
            return
        self.prompt_tokens += usage["prompt_tokens"]
        self.completion_tokens += usage["completion_tokens"]
        details = usage.get("prompt_tokens_details")
        if details is None or self.cached_tokens is None:
            self.cached_tokens = None
        else:
            self.cached_tokens += details["cached_tokens"]

    def make_counts(self, total: int) -> RequestCounts:
        """Of so many requests: one of which nothing was committed has failed, too."""
        total = max(total, self.completed + self.failed)
        return RequestCounts(total=total, completed=self.completed, failed=total - self.completed)

    def make_usage(self) -> BatchUsage | None:
        """None where it is not known of every line: a sum of the others would be taken for all."""
        if not self.is_counted:
            return None
        return BatchUsage(
            input_tokens=self.prompt_tokens,
            input_tokens_details=InputDetails(cached_tokens=self.cached_tokens),
            output_tokens=self.completion_tokens,
            output_tokens_details=OutputDetails(reasoning_tokens=None if self.has_reasoning else 0),
            total_tokens=self.prompt_tokens + self.completion_tokens,
        )


@dataclass(slots=True)
class Results:
    """What was written. A file without a line is None."""

    counts: RequestCounts
    usage: BatchUsage | None
    output_file_id: str | None
    error_file_id: str | None


@dataclass(slots=True)
class LineMaker:
    """One batch's lines of answers."""

    record: BatchRecord
    decode: Decode | None
    tally: Tally = field(default_factory=Tally)

    def make(self, rows: list[Json]) -> tuple[bool, Json]:
        """(did it succeed, the line) of all rows of one request."""
        first, batch = rows[0], self.record.batch
        digest = make_digest(self.record.id, str(first["line"]))
        base = {"id": f"batch_req_{digest}", "custom_id": first["custom_id"]}
        bad = next((row for row in rows if row["status"] != "ok"), None)
        if bad is not None:
            self.tally.failed += 1
            return False, {**base, **self._make_error(bad, digest)}
        choices = [from_row(row, self.decode) for row in rows]
        num_prompts = max(1, len(rows) // max(1, first["samples"]))
        body = make_body(
            batch.endpoint, self.record.model or "", digest, batch.in_progress_at or 0, choices, num_prompts
        )
        self.tally.completed += 1
        self.tally.add(body["usage"], rows)
        return True, {**base, "response": make_response(200, digest, body), "error": None}

    def _make_error(self, row: Json, digest: str) -> Json:
        if row["refusal"] is not None:
            return {"response": make_response(400, digest, {"error": json.loads(row["refusal"])}), "error": None}
        kind = row["error_type"]
        if kind == LEFT_OVER and self.record.end in UNFINISHED:
            code, message = UNFINISHED[self.record.end]
            return {"response": None, "error": {"code": code, "message": message}}
        if kind == TIMED_OUT:
            return {"response": None, "error": {"code": "request_timeout", "message": row["error_message"]}}
        status, error = make_row_error(kind, row["error_message"], bool(row["is_retryable"]))
        return {"response": make_response(status, digest, {"error": error}), "error": None}


def make_response(status: int, digest: str, body: Json) -> Json:
    return {"status_code": status, "request_id": f"req_{digest}", "body": body}


def iter_rows(storage: Storage, extra: tuple[str, ...] = ()) -> Iterator[Json]:
    """All committed rows in input order, their engine's figures left out."""
    wanted = {"custom_id", "source_file", "source_row", "text", "reasoning", "finish_reason", "prompt_tokens"}
    wanted |= {"completion_tokens", "cached_tokens", "logprobs", "tool_calls", "status", "error_type"}
    wanted |= {"error_message", "is_retryable", *extra}
    for info in storage.list_files("data", suffix=".parquet"):
        with storage.open_read(info.path) as source:
            file = ParquetFile(source)
            columns = [name for name in file.schema_arrow.names if name in wanted]
            for part in file.iter_batches(READ_ROWS, columns=columns):
                yield from part.to_pylist()


def write_results(state: State, record: BatchRecord, decode: Decode | None) -> Results:
    """Both files, whole, and then their records."""
    maker = LineMaker(record, decode)
    ids: dict[bool, Any] = {
        True: make_result_file_id(record, "output"),
        False: make_result_file_id(record, "error"),
    }
    writers = {kind: PartWriter(state, record.tenant, id_) for kind, id_ in ids.items()}
    rows = iter_rows(Storage(state.job_url(record.tenant, record.id)), PASSTHROUGH)
    for _, group in groupby(rows, key=lambda row: row["line"]):
        is_ok, line = maker.make(list(group))
        writers[is_ok].write(dump_line(line))
    for is_ok, writer in writers.items():
        if sizes := writer.close():
            state.create_file(_make_file(record, ids[is_ok], "output" if is_ok else "error", sizes))
        else:
            ids[is_ok] = None
    counts = maker.tally.make_counts(record.batch.request_counts.total)
    return Results(counts, maker.tally.make_usage(), ids[True], ids[False])


def dump_line(line: Json) -> bytes:
    return json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _make_file(record: BatchRecord, file_id: str, kind: str, sizes: tuple[int, ...]) -> FileRecord:
    made_at = record.batch.finalizing_at or record.batch.cancelling_at or record.batch.created_at
    return FileRecord(
        id=file_id,
        tenant=record.tenant,
        filename=f"{record.id}_{kind}.jsonl",
        purpose="batch_output",
        created_at=made_at,
        expires_at=made_at + record.output_expires_s,
        part_bytes=sizes,
    )
