"""What must hold at every instant of a world, and at its end. Reads the output as a stranger would, with pyarrow alone; of
ours it uses file names and column names."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Key = tuple[str, int, int]
OUT = "sim://out/"


class Violation(AssertionError):
    """A promise was broken."""


class Checker:
    """`keys`: what the input asks for, in order. `watch` sees every change of the store."""

    def __init__(self, keys: Sequence[Key], store: Mapping[str, Any]) -> None:
        self._keys, self._store = list(keys), store
        self._wanted = set(keys)
        self._standing: dict[Key, tuple[str, dict[str, Any]]] = {}
        self._rows_of: dict[str, list[dict[str, Any]]] = {}
        self.num_commits = 0
        self.num_replaced = 0
        self.violation: str | None = None

    def watch(self, name: str, before: bytes | None, after: bytes | None) -> None:
        """Called within a strand: it must not raise there, for production code might catch it."""
        try:
            self._check(name.removeprefix(OUT), before, after)
        except Violation as error:
            self.violation = self.violation or str(error)

    def _check(self, path: str, before: bytes | None, after: bytes | None) -> None:
        if path.startswith("data/"):
            if after is None:
                raise Violation(f"{path} was deleted")
            self._check_rows(path, read_rows(after), is_new=before is None)
        elif path in ("manifest.json", "report.json") and before and after:
            was, is_now = (json.loads(content)["epoch"] for content in (before, after))
            if is_now < was:
                raise Violation(f"{path} of epoch {was} was replaced by that of an earlier one, {is_now}")
        elif path == "_SUCCESS" and after is not None:
            missing = self._wanted - {key for rows in self._rows_of.values() for key in map(get_key, rows)}
            if missing:
                raise Violation(f"_SUCCESS while {len(missing)} rows are not there, {min(missing)} for one")

    def _check_rows(self, path: str, rows: list[dict[str, Any]], *, is_new: bool) -> None:
        self.num_commits += 1
        self.num_replaced += not is_new
        keys = [get_key(row) for row in rows]
        if len(set(keys)) < len(keys):
            raise Violation(f"{path}: a row is in it twice")
        if keys != sorted(keys) or not set(keys) <= self._wanted:
            raise Violation(f"{path}: rows out of order, or that nobody asked for")
        if not is_new and keys != [get_key(row) for row in self._rows_of[path]]:
            raise Violation(f"{path}: was replaced by a file with other rows")
        self._rows_of[path] = rows
        for row in rows:
            self._check_row(path, row)

    def _check_row(self, path: str, row: dict[str, Any]) -> None:
        key = get_key(row)
        known = self._standing.get(key)
        if known is not None and known[0] != path:
            raise Violation(f"{path}: {key} is in {known[0]} too")
        if known is not None and known[1]["status"] == "ok" and known[1] != row:
            changed = [name for name in row if row[name] != known[1][name]]
            raise Violation(f"{path}: the committed generation of {key} was changed ({', '.join(changed)})")
        if (row["status"] == "ok") == (row["text"] is None) or (row["status"] == "error") == (
            row["error_type"] is None
        ):
            raise Violation(f"{path}: {key} is neither a generation nor an error")
        self._standing[key] = (path, row)

    def check_end(self, expected_errors: set[Key]) -> None:
        """Everything is there, once, and the counts agree."""
        rows = self.list_rows()
        if sorted(map(get_key, rows)) != sorted(self._keys):
            raise Violation(f"{len(rows)} rows in the output where {len(self._keys)} are wanted")
        errors = self.list_errors()
        if errors != expected_errors:
            raise Violation(f"error rows {sorted(errors ^ expected_errors)} are wrong or missing")
        self._check_counts(rows, len(errors))

    def list_rows(self) -> list[dict[str, Any]]:
        """All rows of the output, in the order of the files' names."""
        return [row for path in sorted(self._rows_of) for row in self._rows_of[path]]

    def list_errors(self, error_type: str | None = None) -> set[Key]:
        """Error rows of the output, or those of one type."""
        errors = (row for row in self.list_rows() if row["status"] == "error")
        return {get_key(row) for row in errors if error_type in (None, row["error_type"])}

    def _check_counts(self, rows: list[dict[str, Any]], num_errors: int) -> None:
        manifest = json.loads(self._read("manifest.json"))
        said = manifest["rows"]
        if (said["output"], said["ok"], said["error"]) != (len(rows), len(rows) - num_errors, num_errors):
            raise Violation(f"manifest.json counts {said}")
        batches = [
            row["batch_id"] for path in self._list("batch_stats/") for row in read_rows(self._read(path), ["batch_id"])
        ]
        if len(set(batches)) < len(batches):
            twice = sorted({batch for batch in batches if batches.count(batch) > 1})
            raise Violation(f"batch_stats has {twice} more than once")
        if unknown := {row["batch_id"] for row in rows} - set(batches):
            raise Violation(f"batch_stats lacks {sorted(unknown)}")

    def has_lost_only(self, path: str) -> bool:
        """Are the batches of this file of batch_stats lost ones, without a row in the output?"""
        batches = read_rows(self._read(path), ["batch_id", "outcome"])
        ours = {row["batch_id"] for row in self.list_rows()}
        return all(row["outcome"] == "lost" and row["batch_id"] not in ours for row in batches)

    def _list(self, folder: str) -> list[str]:
        return sorted(name.removeprefix(OUT) for name in self._store if name.startswith(OUT + folder))

    def _read(self, path: str) -> bytes:
        if OUT + path not in self._store:
            raise Violation(f"{path} is not there")
        return bytes(self._store[OUT + path].data)


def get_key(row: Mapping[str, Any]) -> Key:
    return row["source_file"], row["source_row"], row["sample_index"]


def read_rows(data: bytes, columns: list[str] | None = None) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = (
        pq.ParquetFile(pa.BufferReader(data)).read(columns=columns, use_threads=False).to_pylist()
    )
    return rows
