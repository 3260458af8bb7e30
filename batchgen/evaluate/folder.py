"""What an evaluation's folder holds, and how it is read and written.

    OUT/questions.parquet          every question: id, cluster, expected answer, tests
    OUT/prompts/round-01.parquet   what is asked: id, question, repeat, prompt; SciCode has a round for each step
    OUT/round-01/                  an ordinary job's output folder
    OUT/scores.parquet             one row a question and sample: is it right, cut off, an error; what was extracted
    OUT/scores.json                the summary that a comparison starts from

Questions and prompts are written once: another run of the folder must ask the same.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.errors import NotFound, OutputError
from batchgen.evaluate.benchmarks import Question
from batchgen.parquet import read_table
from batchgen.storage import Storage
from batchgen.verify.damage import refusing_damage

QUESTIONS, SCORES, SUMMARY = "questions.parquet", "scores.parquet", "scores.json"
QUESTION_SCHEMA = pa.schema(
    [("id", pa.string()), ("cluster", pa.string()), ("expected", pa.string()), ("tests", pa.large_string())]
)
PROMPT_SCHEMA = pa.schema(
    [("id", pa.string()), ("question", pa.string()), ("repeat", pa.int32()), ("prompt", pa.string())]
)
ANSWER_COLUMNS = ["custom_id", "sample_index", "text", "finish_reason", "completion_tokens", "status", "latency_s"]
SCORE_SCHEMA = pa.schema(
    [
        ("question", pa.string()),
        ("cluster", pa.string()),
        ("sample_index", pa.int32()),
        ("outcome", pa.string()),
        ("is_right", pa.bool_()),
        ("is_truncated", pa.bool_()),
        ("is_error", pa.bool_()),
        ("extracted", pa.large_string()),
        ("completion_tokens", pa.int64()),
        ("latency_s", pa.float64()),
    ]
)


@dataclass(frozen=True, slots=True)
class Asked:
    """One row of prompts. `repeat`: which sample of the question it is, where each is asked by a row of its own."""

    id: str
    question: str
    repeat: int
    prompt: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What was generated for one sample of a question. `text` is None for an error row."""

    question: str
    sample_index: int
    text: str | None
    finish_reason: str | None
    completion_tokens: int | None
    latency_s: float | None


@dataclass(frozen=True, slots=True)
class Score:
    """`outcome`: right, wrong, no_answer, error, not_run (a program that nobody asked to run), or how a program failed.
    `is_right` is None where it is not known."""

    question: str
    cluster: str
    sample_index: int
    outcome: str
    is_right: bool | None
    is_truncated: bool
    is_error: bool
    extracted: str | None
    completion_tokens: int | None
    latency_s: float | None


def prompts_path(number: int) -> str:
    return f"prompts/round-{number:02d}.parquet"


def round_folder(number: int) -> str:
    return f"round-{number:02d}"


def make_digest(benchmark: str, questions: Sequence[Question], asked: Sequence[Asked]) -> str:
    """Equal for two folders that asked the same of their models. Later rounds hold what the model wrote: left out."""
    digest = hashlib.sha256(benchmark.encode())
    for question in questions:
        digest.update(json.dumps([question.id, question.expected, question.cluster, question.tests]).encode())
    for row in asked:
        digest.update(json.dumps([row.question, row.prompt]).encode())
    return digest.hexdigest()[:32]


def write_questions(storage: Storage, questions: Sequence[Question]) -> None:
    rows = [{name: getattr(question, name) for name in QUESTION_SCHEMA.names} for question in questions]
    write_once(storage, QUESTIONS, pa.Table.from_pylist(rows, schema=QUESTION_SCHEMA))


def write_prompts(storage: Storage, number: int, asked: Sequence[Asked]) -> None:
    table = pa.Table.from_pylist([asdict(row) for row in asked], schema=PROMPT_SCHEMA)
    write_once(storage, prompts_path(number), table)


def write_once(storage: Storage, path: str, table: pa.Table) -> None:
    """A file that is there must hold the very rows: a job's input never changes. Raises OutputError."""
    try:
        found = read_stored(storage, path)
    except NotFound:
        storage.put(path, to_parquet(table))
        return
    if not found.equals(table):
        raise OutputError(
            f"{storage.url(path)}: holds other questions than the spec asks now; choose another output.path"
        )


def read_stored(storage: Storage, path: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Raises NotFound; OutputError for a file that is damaged."""
    damaged = "is damaged; remove it and run the evaluation again"
    with refusing_damage(storage.url(path), damaged), storage.open_read(path) as source:
        return read_table(source, columns)


def to_parquet(table: pa.Table) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", row_group_size=256)
    return sink.getvalue()


def read_questions(storage: Storage) -> list[Question]:
    """Without what the prompts were made of. Raises NotFound, OutputError."""
    rows = read_stored(storage, QUESTIONS).to_pylist()
    return [Question(row["id"], {}, row["expected"], row["cluster"], row["tests"]) for row in rows]


def list_rounds(storage: Storage) -> list[int]:
    """Numbers of the rounds that were asked."""
    return [int(info.path[-10:-8]) for info in storage.list_files("prompts", ".parquet")]


def read_prompts(storage: Storage, number: int) -> list[Asked]:
    return [Asked(**row) for row in read_stored(storage, prompts_path(number)).to_pylist()]


def read_answers(storage: Storage, number: int) -> list[Answer]:
    """All that the round's job committed, by question and sample."""
    asked = {row.id: row for row in read_prompts(storage, number)}
    answers = []
    for info in storage.list_files(f"{round_folder(number)}/data", ".parquet"):
        for row in read_stored(storage, info.path, ANSWER_COLUMNS).to_pylist():
            source = asked[row["custom_id"]]
            answers.append(
                Answer(
                    source.question,
                    source.repeat + row["sample_index"],
                    row["text"] if row["status"] == "ok" else None,
                    row["finish_reason"],
                    row["completion_tokens"],
                    row["latency_s"],
                )
            )
    return answers


def write_scores(storage: Storage, scores: Iterable[Score], summary: dict[str, Any]) -> None:
    table = pa.Table.from_pylist([asdict(score) for score in scores], schema=SCORE_SCHEMA)
    storage.put(SCORES, to_parquet(table))
    storage.put(SUMMARY, json.dumps(summary, indent=1).encode())
