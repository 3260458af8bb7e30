"""Reads names of Parquet files from standard input, runs a job over each, and says in one JSON line how that ended.

A process of its own, because a file may crash or hang it: the test then knows which one, and starts another.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
from jobs_util import make_tree, run, write_spec
from typer.testing import CliRunner

from batchgen.cli import app
from batchgen.errors import BatchgenError
from batchgen.read import Unreadable, decode_rows, iter_shard, read_footer
from batchgen.records import InputFile, Shard
from batchgen.specs.validate import is_scalar, is_text, is_token_ids
from batchgen.storage import Storage, list_inputs
from batchgen.verify.verify import verify
from batchgen.write import list_reserved_names

MAX_ROWS = 300


def choose_prompt(schema: pa.Schema) -> dict[str, Any]:
    """The first column with text, else any that a template prints, else token ids, else the first, which is refused."""
    fields = [field for field in schema if schema.names.count(field.name) == 1]
    for field in fields:
        if is_text(field.type):
            return {"column": field.name}
    for field in fields:
        if is_scalar(field.type) and not {"{", "}", "!", ":"} & set(field.name):
            return {"template": "What is {" + field.name + "}?"}
    for field in fields:
        if is_token_ids(field.type):
            return {"prompt_token_ids": field.name}
    return {"column": schema.names[0] if schema.names else "none"}


def read_all(file: InputFile, names: list[str]) -> None:
    num_rows = 0
    for _, rows in iter_shard(Shard(0, file, 0, file.num_rows), names, max_rows=1000):
        num_rows += rows.num_rows if isinstance(rows, Unreadable) else len(decode_rows(rows, names))
    assert num_rows == file.num_rows


def look(path: str, folder: Path) -> dict[str, Any]:
    """Every row read, `validate`, and a run over the first ones with every column passed through; {"ended": ...}."""
    try:
        footer = read_footer(list_inputs(path)[0])
    except BatchgenError:
        schema = pa.schema([("x", pa.string())])
    else:
        schema = footer.schema
        read_all(footer.file, [name for name in schema.names if schema.names.count(name) == 1])
    names = [name for name in schema.names if schema.names.count(name) == 1 and name not in list_reserved_names()]
    tree = make_tree(
        path, folder / "out", input={"passthrough": names, "limit": MAX_ROWS}, prompt=choose_prompt(schema)
    )
    if "column" not in choose_prompt(schema):
        tree["prompt"].pop("column", None)
    tree["retry"]["max_error_rate"] = 1.0
    checked = CliRunner().invoke(app, ["validate", write_spec(folder, tree)])
    if checked.exception is not None and not isinstance(checked.exception, SystemExit):
        raise checked.exception
    try:
        report, _ = run(tree)
    except BatchgenError as error:
        return {"ended": "refused", "validate": checked.exit_code, "why": str(error), "kind": type(error).__name__}
    verdict = verify(Storage(str(folder / "out")), with_input=True)
    found = [str(finding) for finding in verdict.findings]
    why = report["message"]
    return {"ended": report["state"], "validate": checked.exit_code, "rows": report["rows"], "found": found, "why": why}


def main() -> None:
    for line in sys.stdin:
        with tempfile.TemporaryDirectory() as folder:
            try:
                said = look(line.rstrip("\n"), Path(folder))
            except Exception as error:  # noqa: BLE001 - what the test is about
                said = {"ended": "traceback", "why": f"{type(error).__name__}: {error}"}
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
