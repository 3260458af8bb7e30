"""One row of an output again: the request as it was sent, rebuilt from spec, plan and input; and sent once more.

That it is the same request is known by its fingerprint, where the output has one: `is_same_request` is False where the
template or the tokenizer says something else today, or where the model's own limit cut `max_tokens` shorter than is
known here. Token ids and parameters are told to whoever asks; text only where it is asked for.
"""

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import pyarrow.compute as pc
from pydantic import ValidationError

from batchgen import manifest
from batchgen.engines import create_engine, create_tokenizer, get_engine_kind, list_refused
from batchgen.engines.base import Tokenizer
from batchgen.errors import OutputError, RowError
from batchgen.names import make_data_path
from batchgen.parquet import ParquetFile, read_table
from batchgen.prompt import list_row_columns
from batchgen.read import Unreadable, iter_shard
from batchgen.records import InputFile, Request, Result, Shard
from batchgen.spec import JobSpec
from batchgen.specs.load import make_spec, set_fields
from batchgen.specs.saved import read_saved_spec
from batchgen.storage import Storage
from batchgen.verify.damage import RESTORE, refusing_damage
from batchgen.worker.answer import make_result
from batchgen.worker.prepare import Prepared, Preparer

STORED = (
    *("status", "finish_reason", "prompt_tokens", "completion_tokens", "error_type", "error_message", "num_attempts"),
    *("batch_id", "reused_from"),
)
TEXTS = ("text", "reasoning", "tool_calls")
KEYS = ["custom_id", "source_file", "source_row"]


class Replay:
    """One sample of one row of the job at `storage`. `overrides`: fields of the spec to replay it with, as `--set` takes
    them. Raises OutputError, InputError, StorageError."""

    def __init__(self, storage: Storage, row: str, sample_index: int, overrides: tuple[str, ...] = ()) -> None:
        self._storage = storage
        self.spec = read_spec(storage, overrides)
        saved = manifest.read_plan(storage)
        if saved is None:
            raise OutputError(f"{storage.root}: no run has planned it; start one, whose rows can be replayed")
        files, _, self._shards = saved
        if not 0 <= sample_index < self.spec.sampling.n:
            raise OutputError(
                f"--sample {sample_index}: the job has samples 0 to {self.spec.sampling.n - 1} of each row; ask for one"
            )
        self._file, self._row = self._find(row, files)
        self._sample = sample_index

    # ---- the request -------------------------------------------------------------------------------------------------

    def prepare(self, tokenizer: Tokenizer | None, max_model_len: int | None) -> Prepared:
        """The request, or the failure of a row that makes none."""
        spec, part = self.spec, Shard(0, self._file, self._row, self._row + 1)
        _, rows = next(iter_shard(part, list_row_columns(spec)))
        if isinstance(rows, Unreadable):
            raise OutputError(f"{self._file.path} row {self._row}: {rows.reason}")
        preparer = Preparer(spec, tokenizer, max_model_len, list_refused(spec.engine))
        return preparer.prepare(rows, self._file.path, [self._row])[self._sample]

    def read_stored(self) -> dict[str, Any] | None:
        """The row as the output has it; None where it is not committed."""
        for shard in self._shards:
            if shard.file.path == self._file.path and shard.row_start <= self._row < shard.row_end:
                if self._storage.info(path := make_data_path(shard.number)) is None:
                    return None
                place = (self._row - shard.row_start) * self.spec.sampling.n + self._sample
                return self._read_row(path, place)
        return None

    def _read_row(self, path: str, place: int) -> dict[str, Any]:
        with (
            refusing_damage(self._storage.url(path), f"is damaged; {RESTORE}"),
            self._storage.open_read(path) as source,
        ):
            parquet = ParquetFile(source)
            for number in range(parquet.num_row_groups):
                size = parquet.metadata.row_group(number).num_rows
                if place < size:
                    return dict(parquet.read_row_group(number).slice(place, 1).to_pylist()[0])
                place -= size
        raise OutputError(f"{self._storage.url(path)}: holds fewer rows than were planned; look with batchgen verify")

    # ---- which row ---------------------------------------------------------------------------------------------------

    def _find(self, row: str, files: list[InputFile]) -> tuple[InputFile, int]:
        """By source_file:source_row, else by custom_id."""
        name, _, number = row.rpartition(":")
        by_path = {file.path: file for file in files}
        if name in by_path and number.isdigit():
            if int(number) < by_path[name].num_rows:
                return by_path[name], int(number)
            raise OutputError(f"--row {row}: the file has rows 0 to {by_path[name].num_rows - 1}; ask for one")
        found = sorted(set(self._find_keys(row)))
        if len(found) != 1:
            what = "no committed row has this custom_id" if not found else f"{len(found)} rows have this custom_id"
            raise OutputError(f"--row {row}: {what}; give source_file:source_row")
        return by_path[found[0][0]], found[0][1]

    def _find_keys(self, key: str) -> Iterator[tuple[str, int]]:
        for info in self._storage.list_files("data", suffix=".parquet"):
            with refusing_damage(self._storage.url(info.path), f"is damaged; {RESTORE}"):
                with self._storage.open_read(info.path) as source:
                    rows = read_table(source, columns=KEYS)
                for row in rows.filter(pc.equal(rows["custom_id"], key)).to_pylist():
                    yield row["source_file"], row["source_row"]


def read_spec(storage: Storage, overrides: tuple[str, ...]) -> JobSpec:
    """The spec that the job began with, overridden. Raises OutputError, SpecError."""
    facts = manifest.read_json(storage, manifest.SPEC)
    if facts is None:
        raise OutputError(f"{storage.root}: holds no job of batchgen; give the output.path of one")
    try:
        spec = read_saved_spec(facts)
    except (KeyError, TypeError, ValidationError) as error:
        raise OutputError(f"{storage.url(manifest.SPEC)}: is no spec that this version reads; {RESTORE}") from error
    if not overrides:
        return spec
    tree = spec.model_dump(mode="json")
    set_fields(tree, overrides)
    return make_spec(tree, source=storage.url(manifest.SPEC))


# ---- told ------------------------------------------------------------------------------------------------------------


def describe(replay: Replay, *, show_text: bool) -> dict[str, Any]:
    """Request and stored row, without starting an engine."""
    tokenizer = create_tokenizer(replay.spec)
    prepared, stored = replay.prepare(tokenizer, replay.spec.model.max_model_len), replay.read_stored()
    return {
        "request": describe_request(prepared, tokenizer, show_text=show_text),
        "stored": describe_stored(stored, list_texts(replay.spec, show_text=show_text)),
        "is_same_request": is_same(prepared, stored),
    }


def describe_request(prepared: Prepared, tokenizer: Tokenizer | None, *, show_text: bool) -> dict[str, Any]:
    row_id = asdict(prepared.row_id)
    if isinstance(prepared, Result):
        return {**row_id, "failure": asdict(prepared.failure) if prepared.failure else None}
    ids = prepared.token_ids
    told = {
        **row_id,
        "num_prompt_tokens": None if ids is None else len(ids),
        "token_ids": None if ids is None else list(ids),
        "sampling": asdict(prepared.sampling),
        "fingerprint": prepared.fingerprint and prepared.fingerprint.hex(),
    }
    if show_text:
        told["prompt"] = asdict(prepared.prompt) if prepared.prompt is not None else None
        told["text"] = tokenizer.decode(ids) if tokenizer is not None and ids is not None else None
    return told


def list_texts(spec: JobSpec, *, show_text: bool) -> set[str]:
    """Columns that are not shown because they hold prompt or answer. A server's own words about an error may quote them."""
    if show_text:
        return set()
    quotes = get_engine_kind(spec.engine.kind).capabilities.quotes_prompts
    return {*TEXTS, "error_message"} if quotes else {*TEXTS}


def describe_stored(stored: dict[str, Any] | None, hidden: set[str]) -> dict[str, Any] | None:
    if stored is None:
        return None
    return {name: stored.get(name) for name in (*STORED, *TEXTS) if name not in hidden}


def is_same(prepared: Prepared, stored: dict[str, Any] | None) -> bool | None:
    """None where nothing tells: the row is not committed, made no request, or has no fingerprint."""
    known = stored and stored.get("row_fingerprint")
    if isinstance(prepared, Result) or prepared.fingerprint is None or known is None:
        return None
    return bool(prepared.fingerprint == known)


async def send(replay: Replay, *, show_text: bool) -> dict[str, Any]:
    """All of `describe`, the request as the open engine's limit leaves it, and what comes of sending it once. Raises
    EngineDied, OutputError."""
    engine = create_engine(replay.spec)
    try:
        await engine.open()
        prepared, stored = replay.prepare(engine.tokenizer, engine.max_model_len), replay.read_stored()
        told = {
            "request": describe_request(prepared, engine.tokenizer, show_text=show_text),
            "stored": describe_stored(stored, list_texts(replay.spec, show_text=show_text)),
            "is_same_request": is_same(prepared, stored),
        }
        if isinstance(prepared, Result):
            raise OutputError(f"{prepared.row_id}: the row makes no request that could be sent; leave --run out")
        parse = engine.tokenizer.parse if engine.tokenizer else None
        try:
            generation = await engine.generate(replace(prepared, attempt=1))
        except RowError as error:
            answer = {"error_type": error.error_type, "error_message": str(error)}
            return {**told, "answer": _show(answer, replay.spec, show_text=show_text), "differs": None}
        result = make_result(prepared, generation, parse=parse, waited_s=0.0, latency_s=0.0)
        answer = describe_answer(prepared, result)
        shown = _show(answer, replay.spec, show_text=show_text)
        return {**told, "answer": shown, "differs": find_differences(answer, stored)}
    finally:
        await engine.close()


def _show(answer: dict[str, Any], spec: JobSpec, *, show_text: bool) -> dict[str, Any]:
    hidden = list_texts(spec, show_text=show_text)
    return {name: value for name, value in answer.items() if name not in hidden}


def describe_answer(request: Request, result: Result) -> dict[str, Any]:
    generation = result.generation
    assert generation is not None
    return {
        "text": result.text,
        "reasoning": result.reasoning,
        "tool_calls": generation.tool_calls,
        "finish_reason": generation.finish_reason,
        "prompt_tokens": generation.usage.prompt_tokens or (request.token_ids and len(request.token_ids)),
        "completion_tokens": generation.usage.completion_tokens,
    }


def find_differences(answer: dict[str, Any], stored: dict[str, Any] | None) -> list[str] | None:
    """Columns that say other things now than in the output; None where the output has no generation of the row."""
    if stored is None or stored["status"] != "ok":
        return None
    return [name for name, value in answer.items() if name in stored and stored[name] != value]
