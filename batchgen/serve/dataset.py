"""A batch over a Parquet dataset of the tenant's own: no line is read here, and the result stays Parquet. Blocking.

`input_file_id` is the dataset's URL. Columns: `messages` for chats, `prompt` or `prompt_token_ids` for completions, and
where they are there `custom_id`, `sampling` and `tools`, as a job has them. The result files stand for the job's dataset:
their content is made of it line by line when it is asked for, and never stored.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow.compute as pc

from batchgen.engines import create_tokenizer
from batchgen.errors import InputError
from batchgen.parquet import read_table
from batchgen.read import read_footers
from batchgen.serve.batch_run import find_job_spec
from batchgen.serve.batch_spec import CUSTOM_ID, PROMPT_COLUMNS, SAMPLING, TOOLS
from batchgen.serve.records import BatchRecord, FileRecord, JobInput, make_result_file_id
from batchgen.serve.results import LineMaker, Results, Tally, dump_line, iter_rows
from batchgen.serve.spec import EndpointSpec
from batchgen.serve.state import State
from batchgen.serve.wire import CHAT
from batchgen.specs.sections import PromptForm
from batchgen.storage import FileInfo, Storage, list_inputs

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*://")


def is_dataset(input_file_id: str) -> bool:
    return _SCHEME.match(input_file_id) is not None


def is_allowed(url: str, prefixes: tuple[str, ...]) -> bool:
    """Does the URL lie below one of the prefixes, whatever it expands to? Nothing that climbs, no user, no query."""
    parts = url.split("/")
    if ".." in parts or "." in parts or "\\" in url or "\0" in url or "@" in url or "%" in url:
        return False
    return any(url.startswith(f"{prefix.rstrip('/')}/") for prefix in prefixes)


def find_dataset(record: BatchRecord, prefixes: tuple[str, ...]) -> JobInput:
    """What the job reads. Raises InputError in the words of the user's dataset."""
    url = record.batch.input_file_id
    infos = list_inputs(url)
    check_links(infos, prefixes)
    footers = read_footers(infos)
    names = set(footers[0].schema.names)
    forms: list[PromptForm] = ["messages"] if record.batch.endpoint == CHAT else ["text", "token_ids"]
    form = next((form for form in forms if PROMPT_COLUMNS[form] in names), None)
    if form is None:
        wanted = " or ".join(PROMPT_COLUMNS[form] for form in forms)
        raise InputError(f"{footers[0].file.path}: has no column {wanted}; rename the prompt's column to that")
    return JobInput(
        url=url,
        form=form,
        has_tools=TOOLS in names,
        has_sampling=SAMPLING in names,
        has_keys=CUSTOM_ID in names,
        is_own=False,
        num_rows=sum(footer.file.num_rows for footer in footers),
    )


def check_links(infos: Sequence[FileInfo], prefixes: tuple[str, ...]) -> None:
    """On a local disk a link may lead out of the prefix that it lies below. Raises InputError."""
    roots = [Path(prefix.removeprefix("file://")).resolve() for prefix in prefixes]
    for info in infos:
        if "://" not in info.path and not any(Path(info.path).resolve().is_relative_to(root) for root in roots):
            raise InputError(f"{info.path}: leads to a file that is not below your prefixes; copy it there")


def write_dataset_results(state: State, record: BatchRecord) -> Results:
    """The records of both files; their content is the dataset's."""
    storage, tally, num_bytes = Storage(state.job_url(record.tenant, record.id)), Tally(), 0
    for info in storage.list_files("data", suffix=".parquet"):
        num_bytes += info.num_bytes
        with storage.open_read(info.path) as source:
            columns = ["status", "prompt_tokens", "completion_tokens", "cached_tokens", "reasoning"]
            table = read_table(source, columns=columns)
        ok = table.filter(pc.equal(table["status"], "ok"))
        tally.completed += ok.num_rows
        tally.failed += table.num_rows - ok.num_rows
        if ok["prompt_tokens"].null_count or ok["completion_tokens"].null_count:
            tally.is_counted = False
        tally.prompt_tokens += pc.sum(ok["prompt_tokens"]).as_py() or 0
        tally.completion_tokens += pc.sum(ok["completion_tokens"]).as_py() or 0
        cached = None if ok["cached_tokens"].null_count else pc.sum(ok["cached_tokens"]).as_py() or 0
        tally.cached_tokens = None if cached is None or tally.cached_tokens is None else tally.cached_tokens + cached
        tally.has_reasoning = tally.has_reasoning or ok["reasoning"].null_count < ok.num_rows
    return Results(
        tally.make_counts(record.batch.request_counts.total),
        tally.make_usage(),
        _create(state, record, num_bytes, is_ok=True) if tally.completed else None,
        _create(state, record, num_bytes, is_ok=False) if tally.failed else None,
    )


def _create(state: State, record: BatchRecord, num_bytes: int, *, is_ok: bool) -> str:
    file_id = make_result_file_id(record, "output" if is_ok else "error")
    made_at = record.batch.finalizing_at or record.batch.cancelling_at or record.batch.created_at
    state.create_file(
        FileRecord(
            id=file_id,
            tenant=record.tenant,
            filename=f"{record.id}_{'output' if is_ok else 'error'}.jsonl",
            purpose="batch_output",
            created_at=made_at,
            expires_at=made_at + record.output_expires_s,
            dataset_of=record.id,
            dataset_bytes=num_bytes,
            dataset_status="ok" if is_ok else "error",
        )
    )
    return file_id


def iter_dataset_lines(spec: EndpointSpec, state: State, file: FileRecord) -> Iterator[bytes]:
    """The dataset's rows of one status as lines."""
    record = state.read_batch(file.tenant, file.dataset_of or "")
    if record is None:
        return
    maker = LineMaker(record, None)
    for row in iter_rows(Storage(state.job_url(record.tenant, record.id)), ("sample_index",)):
        if (
            row.get("logprobs") is not None and maker.decode is None
        ):  # tokens are told by their text; seldom, and it loads
            tokenizer = create_tokenizer(find_job_spec(spec, state, record))
            maker.decode = None if tokenizer is None else tokenizer.decode
        if row["status"] == file.dataset_status:
            key = f"{row['source_file']}:{row['source_row']}:{row['sample_index']}"
            _, line = maker.make([{**row, "line": key, "samples": 1, "refusal": None}])
            yield dump_line(line)
