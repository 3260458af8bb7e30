"""Every refusal teaches: what, where, the mend. Each sentence in the code, and the command line over bad input."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

import batchgen
from batchgen.cli import app

ROOT = Path(batchgen.__file__).parent
KINDS = {"SpecError", "InputError", "OutputError", "LeaseHeld", "Refusal"}
# The mend after a semicolon, or the sentence is one; or it passes on a reason, whose own sentence has it.
MEND = re.compile(r"; |did you mean|\bwrite \w|\bgive \w|must be a mapping with|or leave it out|pip install")
# What stands behind the semicolon then tells the same again.
SHRUG = re.compile(r"; (there is )?no(thing|t)?\b[^;]*$")
PASSED_ON = re.compile(r"\{[^{}]*(error|reason|reasons|describe|NOT_OURS|_why_unreadable)[^{}]*(\([^{}]*\))?\}'?\"?$")


def list_sentences() -> Iterator[tuple[str, str]]:
    """(where, what a refusal is made with) of all that the package raises with a text written there."""
    for path in sorted(ROOT.rglob("*.py")):
        # What a validator of a spec raises, the spec's reader puts into a sentence with its place.
        is_spec = path.name == "spec.py" or path.parent.name == "specs"
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Raise)
                and isinstance(node.exc, ast.Call)
                and (ast.unparse(node.exc.func) in KINDS or (is_spec and ast.unparse(node.exc.func) == "ValueError"))
                and node.exc.args
                and isinstance(node.exc.args[0], ast.Constant | ast.JoinedStr)
            ):
                yield f"{path.relative_to(ROOT)}:{node.lineno}", ast.unparse(node.exc.args[0])


def test_every_refusal_in_the_code_has_a_mend() -> None:
    sentences = list(list_sentences())
    assert len(sentences) > 150
    assert [pair for pair in sentences if not MEND.search(pair[1]) and not PASSED_ON.search(pair[1])] == []
    assert [pair for pair in sentences if SHRUG.search(pair[1])] == []


def test_a_sentence_without_a_mend_would_be_seen() -> None:
    assert not MEND.search("f'{path}: is not there'")
    assert not PASSED_ON.search("f'{path}: is not there'")
    assert SHRUG.search("f'{path}: no run is working on it; nothing to cancel'")


def make_tree(folder: Path) -> dict[str, object]:
    pq.write_table(pa.table({"q": ["a"]}), folder / "in.parquet")
    return {
        "input": {"paths": str(folder / "in.parquet")},
        "prompt": {"column": "q"},
        "engine": {"kind": "simulated", "has_latency": False},
        "output": {"path": str(folder / "out")},
        "cluster": {"pool": "inline"},
    }


# words of the command line -> what the sentence names: where it is wrong, and the mend.
BAD = [
    (["run", "SPEC", "--set", "input.pats=x"], ["input.pats", "did you mean 'paths'"]),
    (["run", "SPEC", "--set", "prompt.column=question"], ["'question'", "in.parquet"]),
    (["run", "SPEC", "--set", "engine.kind=vlm"], ["engine", "unknown kind 'vlm'"]),
    (["run", "SPEC", "--set", "engine.slots=0"], ["engine.slots", "greater than or equal to 1"]),
    (["run", "SPEC", "--set", "nonsense"], ["--set nonsense", "write section.key=value"]),
    (["run", "SPEC", "--set", "input.paths=nowhere.parquet"], ["nowhere.parquet"]),
    (["run", "SPEC", "--set", "sampling.logprobs=3"], ["sampling.logprobs", "choose another engine"]),
    (["run", "SPEC", "--deadline", "soon"], ["--deadline soon", "write a time"]),
    (["run", "nowhere.yaml"], ["nowhere.yaml", "correct the path"]),
    (["plan", "SPEC", "--set", "cluster.workers.min=9"], ["min (9) is above max"]),
    (["validate", "SPEC", "--set", "prompt.template=Say {q}"], ["exactly one of column", "found column and template"]),
    (["status", "EMPTY"], ["EMPTY", "correct the path, or start one"]),
    (["status", "EMPTY", "--watch"], ["EMPTY", "correct the path, or start one"]),
    (["report", "EMPTY"], ["EMPTY"]),
    (["cancel", "EMPTY"], ["nothing to cancel"]),
    (["verify", "EMPTY"], ["EMPTY"]),
    (["doctor", "nowhere.yaml"], ["nowhere.yaml", "correct the path"]),
    (["replay", "EMPTY", "--row", "x"], ["EMPTY", "give the output.path of one"]),
    (["simulate", "SPEC"], ["nothing says how long the answers are"]),
]


@pytest.mark.parametrize(("words", "named"), BAD, ids=lambda value: " ".join(value)[:50])
def test_bad_input_gets_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], named: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(make_tree(tmp_path)))
    done = CliRunner().invoke(app, [word.replace("SPEC", "spec.yaml") for word in [*words, "--json"]])
    assert done.exit_code == 2, done.stderr
    assert done.stderr.startswith("batchgen: ")
    assert len(done.stderr.splitlines()) == 1
    assert [name for name in named if name not in done.stderr] == []
    line = json.loads(done.stdout.splitlines()[-1])
    assert (line["state"], line["exit_code"], f"batchgen: {line['message']}\n") == ("refused", 2, done.stderr)
    assert "Traceback" not in done.output
