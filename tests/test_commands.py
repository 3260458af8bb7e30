"""Every command line that the README and docs/ show parses: batchgen's and Ray's by their own parsers, AWS's against the
API's own description, the rest by bash. Nothing is run."""

import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from subprocess import run
from typing import Any

import botocore.session
import click
import pytest
import typer
from botocore import xform_name

from batchgen.cli import app
from batchgen.spec import JobSpec

REPO = Path(__file__).parents[1]
PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
# Typer brings a click of its own.
USAGE_ERRORS = (click.UsageError, typer.BadParameter.__mro__[1])
# Options of the command line tool itself, and those of its commands that are no API's.
AWS_OPTIONS = {"--query", "--output", "--region"}
AWS_OWN = {"s3": {"sync": {"--exclude"}}}


def list_blocks() -> list[tuple[str, str]]:
    """(page, shell block) of every page."""
    return [
        (page.name, block) for page in PAGES for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)
    ]


def list_commands(program: str) -> list[list[str]]:
    """The words of each call of a program, also within $( ) and `bash -c`. Variables stay as they are written."""
    return [words for _, block in list_blocks() for words in split_commands(block) if words[0] == program]


def split_commands(text: str) -> Iterator[list[str]]:
    # shlex would take the line's end for a part of its comment.
    text = re.sub(r"(^|\s)#.*$", "", text.replace("\\\n", " "), flags=re.MULTILINE)
    lexer = shlex.shlex(text, posix=True, punctuation_chars="();&|\n")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t\r", True, ""
    words: list[str] = []
    for word in [*lexer, "\n"]:
        if word and set(word) <= set("();&|\n"):
            yield from _nested(words)
            words = []
        elif not (word == "$" or (not words and re.fullmatch(r"\w+=\S*", word))):
            words.append(word)


def _nested(words: list[str]) -> Iterator[list[str]]:
    if words:
        yield words
    for flag, script in pairwise(words):
        if flag == "-c":
            yield from split_commands(script)
    if words and words[0] == "ray" and words[1:2] == ["exec"]:
        yield from split_commands(words[-1])


def resolve(command: Any, words: list[str]) -> dict[str, Any]:
    """Down the groups to the command that is meant: its parameters. Raises USAGE_ERRORS."""
    words = words[1:]
    while hasattr(command, "get_command"):
        command, words = command.get_command(None, words[0]), words[1:]
        if command is None:
            raise click.UsageError("no such command")
    params: dict[str, Any] = command.make_context(command.name, words).params
    return params


@cache
def find_parser(program: str) -> Any:
    if program == "batchgen":
        return typer.main.get_command(app)
    from ray.scripts import scripts  # imports Ray Serve, and warns of its models

    return scripts.cli


def check_aws(words: list[str]) -> None:
    _, service, command, *rest = words
    used = {word for word in rest if word.startswith("--")}
    if service in AWS_OWN:
        assert used <= AWS_OWN[service][command] | AWS_OPTIONS, words
        return
    model: Any = botocore.session.get_session().get_service_model({"s3api": "s3"}.get(service, service))
    operations = {xform_name(name, "-"): name for name in model.operation_names}
    assert command in operations, f"{service} has no {command}"
    shape = model.operation_model(operations[command]).input_shape
    known = {f"--{xform_name(name, '-')}" for name in shape.members} if shape else set()
    assert used <= known | AWS_OPTIONS, words
    needed = {f"--{xform_name(name, '-')}" for name in shape.required_members} if shape else set()
    assert needed <= used, words


@pytest.mark.parametrize(("page", "block"), list_blocks(), ids=lambda value: value.split("\n")[0][:40])
def test_bash_understands_every_block(page: str, block: str) -> None:
    done = run(["bash", "-n"], input=block, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), page


@pytest.mark.parametrize("words", list_commands("batchgen"), ids=lambda words: " ".join(words)[:60])
def test_batchgen_commands_parse(words: list[str]) -> None:
    resolve(find_parser("batchgen"), words)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("words", list_commands("ray"), ids=lambda words: " ".join(words)[:60])
def test_ray_commands_parse(words: list[str]) -> None:
    entrypoint = [str(word) for word in resolve(find_parser("ray"), words).get("entrypoint", ())]
    if entrypoint[:1] == ["python"]:
        assert (REPO / entrypoint[1]).is_file()
        resolve(find_parser("batchgen"), ["batchgen", "run", *entrypoint[2:]])


@pytest.mark.parametrize("words", list_commands("aws"), ids=lambda words: " ".join(words[1:3]))
def test_aws_commands_are_the_apis(words: list[str]) -> None:
    check_aws(words)


def test_wrong_commands_would_be_seen() -> None:
    found = list(
        split_commands("A=$(aws ec2 describe-vpcs --filter x) && batchgen run # batchgen lost\nray exec c 'ray status'")
    )
    assert found == [
        ["aws", "ec2", "describe-vpcs", "--filter", "x"],
        ["batchgen", "run"],
        ["ray", "exec", "c", "ray status"],
        ["ray", "status"],
    ]
    with pytest.raises(AssertionError):
        check_aws(found[0])
    with pytest.raises(USAGE_ERRORS):
        resolve(find_parser("batchgen"), found[1])
    with pytest.raises(USAGE_ERRORS):
        resolve(find_parser("batchgen"), ["batchgen", "plans", "x"])
    assert len(list_commands("batchgen")) > 8
    assert len(list_commands("ray")) > 8
    assert len(list_commands("aws")) > 10


def test_policies_are_json() -> None:
    texts = re.findall(r"'(\{.*?\})'", (REPO / "docs" / "cluster.md").read_text(), re.DOTALL)
    assert len(texts) >= 4
    for text in texts:
        json.loads(text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_field_that_is_named_is_in_the_spec(page: Path) -> None:
    schema = JobSpec.model_json_schema()
    fields = {
        f"{section}.{field}"
        for section, value in schema["properties"].items()
        for name in re.findall(r'"#/\$defs/(\w+)"', json.dumps(value))
        for field in schema["$defs"][name]["properties"]
    }
    sections = "|".join(schema["properties"])
    named = set(re.findall(rf"`((?:{sections})\.[a-z_]+)\b[^`(/]*`", page.read_text()))
    named -= {"cluster.yaml"}
    assert named <= fields, sorted(named - fields)
