"""Every command line that the README and docs/ show parses: batchgen's and Ray's by their own parsers, AWS's against the
API's own description, the rest by bash. Nothing is run here: two tables say which file runs each, and which nobody can run
without what it names."""

import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
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


# The first words of a command -> the file that runs it as it stands, or as far as it goes without what it names.
RUN = {
    "aws": "test_cluster_road.py",
    "batchgen": "test_pages.py",
    "hf": "test_page_programs.py",
    "kubectl": "test_kubectl.py",
    "make": "../.ci/run",
    "python -c": "test_road.py",
    "python -m": "test_page_programs.py",
    "python jobs/benchmark.py": "test_bench.py",
    "ray down": "test_cluster_road.py",
    "ray get-auth-token": "ray_cluster.py",
    "ray job": "test_road.py",
    "ray start": "ray_cluster.py",
    "ray up": "test_cluster_road.py",
    "serve deploy": "test_serve_deploy.py",
}
PARSED = {
    "python jobs/bench_worker_gpu.py": "minutes, or a GPU; test_bench_worker.py calls what it calls",
    "pip install": "a registry; `make` installs the same extras, test_wheel.py a wheel",
    "ray dashboard": "a head that answers to ssh",
    "ray exec": "a head that answers to ssh",
    "ray status": "a cluster: it is what `ray exec` is asked to run",
    "serve run": "goes on for ever; `serve deploy` runs the same application with the same arguments",
}
# The shell's own, in blocks that are pasted whole.
SHELL = {"for", "do", "done", "export", "sed", "mkdir", "cp", "touch", ".", "python3"}


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
    for shell, flag, script in zip(words, words[1:], words[2:], strict=False):
        if (shell, flag) == ("bash", "-c"):
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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_serve_commands_parse() -> None:
    from ray.serve.scripts import cli

    from batchgen.serve.deployment import AppArgs

    (run_app,) = [words for words in list_commands("serve") if words[1] == "run"]
    params = resolve(cli, run_app)
    assert params["config_or_import_path"] == "batchgen.serve.deployment:app"
    assert {argument.partition("=")[0] for argument in params["arguments"]} <= set(AppArgs.model_fields)
    for words in list_commands("serve"):
        resolve(cli, words)


def name_command(words: list[str]) -> str:
    return words[0] if words[0] in RUN else " ".join(words[:2])


def test_every_command_is_run_by_a_test_or_says_why_not() -> None:
    found = {
        name_command(words)
        for _, block in list_blocks()
        for words in split_commands(block)
        if not re.match(r"\w+=", words[0]) and words[0] not in SHELL
    }
    assert found == RUN.keys() | PARSED.keys()
    for command, file in RUN.items():
        text = (REPO / "tests" / file).read_text()
        assert command.split()[-1].rpartition("/")[2].removesuffix(".py") in text, f"{command}: {file} does not run it"


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
