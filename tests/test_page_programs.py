"""What the pages show beside batchgen's own commands: scripts, extras, sed, the endpoint's client, fragments of specs. Run,
or held against the program's own word of what it takes."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import yaml
from serve_process import Server, make_endpoint_tree, running
from test_commands import list_blocks, list_commands

from batchgen.serve.load import make_endpoint
from batchgen.specs.load import make_spec
from batchgen.specs.validate import check_spec

REPO = Path(__file__).parents[1]
DOCS = REPO / "docs"
ENDPOINT = (DOCS / "endpoint.md").read_text()
# Where a page's fragment of a spec belongs.
WHOLE = {
    "input": {"paths": "in.parquet"},
    "prompt": {"messages": "chat"},
    "engine": {"kind": "tensorrt_llm", "guided_decoding_backend": "xgrammar"},
    "output": {"path": "out"},
}


def call(*words: str, cwd: Path = REPO) -> str:
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def list_fragments() -> list[tuple[str, dict[str, Any]]]:
    found = []
    for page in ("delta.md", "engines.md", "gates.md"):
        blocks = re.findall(r"```yaml\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
        found += [(f"{page} {number}", yaml.safe_load(block)) for number, block in enumerate(blocks)]
    return found


@pytest.mark.parametrize(("name", "fragment"), list_fragments())
def test_fragments_of_specs_work(name: str, fragment: dict[str, Any]) -> None:
    del name
    own_engine = fragment.get("engine", {})
    engine = own_engine if "kind" in own_engine else WHOLE["engine"] | own_engine
    tree = {section: WHOLE.get(section, {}) | fragment.get(section, {}) for section in WHOLE | fragment}
    check_spec(make_spec(tree | {"engine": engine}))


def test_the_endpoints_file_works() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", ENDPOINT, re.DOTALL)
    assert list(make_endpoint(yaml.safe_load(block)).models) == ["my-model"]


def test_the_endpoints_client_works_with_a_key_that_was_made_as_shown(tmp_path: Path) -> None:
    first, in_parts = re.findall(r"```python\n(.*?)```", ENDPOINT, re.DOTALL)
    block = f"{first}{in_parts}print(client.batches.retrieve(batch.id).id)\n"
    (command,) = [words for words in list_commands("python") if "batchgen.serve.keys" in words]
    made = subprocess.run(
        [sys.executable, *command[1 : command.index(">>")]], capture_output=True, text=True, check=True, timeout=60
    )
    key = made.stderr.split()[-1]
    body = '{"model": "fast", "messages": [{"role": "user", "content": "1 + 1 ="}]}'
    row = f'{{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {body}}}\n'
    (tmp_path / "in.jsonl").write_text(row)
    server = Server(tmp_path / "endpoint", make_endpoint_tree(str(tmp_path / "store")))
    server.key_file.write_text(made.stdout)
    with running(server):
        own = block.replace("http://127.0.0.1:8000/v1", server.url).replace('"none"', repr(key))
        assert own.count(server.url) == own.count(key) == 1
        out = call(sys.executable, "-c", own, cwd=tmp_path)
    assert out.startswith("completed ")
    assert '"custom_id":"a"' in out.replace(" ", "")
    assert out.splitlines()[-1].startswith("batch_"), "and so does a file in parts"


def test_extras_that_are_named_exist() -> None:
    extras = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["optional-dependencies"].keys()
    files = [REPO / "README.md", *DOCS.glob("*.md"), *(REPO / "batchgen").rglob("*.py"), *(REPO / "jobs").glob("*.py")]
    text = "\n".join(path.read_text() for path in files)
    assert set(re.findall(r"batchgen\[([a-z]+)\]|'\.\[([a-z]+)\]'", text)) != set()
    named = {name for pair in re.findall(r"batchgen\[([a-z]+)\]'|'\.\[([a-z]+)\]'", text) for name in pair if name}
    assert named <= extras


def test_targets_of_make_exist() -> None:
    made = re.findall(r"^([a-z]+):", (REPO / "Makefile").read_text(), re.MULTILINE)
    shown = {words[1] for words in list_commands("make")}
    assert {"demo", "test"} <= shown <= set(made)


SCRIPTS = sorted({words[1] for words in list_commands("python") if words[1].startswith("jobs/")})


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_know_the_options_that_are_shown(script: str) -> None:
    known = call(sys.executable, script, "--help")
    used = {word for words in list_commands("python") if words[1] == script for word in words if word.startswith("--")}
    assert [option for option in used if option not in known] == []


def test_the_hub_command_knows_its_options() -> None:
    hf = str(Path(sys.executable).parent / "hf")
    for words in list_commands("hf"):
        known = call(hf, words[1], "--help")
        assert [word for word in words if word.startswith("--") and word not in known] == []


def test_placeholders_of_the_cluster_are_filled_by_the_commands_that_are_shown(tmp_path: Path) -> None:
    copytree(REPO / "jobs", tmp_path / "jobs", ignore=lambda _, names: {"__pycache__"} & set(names))
    (tmp_path / "cluster.yaml").write_bytes((REPO / "cluster.yaml").read_bytes())
    lines = [line for page, block in list_blocks() if page == "cluster.md" for line in block.splitlines()]
    script = "\n".join(line for line in lines if line.startswith("sed -i "))
    call("bash", "-e", "-c", f"AMI=ami-1 SG=sg-1 AWS_REGION=eu-west-1 BUCKET=mine\n{script}", cwd=tmp_path)
    filled = (tmp_path / "cluster.yaml").read_text()
    assert "CHANGE_ME" not in filled
    assert "region: eu-west-1" in filled
    for name in ("deepseek_v32.yaml", "deepseek_v32_throughput.yaml"):
        text = (tmp_path / "jobs" / name).read_text()
        assert "s3://mine/" in text
        assert "BUCKET" not in re.sub("#.*", "", text)
