"""The demo's questions and what came of them: what the embedded model was trained on, and the share it got right."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from batchgen.demo_questions import CHAT_MIX, THINKING_MIX, make_question

NUM_FILES = 6
ROWS_PER_FILE = 500
THINKING_SHARE = 0.3
# A few of the workings take 700 tokens; the job's own limit is for the short answers.
THINKING = json.dumps({"thinking": True, "max_tokens": 1000})
SCHEMA = pa.schema([("id", pa.string()), ("question", pa.string()), ("answer", pa.string()), ("sampling", pa.string())])


def make_questions(seed: int, num_rows: int) -> list[dict[str, str | None]]:
    """Sums and differences to answer at once, and three in ten questions of all kinds to think about first: their
    answers take from 10 to several hundred tokens."""
    rng = random.Random(seed)
    rows: list[dict[str, str | None]] = []
    for number in range(num_rows):
        sampling = THINKING if rng.random() < THINKING_SHARE else None
        question = make_question(rng, THINKING_MIX if sampling else CHAT_MIX, held_out=None)
        row_id = f"{question.kind}-{seed}-{number}"
        rows.append({"id": row_id, "question": question.text, "answer": question.answer, "sampling": sampling})
    return rows


def write_questions(folder: Path) -> None:
    """Six Parquet files of 500 questions; files that are there stay as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(NUM_FILES):
        path = folder / f"questions-{number}.parquet"
        if not path.exists():
            pq.write_table(pa.Table.from_pylist(make_questions(number, ROWS_PER_FILE), schema=SCHEMA), path)


@dataclass(frozen=True, slots=True)
class Answers:
    """Rows whose text is exactly the right answer, all rows, and a few of them."""

    num_right: int
    num_rows: int
    examples: Sequence[dict[str, str | None]]


def read_answers(output: str, num_examples: int = 5) -> Answers:
    """Check the generations of the demo's output folder."""
    columns = ["custom_id", "answer", "text", "reasoning", "finish_reason"]
    rows = ds.dataset(f"{output}/data", format="parquet").to_table(columns=columns).to_pylist()
    num_right = sum(row["text"] is not None and row["text"].strip() == row["answer"] for row in rows)
    return Answers(num_right, len(rows), rows[:: max(1, len(rows) // num_examples)][:num_examples])
