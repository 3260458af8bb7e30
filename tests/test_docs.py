"""What the README, the job specs and the cluster file say is true of the code."""

import ast
import json
import re
import tomllib
from pathlib import Path

import pyarrow as pa
import pytest
import yaml
from typer.testing import CliRunner

from batchgen.batch_stats import STATS_SCHEMA
from batchgen.cli import app
from batchgen.errors import SpecError
from batchgen.evaluate.spec_load import load_evaluate_spec
from batchgen.quantize.spec_load import load_quantize_spec
from batchgen.specs.load import load_spec, make_spec, parse_spec
from batchgen.specs.validate import check_spec
from batchgen.write import make_output_schema

REPO = Path(__file__).parents[1]
ERROR_MAKERS = {"BadRow", "BadCell", "RequestRejected", "RequestFailed", "Failure"}
# Specs in jobs/ of which no job is made.
OTHER_SPECS = {"quantize.yaml", "evaluate.yaml", "nightly.yaml", "serve.yaml"}
README = (REPO / "README.md").read_text()


def read_example() -> str:
    (example,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    return str(example)


def test_the_example_spec_works() -> None:
    check_spec(parse_spec(read_example()))


def test_the_output_table_names_every_column_and_no_other() -> None:
    tree = yaml.safe_load(read_example())
    tree["sampling"]["logprobs"] = 1
    tree["output"]["token_ids"] = True
    tree["engine"] = {"kind": "openai", "base_urls": "http://localhost:1/v1", "extra_body": {"tools": [{}]}}
    columns = set(make_output_schema(make_spec(tree), pa.schema([])).names)
    table = README[README.index("| column | type | what |") : README.index("`batch_stats` has")]
    named = {
        name
        for row in table.splitlines()[2:]
        if row.startswith("| `")
        for name in re.findall(r"`(\w+)`", row.split("|")[1])
    }
    assert named == columns


def test_every_batch_stats_column_is_documented() -> None:
    documented = (REPO / "docs" / "batch_stats.md").read_text()
    missing = [name for name in STATS_SCHEMA.names if f"`{name}`" not in documented]
    assert not missing


def test_the_docs_give_the_types_of_batch_stats_lists() -> None:
    for name in ("finish_reasons", "error_types"):
        kind = STATS_SCHEMA.field(name).type
        assert [(field.name, str(field.type)) for field in kind.value_type] == [("value", "string"), ("count", "int64")]
    assert "finish reasons and error types (each `list<struct<value, count>>`)" in README
    assert "| list<struct<value: string, count: int64>> |" in (REPO / "docs" / "batch_stats.md").read_text()


def test_every_error_type_of_the_readme_occurs_in_the_code() -> None:
    listed = re.findall(r"`(\w+)`", README[README.index("Error types of rows:") : README.index("A later\nrun")])
    assert listed
    assert set(listed) - list_error_types() == set()


def list_error_types() -> set[str]:
    """What the code gives as the type of a row's error, and what such a function takes when nobody says."""
    trees = [ast.parse(path.read_text()) for path in (REPO / "batchgen").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    calls = [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) in ERROR_MAKERS]
    given = [value for call in calls for value in [*call.args, *(keyword.value for keyword in call.keywords)]]
    return {value.value for value in given if isinstance(value, ast.Constant) and isinstance(value.value, str)}


def test_the_quantization_spec_works() -> None:
    path = str(REPO / "jobs" / "quantize.yaml")
    check_spec(load_quantize_spec(path).as_job())
    with pytest.raises(SpecError, match="did you mean 'num_rows'"):
        load_quantize_spec(path, ["calibration.num_row=1"])


def test_the_evaluation_spec_works() -> None:
    path = str(REPO / "jobs" / "evaluate.yaml")
    check_spec(load_evaluate_spec(path).make_job("prompts.parquet", "out", n=1))
    with pytest.raises(SpecError, match="did you mean 'dataset'"):
        load_evaluate_spec(path, ["dataste=x"])


PAGES = [REPO / "README.md", REPO / "CONTRIBUTING.md", *sorted((REPO / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_link_and_no_path_leads_nowhere(page: Path) -> None:
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []
    named = re.findall(r"\b((?:docs|jobs|tests|batchgen)/[\w/.-]*\w\.(?:md|py|yaml|png|svg|json))\b", text)
    assert [path for path in named if not (REPO / path).exists()] == []


def test_the_index_has_every_page() -> None:
    index = (REPO / "docs" / "README.md").read_text()
    assert [page.name for page in PAGES[2:] if page.name != "README.md" and f"]({page.name})" not in index] == []


def test_the_readme_stays_short() -> None:
    assert len(README.splitlines()) < 300


def test_the_version_is_semantic_and_has_its_part_of_the_changelog() -> None:
    version = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert re.findall(r"^## (\S+)", (REPO / "CHANGELOG.md").read_text(), re.MULTILINE)[0] == version


JOB_SPECS = sorted(path for path in (REPO / "jobs").glob("*.yaml") if path.name not in OTHER_SPECS)


@pytest.mark.parametrize("path", JOB_SPECS, ids=lambda path: path.name)
def test_job_specs_work(path: Path) -> None:
    spec = load_spec(str(path))
    check_spec(spec)
    with pytest.raises(SpecError, match="did you mean"):
        load_spec(str(path), ["sampling.max_token=1"])


def test_schema_command_documents_every_field() -> None:
    schema = json.loads(CliRunner().invoke(app, ["schema"]).stdout)
    for name, section in schema["$defs"].items():
        for field, value in section["properties"].items():
            assert "description" in value or "const" in value or "$ref" in value, f"{name}.{field}"


def test_entry_points_stay_thin() -> None:
    for path in (REPO / "jobs").glob("*.py"):
        assert len(path.read_text().splitlines()) < 40, path.name
