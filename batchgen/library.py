"""batchgen from Python and from notebooks: `run` a job, `generate` answers to a list of prompts.

Both block until done, and work where an event loop runs already (Jupyter): workers have loops of their own, in other
threads or processes. Progress goes nowhere unless a view is given; warnings go to the logger `batchgen`. What can't work is
refused by a `batchgen.errors.Refusal` before anything starts; a run that stops early says so in its result.
"""

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from batchgen.driver.run import run_job
from batchgen.driver.view import QuietView, View
from batchgen.errors import RunStopped, SpecError
from batchgen.spec import JobSpec
from batchgen.specs.load import load_spec, make_spec

ANSWER_COLUMNS = ["source_row", "sample_index", "text", "reasoning", "finish_reason", "prompt_tokens"]
ANSWER_COLUMNS += ["completion_tokens", "error_type", "error_message"]


@dataclass(frozen=True, slots=True)
class RunResult:
    """How a run ended. `state`: finished, or stopped (start it again and it goes on). `exit_code`: that of `batchgen run`.
    `report`: every figure of `report.json`."""

    state: str
    exit_code: int
    output: str
    num_rows_ok: int
    num_rows_error: int
    report: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """One output row of `generate`: an answer, or why there is none (then `text` is None and `error_type` is set). `index`:
    which prompt it answers."""

    index: int
    sample_index: int
    text: str | None
    reasoning: str | None
    finish_reason: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    error_type: str | None
    error_message: str | None


def run(
    spec: JobSpec | Mapping[str, Any] | str | os.PathLike[str],
    overrides: Sequence[str] = (),
    *,
    limit: int | None = None,
    view: View | None = None,
) -> RunResult:
    """Run the job, or go on with it. `spec`: where its YAML lies, its sections as plain values, or a `JobSpec`;
    `overrides`: as `--set`, for YAML only; `limit`: only the first rows. Raises Refusal, LeaseLost."""
    report = run_job(_read_spec(spec, overrides), view or QuietView(), limit=limit)
    rows = report["rows"]
    return RunResult(report["state"], report["exit_code"], report["output"], rows["ok"], rows["error"], report)


def _read_spec(spec: JobSpec | Mapping[str, Any] | str | os.PathLike[str], overrides: Sequence[str]) -> JobSpec:
    if isinstance(spec, str | os.PathLike):
        return load_spec(os.fspath(spec), overrides)
    if overrides:
        raise SpecError("overrides: go with the path of a spec; change the values themselves instead")
    return spec if isinstance(spec, JobSpec) else make_spec(dict(spec))


def generate(
    prompts: Sequence[str] | Sequence[Sequence[Mapping[str, Any]]],
    *,
    model: str = "embedded",
    engine: Mapping[str, Any] | None = None,
    sampling: Mapping[str, Any] | None = None,
    view: View | None = None,
) -> list[Answer]:
    """Answers in the order of the prompts, n for each (`sampling["n"]`). A prompt is text, sent as a user's message, or a
    chat: a list of role and content. `engine` and `sampling` are a spec's sections; without one `transformers` runs the
    model here. A prompt that fails is an answer with `error_type`. It is an ordinary job in a folder that is gone
    afterwards: for what must survive a crash use `run`. Raises Refusal; RunStopped where not every prompt was answered."""
    if not prompts:
        return []
    is_text = isinstance(prompts[0], str)
    if any(isinstance(prompt, str) != is_text for prompt in prompts):
        raise SpecError("prompts: some are text and some are chats; give all of them in one form")
    with tempfile.TemporaryDirectory(prefix="batchgen-") as folder:
        tree = {
            "input": {"paths": str(Path(folder) / "prompts.parquet")},
            "prompt": {"column" if is_text else "messages": "prompt"},
            "model": {"path": model},
            "engine": dict(engine or {"kind": "transformers"}),
            "sampling": dict(sampling or {}),
            "output": {"path": str(Path(folder) / "out")},
            "cluster": {"pool": "inline"},
        }
        _write_prompts(prompts, Path(folder) / "prompts.parquet", is_text)
        result = run(tree, view=view)
        if result.state != "finished":
            raise RunStopped(f"generate: {result.report['message']}; call it again")
        rows = ds.dataset(f"{folder}/out/data", format="parquet").to_table(columns=ANSWER_COLUMNS).to_pylist()
    return [_make_answer(row) for row in rows]


def _write_prompts(prompts: Sequence[Any], path: Path, is_text: bool) -> None:
    try:
        column = pa.array(prompts, pa.string()) if is_text else pa.array([[dict(m) for m in chat] for chat in prompts])
    except (pa.ArrowInvalid, pa.ArrowTypeError, TypeError, ValueError, UnicodeEncodeError):
        # Without Arrow's reason, and without its traceback, which a notebook would print: it quotes the value.
        raise SpecError("prompts: give texts, or chats as lists of {role, content} with text in both") from None
    pq.write_table(pa.table({"prompt": column}), path)


def _make_answer(row: Mapping[str, Any]) -> Answer:
    fields = {name: row[name] for name in ANSWER_COLUMNS if name != "source_row"}
    return Answer(index=row["source_row"], **fields)
