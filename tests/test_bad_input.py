"""What can't work is refused in one sentence before anything starts; what only a row shows becomes that row's error.

The commands run through the real command line, in this process.
"""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jobs_util import (
    Tree,
    check_conserved,
    check_output,
    count_calls,
    list_output,
    make_prompts,
    make_tree,
    merge,
    read_folder,
    run,
    write_file,
    write_spec,
)
from typer.testing import CliRunner

import batchgen
from batchgen.cli import app
from batchgen.specs.validate import is_scalar
from batchgen.write import list_reserved_names

CORPUS = Path(__file__).parents[2] / "shared/data/parquet_corpus"
needs_corpus = pytest.mark.skipif(not CORPUS.is_dir(), reason=f"no corpus of Parquet files at {CORPUS}")
SECRET_TEXT = "question number"


def run_command(*args: str) -> tuple[int, str]:
    """(exit code, standard error) of the command; whatever is raised but an exit is the test's failure."""
    result = CliRunner().invoke(app, list(args))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stderr


def check_refused(tmp_path: Path, tree: Tree | str, *words: str, options: tuple[str, ...] = ()) -> str:
    """Exit code 2, one sentence with these words, nothing started, by `validate` and by `run` alike. The sentence."""
    spec = tree if isinstance(tree, str) else write_spec(tmp_path, tree)
    calls_before = count_calls(tmp_path / "calls")
    said = []
    for command in ("validate", "run"):
        code, err = run_command(command, spec, *options)
        assert code == 2, (command, err)
        said.append(err)
    err = said[1]
    assert err.startswith("batchgen: ")
    assert err.count("\n") == 1, err
    assert [word for word in words if word not in err] == [], err
    assert "Traceback" not in err
    assert SECRET_TEXT not in err
    assert count_calls(tmp_path / "calls") == calls_before
    return err


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    write_file(tmp_path / "in/a.parquet", make_prompts(4))
    return make_tree(tmp_path / "in", tmp_path / "out", tmp_path / "calls")


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "word"),
    [("nothing.parquet", "no such path"), ("in/*.parq", "no file matches"), ("empty", "no file matches")],
)
def test_no_such_input(tmp_path: Path, tree: Tree, path: str, word: str) -> None:
    (tmp_path / "empty").mkdir()
    check_refused(tmp_path, merge(tree, {"input": {"paths": str(tmp_path / path)}}), str(tmp_path / path), word)
    assert not (tmp_path / "out").exists()


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


BROKEN: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "not Parquet": (lambda _: b"prompt\nwhat is this\n", "is not Parquet"),
    "0 bytes": (lambda _: b"", "empty (0 bytes)"),
    "3 bytes": (lambda _: b"PAR", "is not Parquet"),
    "truncated": (cut, "truncated"),
    "broken footer": (lambda data: data[:-100] + bytes(92) + data[-8:], "broken"),
    "encrypted": (lambda data: b"PARE" + data[4:-4] + b"PARE", "encrypted"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_unreadable_file(tmp_path: Path, tree: Tree, kind: str) -> None:
    breaks, word = BROKEN[kind]
    bad = tmp_path / "in/b.parquet"
    bad.write_bytes(breaks((tmp_path / "in/a.parquet").read_bytes()))
    check_refused(tmp_path, tree, str(bad), word)


@needs_corpus
@pytest.mark.parametrize("name", ["columns_and_footer_aad", "columns_and_footer_ctr", "columns_plaintext_footer"])
def test_really_encrypted_file(tmp_path: Path, tree: Tree, name: str) -> None:
    path = str(CORPUS / f"data/encrypt_{name}.parquet.encrypted")
    template = {"column": None, "template": "{double_field}"}  # encrypted in all of them
    check_refused(tmp_path, merge(tree, {"input": {"paths": path}, "prompt": template}), path, "encrypted")


def test_no_rows_at_all(tmp_path: Path, tree: Tree) -> None:
    write_file(tmp_path / "in/a.parquet", make_prompts(0))
    check_refused(tmp_path, tree, "input.paths", "no rows")


# ---- columns ---------------------------------------------------------------------------------------------------------

TABLE = pa.table(
    {
        "prompt": ["a", "b"],
        "number": [1, 2],
        "real": [1.0, 2.0],
        "texts": [["a"], ["b"]],
        "ids": [[1], [2]],
        "chat": [[{"role": "user", "content": "x"}]] * 2,
        "half": [[{"role": "user"}]] * 2,
    }
)
COLUMNS: dict[str, tuple[Tree, list[str]]] = {
    "misspelt": ({"prompt": {"column": "promt"}}, ["'promt'", "prompt.column", "did you mean 'prompt'"]),
    "unknown": ({"prompt": {"column": "zzz"}}, ["'zzz'", "it has: prompt, number"]),
    "in a template": ({"prompt": {"column": None, "template": "{numbr}"}}, ["'numbr'", "prompt.template"]),
    "custom_id": ({"input": {"custom_id": "keyy"}}, ["'keyy'", "input.custom_id"]),
    "passthrough": ({"input": {"passthrough": ["prompt", "nope"]}}, ["'nope'", "input.passthrough"]),
    "sampling": ({"prompt": {"sampling": "how"}}, ["'how'", "prompt.sampling"]),
    "number as text": ({"prompt": {"column": "number"}}, ["'number'", "int64", "must be text"]),
    "chat as text": ({"prompt": {"column": "chat"}}, ["'chat'", "must be text"]),
    "messages without content": ({"prompt": {"column": None, "messages": "half"}}, ["'half'", "role and content"]),
    "numbers as messages": ({"prompt": {"column": None, "messages": "number"}}, ["'number'", "role and content"]),
    "texts as ids": ({"prompt": {"column": None, "prompt_token_ids": "texts"}}, ["'texts'", "list of integers"]),
    "list in a template": ({"prompt": {"column": None, "template": "{ids}"}}, ["'ids'", "text, a number"]),
    "real as key": ({"input": {"custom_id": "real"}}, ["'real'", "double", "text or integers"]),
    "list as sampling": ({"prompt": {"sampling": "ids"}}, ["'ids'", "struct or JSON text"]),
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_wrong_column(tmp_path: Path, tree: Tree, kind: str) -> None:
    change, words = COLUMNS[kind]
    path = write_file(tmp_path / "in/a.parquet", TABLE)
    check_refused(tmp_path, merge(tree, change), path, *words)
    assert not (tmp_path / "out/data").exists()


def test_wrong_column_in_one_file_of_many(tmp_path: Path, tree: Tree) -> None:
    for name in "bcd":
        write_file(tmp_path / f"in/{name}.parquet", make_prompts(2))
    path = write_file(tmp_path / "in/c.parquet", pa.table({"question": ["x"]}))
    check_refused(tmp_path, tree, path, "'prompt'")


def test_two_columns_of_one_name(tmp_path: Path, tree: Tree) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"])
    path = write_file(tmp_path / "in/a.parquet", table)
    check_refused(tmp_path, tree, path, "2 columns named 'prompt'")


def test_a_column_without_a_type_is_nulls(tmp_path: Path, tree: Tree) -> None:
    """What pandas writes for a frame without rows, or a column without values."""
    files = [(str(tmp_path / "in/a.parquet"), 4)]
    write_file(tmp_path / "in/b.parquet", pa.table({"prompt": pa.nulls(0), "key": pa.nulls(0)}))
    files += [(write_file(tmp_path / "in/c.parquet", pa.table({"prompt": pa.nulls(2), "key": ["x", "y"]})), 2)]
    run(merge(tree, {"input": {"custom_id": "key", "passthrough": ["key"]}}))
    rows = check_output(tmp_path / "out", files)
    assert [row["error_type"] for row in rows] == [None] * 4 + ["null_prompt"] * 2


@pytest.mark.parametrize(
    ("first", "second", "rows"),
    [
        (["a", "b", "a"], ["c"], "a.parquet row 2"),
        (["a", "b"], ["c", "b"], "b.parquet row 1"),
        ([7, 8], [9, 7], "b.parquet row 1"),
        ([None, "b"], ["c", None], "b.parquet row 1"),
    ],
)
def test_duplicate_custom_id(tmp_path: Path, tree: Tree, first: list[Any], second: list[Any], rows: str) -> None:
    for name, keys in (("a", first), ("b", second)):
        write_file(tmp_path / f"in/{name}.parquet", pa.table({"prompt": ["p"] * len(keys), "key": keys}))
    tree = merge(tree, {"input": {"custom_id": "key"}})
    check_refused(tmp_path, tree, rows, "'key'", "more than once", "input.check_unique: never")
    report, _ = run(merge(tree, {"input": {"check_unique": "never"}}))
    assert report["custom_id"] == "not checked"
    assert report["rows"]["is_complete"]


@pytest.mark.parametrize(
    ("columns", "words"),
    [(["text"], ["'text'", "batchgen writes itself"]), (["prompt", "prompt"], ["twice"])],
)
def test_passthrough_that_cannot_be(tmp_path: Path, tree: Tree, columns: list[str], words: list[str]) -> None:
    write_file(tmp_path / "in/a.parquet", pa.table({"prompt": ["a"], "text": ["b"]}))
    check_refused(tmp_path, merge(tree, {"input": {"passthrough": columns}}), "input.passthrough", *words)


def test_passthrough_of_two_types(tmp_path: Path, tree: Tree) -> None:
    write_file(tmp_path / "in/a.parquet", pa.table({"prompt": ["a"], "x": [1], "y": ["1"]}))
    path = write_file(tmp_path / "in/b.parquet", pa.table({"prompt": ["a"], "x": [["1"]], "y": ["1"]}))
    check_refused(tmp_path, merge(tree, {"input": {"passthrough": ["y", "x"]}}), path, "'x'", "another type")


# ---- the output ------------------------------------------------------------------------------------------------------


def test_a_model_that_cannot_render_a_chat(tmp_path: Path, tree: Tree) -> None:
    """Known before any worker loads the weights; the same model takes bare text."""
    model = tmp_path / "model"
    shutil.copytree(Path(batchgen.__file__).parent / "embedded", model)
    (model / "chat_template.jinja").unlink()
    asked = {**tree, "engine": {"kind": "transformers"}, "model": {"path": str(model)}}
    check_refused(tmp_path, asked, "chat template", "prompt.chat: false")
    report, _ = run(merge(asked, {"prompt": {"chat": False}, "sampling": {"max_tokens": 2}}))
    assert (report["exit_code"], report["rows"]["ok"]) == (0, 4)


@pytest.mark.parametrize("where", ["under a file", "in /proc", "a file"])
def test_unwritable_output(tmp_path: Path, tree: Tree, where: str) -> None:
    (tmp_path / "file").write_text("x")
    path = {"under a file": f"{tmp_path}/file/out", "in /proc": "/proc/out", "a file": f"{tmp_path}/file"}[where]
    check_refused(tmp_path, merge(tree, {"output": {"path": path}}), path, "can't be the output folder")


@pytest.mark.parametrize("where", ["in/out", "in", "in/deep/../out", "glob"])
def test_output_inside_the_input(tmp_path: Path, tree: Tree, where: str) -> None:
    """Refused at once, not when the second run finds the first one's files."""
    paths = {"input": {"paths": f"{tmp_path}/i*"}} if where == "glob" else {}
    path = f"{tmp_path}/{'in/out' if where == 'glob' else where}"
    check_refused(tmp_path, merge(tree, {"output": {"path": path}, **paths}), "output.path")
    assert list_output(tmp_path / "in") == [str(tmp_path / "in/a.parquet")]


def test_input_inside_the_output(tmp_path: Path, tree: Tree) -> None:
    check_refused(tmp_path, merge(tree, {"output": {"path": str(tmp_path)}}), "in/a.parquet", "output.path")


OTHER: dict[str, tuple[Tree, str]] = {
    "sampling": ({"sampling": {"temperature": 0.5}}, "sampling.temperature"),
    "prompt": ({"prompt": {"column": "key"}}, "prompt.column"),
    "columns": (
        {"input": {"passthrough": ["key"]}, "output": {"token_ids": True}},
        "input.passthrough, output.token_ids",
    ),
    "model": ({"model": {"path": "org/model", "revision": "v2"}}, "model.path, model.revision"),
}


@pytest.mark.parametrize("kind", OTHER)
def test_output_of_another_job(tmp_path: Path, tree: Tree, kind: str) -> None:
    run(tree)
    before = {name: Path(name).read_bytes() for name in list_output(tmp_path / "out", "data")}
    change, words = OTHER[kind]
    check_refused(tmp_path, merge(tree, change), str(tmp_path / "out"), words)
    assert {name: Path(name).read_bytes() for name in list_output(tmp_path / "out", "data")} == before
    assert (tmp_path / "out/_SUCCESS").exists()


@pytest.mark.parametrize("has_job", [True, False])
@pytest.mark.parametrize("content", ["foreign", "garbage"])
def test_foreign_files_in_the_output(tmp_path: Path, tree: Tree, has_job: bool, content: str) -> None:
    if has_job:
        run(tree)
    path = tmp_path / "out/data/other.parquet"
    write_file(path, make_prompts(1))
    if content == "garbage":
        path.write_bytes(b"PAR1 what is this PAR1")
    check_refused(tmp_path, tree, str(path) if has_job else str(tmp_path / "out"), "choose")


# ---- the spec --------------------------------------------------------------------------------------------------------

SPECS: dict[str, tuple[Tree, list[str]]] = {
    "misspelt field": ({"sampling": {"temprature": 1}}, ["sampling.temprature", "did you mean 'temperature'"]),
    "misspelt section": ({"promt": {}}, ["promt", "did you mean 'prompt'"]),
    "field of an engine": ({"engine": {"slot": 1}}, ["engine.slot", "did you mean 'slots'"]),
    "unknown engine": ({"engine": {"kind": "magic"}}, ["engine", "unknown kind 'magic'", "known here: simulated"]),
    "no paths": ({"input": {"paths": []}}, ["input.paths"]),
    "out of range": ({"sampling": {"top_p": 1.5}}, ["sampling.top_p", "less than or equal to 1"]),
    "wrong kind of value": ({"sampling": {"max_tokens": "many"}}, ["sampling.max_tokens", "integer"]),
    "two prompts": ({"prompt": {"template": "{x}"}}, ["prompt", "exactly one", "column and template"]),
    "no prompt": ({"prompt": {"column": None}}, ["prompt", "exactly one", "none"]),
    "workers": ({"cluster": {"workers": {"min": 3, "max": 2}}}, ["cluster.workers", "min (3)"]),
    "engine can't": ({"sampling": {"logprobs": 1}}, ["sampling.logprobs", "'simulated'"]),
    "template without columns": ({"prompt": {"column": None, "template": "hello"}}, ["prompt.template", "no column"]),
    "open brace": ({"prompt": {"column": None, "template": "{prompt"}}, ["prompt.template", "{{ and }}"]),
    "template with format": ({"prompt": {"column": None, "template": "{prompt:>9}"}}, ["prompt.template", "plain"]),
    "unknown protocol": ({"input": {"paths": "foo://bar/x"}}, ["foo://"]),
    "password": ({"output": {"path": "s3://key:hunter2@bucket/x"}}, ["password"]),
}


@pytest.mark.parametrize("kind", SPECS)
def test_wrong_spec(tmp_path: Path, tree: Tree, kind: str) -> None:
    change, words = SPECS[kind]
    assert "hunter2" not in check_refused(tmp_path, merge(tree, change), *words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"input: [", ["line 1", "not valid YAML"]),
        (b"- a\n- b\n", ["must be a mapping"]),
        (b"", ["must be a mapping"]),
        (b"input: {paths: x}\n", ["prompt: is required"]),
        (b"\xff\xfe", ["not UTF-8"]),
        (None, ["no such file"]),
    ],
)
def test_unreadable_spec(tmp_path: Path, text: bytes | None, words: list[str]) -> None:
    path = tmp_path / "job.yaml"
    if text is not None:
        path.write_bytes(text)
    check_refused(tmp_path, str(path), str(path), *words)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("sampling.temprature=1", ["did you mean 'temperature'"]),
        ("sampling", ["section.key=value"]),
        ("sampling.top_p.x=1", ["top_p"]),
        ("sampling.top_p=[", ["not valid YAML"]),
    ],
)
def test_wrong_override(tmp_path: Path, tree: Tree, option: str, words: list[str]) -> None:
    tree = merge(tree, {"sampling": {"top_p": 0.5}})
    check_refused(tmp_path, write_spec(tmp_path, tree), *words, options=("--set", option))


# ---- error rows ------------------------------------------------------------------------------------------------------


def run_rows(tmp_path: Path, table: pa.Table, without: tuple[str, ...] = (), **over: Any) -> list[dict[str, Any]]:
    """The rows of a job over this table. No worker is lost on the way, and only good rows reach the engine."""
    path = write_file(tmp_path / "rows.parquet", table)
    tree = make_tree(path, tmp_path / "rows-out", tmp_path / "rows-calls", **over)
    report, view = run(tree)
    n = tree["sampling"].get("n", 1)
    rows = check_output(tmp_path / "rows-out", [(path, table.num_rows)], n, without)
    check_conserved(tmp_path / "rows-out", [(path, table.num_rows)], n)
    assert view.warned == []
    assert report["state"] == "finished"
    assert count_calls(tmp_path / "rows-calls") == sum(row["status"] == "ok" for row in rows)
    assert {row["num_attempts"] for row in rows if row["status"] == "error"} <= {0}
    assert not any(row["is_retryable"] for row in rows)
    return rows


def list_types(rows: list[dict[str, Any]]) -> list[str | None]:
    return [row["error_type"] for row in rows]


def unchecked(values: list[bytes | None]) -> pa.Array:
    """Text of which nobody asked whether it is UTF-8."""
    return pa.array(values, pa.binary()).view(pa.string())


TEXTS = {
    b"good": None,
    b"": "empty_prompt",
    None: "null_prompt",
    b"\xff\xfe bad": "invalid_utf8",
    b"half \xed\xa0\x80 pair": "invalid_utf8",
    b"cut \xe6\x97": "invalid_utf8",
    b"x" * 200: "prompt_too_long",
    "日本 \N{GRINNING FACE} \0 fine".encode(): None,
}


@pytest.mark.parametrize("kind", ["string", "large_string", "binary", "dictionary", "template", "bare"])
def test_bad_texts(tmp_path: Path, kind: str) -> None:
    column = unchecked(list(TEXTS))
    if kind == "binary":
        column = column.view(pa.binary())
    elif kind == "large_string":
        column = pa.array(list(TEXTS), pa.large_binary()).view(pa.large_string())
    elif kind == "dictionary":
        column = column.dictionary_encode()
    prompt = {"template": {"template": "{prompt}"}, "bare": {"column": "prompt", "chat": False}}.get(kind, {})
    table = pa.table({"prompt": column, "id": column})
    over = {"input": {"custom_id": "id"}} if kind != "template" else {}
    rows = run_rows(tmp_path, table, prompt=prompt, engine={"max_model_len": 100}, sampling={"n": 2}, **over)
    assert list_types(rows[::2]) == list_types(rows[1::2]) == list(TEXTS.values())
    if over:
        expected = [None if error == "invalid_utf8" else text for text, error in TEXTS.items()]
        assert [row["custom_id"] for row in rows[::2]] == [None if key is None else key.decode() for key in expected]
    assert not any("half" in (row["error_message"] or "") for row in rows)


CHATS: list[tuple[str | None, str | None]] = [
    ('[{"role": "user", "content": "hi"}]', None),
    ('[{"role": "user", "content": "hi", "name": null}]', None),
    (None, "null_prompt"),
    ("", "bad_messages"),
    ("[", "bad_messages"),
    ("[]", "bad_messages"),
    ("{}", "bad_messages"),
    ("7", "bad_messages"),
    ("null", "bad_messages"),
    ('["hi"]', "bad_messages"),
    ('[{"content": "hi"}]', "bad_messages"),
    ('[{"role": "user"}]', "bad_messages"),
    ('[{"role": "", "content": "hi"}]', "bad_messages"),
    ('[{"role": "user", "content": 7}]', "bad_messages"),
    ('[{"role": "user", "content": ["hi"]}]', "bad_messages"),
    ('[{"role": "user", "content": "\\ud800"}]', "invalid_utf8"),
    ('[{"role": "\\ud800", "content": "hi"}]', "invalid_utf8"),
    ('[{"role": "user", "content": "hi", "\\udfff": 1}]', "invalid_utf8"),
    ("[" * 100_000, "bad_messages"),
    ('[{"role": "user", "content": "last"}]', None),
]


def test_bad_messages_as_json(tmp_path: Path) -> None:
    rows = run_rows(tmp_path, pa.table({"chat": [text for text, _ in CHATS]}), prompt={"messages": "chat"})
    assert list_types(rows) == [error for _, error in CHATS]
    assert "column 'chat', message 0: role must be text" in [row["error_message"] for row in rows]


def test_bad_messages_as_structs(tmp_path: Path) -> None:
    kind = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    chats = [
        ([{"role": "user", "content": "hi"}], None),
        (None, "null_prompt"),
        ([], "bad_messages"),
        ([None], "bad_messages"),
        ([{"role": None, "content": "x"}], "bad_messages"),
        ([{"role": "user", "content": None}], "bad_messages"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], None),
    ]
    table = pa.table({"chat": pa.array([chat for chat, _ in chats], kind)})
    assert list_types(run_rows(tmp_path, table, prompt={"messages": "chat"})) == [error for _, error in chats]


def test_bad_text_inside_structs(tmp_path: Path) -> None:
    contents = unchecked([b"good", b"\xff", b"good"])
    structs = pa.StructArray.from_arrays([pa.array(["user"] * 3), contents], ["role", "content"])
    chats = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), structs)
    rows = run_rows(tmp_path, pa.table({"chat": chats}), prompt={"messages": "chat"})
    assert list_types(rows) == [None, "invalid_utf8", None]


def test_bad_token_ids(tmp_path: Path) -> None:
    ids = [
        ([1, 2], None),
        (None, "null_prompt"),
        ([], "empty_prompt"),
        ([1, None], "bad_token_ids"),
        ([-1], "bad_token_ids"),
        ([256], "bad_token_ids"),
        ([2**40], "bad_token_ids"),
        ([1] * 100, "prompt_too_long"),
        ([255], None),
    ]
    table = pa.table({"ids": pa.array([value for value, _ in ids], pa.list_(pa.int64()))})
    rows = run_rows(tmp_path, table, prompt={"prompt_token_ids": "ids"}, engine={"max_model_len": 100})
    assert list_types(rows) == [error for _, error in ids]


SAMPLINGS: list[tuple[Any, str | None]] = [
    ('{"max_tokens": 2}', None),
    (None, None),
    ("{}", None),
    ("{", "bad_sampling"),
    ("[]", "bad_sampling"),
    ("7", "bad_sampling"),
    ("", "bad_sampling"),
    ('{"max_token": 2}', "bad_sampling"),
    ('{"max_tokens": 0}', "bad_sampling"),
    ('{"max_tokens": "x"}', "bad_sampling"),
    ('{"max_tokens": 1e400}', "bad_sampling"),
    ('{"temperature": NaN}', "bad_sampling"),
    ('{"temperature": -1}', "bad_sampling"),
    ('{"top_p": Infinity}', "bad_sampling"),
    ('{"n": 2}', "bad_sampling"),
    ('{"logprobs": 1}', "bad_sampling"),  # the simulated engine has none
    ('{"stop": ["\\ud800"]}', "bad_sampling"),
    ('{"seed": 99999999999999999999}', "bad_sampling"),
    ('{"max_tokens": null, "top_k": 3}', None),
]


def test_bad_sampling_of_a_row(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["p"] * len(SAMPLINGS), "how": [text for text, _ in SAMPLINGS]})
    rows = run_rows(tmp_path, table, prompt={"sampling": "how"})
    assert list_types(rows) == [error for _, error in SAMPLINGS]
    assert "column 'how': n can't be set for a row" in [row["error_message"] for row in rows]


def test_bad_sampling_structs(tmp_path: Path) -> None:
    values = [{"temperature": 0.5}, {"temperature": math.nan}, None, {"temperature": None}, {"temperature": -1.0}]
    rows = run_rows(tmp_path, pa.table({"prompt": ["p"] * 5, "how": values}), prompt={"sampling": "how"})
    assert list_types(rows) == [None, "bad_sampling", None, None, "bad_sampling"]


def test_values_that_python_cannot_hold(tmp_path: Path) -> None:
    """Dates beyond the year 9999 and nanoseconds are fine for Arrow."""
    table = pa.table(
        {
            "day": pa.array([0, 2**31 - 1, 1, None], pa.int32()).view(pa.date32()),
            "nanos": pa.array([1, 2**62, 0, 5], pa.int64()).view(pa.timestamp("ns")),
            "far": pa.array([0, 0, 2**62, 0], pa.int64()).view(pa.timestamp("us")),
        }
    )
    prompt, kept = {"template": "{day} {nanos} {far}"}, ("day", "far")
    rows = run_rows(tmp_path, table, prompt=prompt, input={"passthrough": list(kept)}, without=kept)
    assert read_folder(tmp_path / "rows-out")["far"].equals(table["far"])
    assert list_types(rows) == [None, "bad_value", "bad_value", "null_prompt"]


def test_long_prompts_may_be_cut(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["short", "x" * 5000, "y" * 99]})
    prompt = {"chat": False, "on_overflow": "truncate_left"}
    rows = run_rows(tmp_path, table, prompt=prompt, engine={"max_model_len": 100}, sampling={"max_tokens": 30})
    assert list_types(rows) == [None] * 3
    assert [row["prompt_tokens"] for row in rows] == [5, 70, 99]
    assert rows[2]["completion_tokens"] == 1


def test_text_that_is_not_utf8_is_passed_through_as_null(tmp_path: Path) -> None:
    """Else no reader opens the output; bytes stay bytes."""
    raw = [b"\xff", b"fine", None]
    texts = unchecked(raw)
    columns = {
        "text": texts,
        "large": pa.array(raw, pa.large_binary()).view(pa.large_string()),
        "coded": texts.dictionary_encode(),
        "list": pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), texts),
        "struct": pa.StructArray.from_arrays([texts], ["x"]),
    }
    names = [f"raw_{name}" for name in columns]
    table = pa.table({"prompt": ["a", "b", "c"], "bytes": raw, **dict(zip(names, columns.values(), strict=True))})
    run_rows(tmp_path, table, input={"passthrough": [*names, "bytes"]})
    found = read_folder(tmp_path / "rows-out").select(names).to_pydict()
    assert [found[f"raw_{name}"][:2] for name in columns] == [
        *([[None, "fine"]] * 3),
        [None, ["fine"]],
        [None, {"x": "fine"}],
    ]
    query = f"select raw_text, raw_large, raw_coded, bytes from read_parquet('{tmp_path}/rows-out/data/*.parquet')"
    assert duckdb.sql(query).fetchall()[:2] == [(None, None, None, b"\xff"), ("fine", "fine", "fine", b"fine")]


# ---- files from the wild ---------------------------------------------------------------------------------------------


def list_corpus() -> list[str]:
    return sorted(str(path.relative_to(CORPUS)) for path in CORPUS.glob("*/*") if "parquet" in path.name)


def choose_columns(path: Path) -> tuple[str | None, list[str]]:
    """(the first column that a template can print, all that can be passed through); None for an unreadable footer."""
    try:
        schema = pq.read_schema(path)
    except (pa.ArrowException, OSError):
        return None, []
    once = [field for field in schema if schema.names.count(field.name) == 1]
    scalar = [field.name for field in once if is_scalar(field.type)]
    plain = [field.name for field in once if field.name not in list_reserved_names()]
    return (scalar[0] if scalar else None), plain


@needs_corpus
@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", list_corpus())
def test_files_from_the_wild(tmp_path: Path, name: str) -> None:
    """Each works, with all its rows and columns or else with its first column, or ends in one sentence that names it."""
    path = CORPUS / name
    column, columns = choose_columns(path)
    if run_wild_file(tmp_path / "whole", path, column, columns) > 1 and columns:
        run_wild_file(tmp_path / "first", path, column, [])


def run_wild_file(tmp_path: Path, path: Path, column: str | None, passthrough: list[str]) -> int:
    out, calls = tmp_path / "out", tmp_path / "calls"
    tree = make_tree(path, out, calls, output={"rows_per_shard": 4000}, engine={"mean_tokens": 1})
    tree["prompt"] = {"template": f"value: {{{column or 'any'}}}"}
    tree["input"]["passthrough"] = passthrough
    code, err = run_command("run", write_spec(tmp_path, tree))
    assert "Traceback" not in err
    assert "unexpected" not in err
    if code in {0, 1}:
        metadata = pq.read_metadata(path)
        num_rows = sum(metadata.row_group(number).num_rows for number in range(metadata.num_row_groups))
        check_output(out, [(str(path), num_rows)], without=passthrough)
        check_conserved(out, [(str(path), num_rows)])
    else:
        assert str(path) in err or "with no rows" in err
        assert err.count("\n") == 1
        assert not (out / "data").exists()
        assert count_calls(calls) == 0
    return code
