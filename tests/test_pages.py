"""What the pages show is run: Python blocks of docs/, batchgen's commands with the README's own example; docs/spec.md is
what the models say. What can't run here stands in one table, with the reason and where its like is run."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from ray_cluster import RayCluster
from test_commands import list_commands
from typer.testing import CliRunner, Result

from batchgen.cli import app
from batchgen.specs.reference import list_sections, make_reference

REPO = Path(__file__).parents[1]
README = (REPO / "README.md").read_text()
# command -> why these words can't run here as they stand, and the test file that invokes the command for real.
ELSEWHERE = {
    "stage": ("a checkpoint on a store, or at /models", "test_doctor.py"),
    "doctor": ("the node's own GPUs and model", "test_doctor.py"),
    "chaos": ("a minute of kills, or a bucket", "test_chaos.py"),
    "evaluate run": ("a benchmark's dataset", "test_evaluate.py"),
    "evaluate score": ("an evaluation's folder", "test_evaluate.py"),
    "evaluate compare": ("two evaluations", "test_evaluate.py"),
    "quantize": ("a checkpoint of one's own", "test_quantize.py"),
    "schedule": ("goes on for ever", "test_pipelines_ray.py"),
    "pipelines list": ("a pipeline of one's own", "test_pipelines_ray.py"),
    "pipelines show": ("a pipeline of one's own", "test_pipelines_ray.py"),
    "pipelines run": ("a pipeline of one's own", "test_pipelines_run.py"),
    "pipelines backfill": ("a pipeline of one's own", "test_pipelines_run.py"),
    "pipelines pause": ("a pipeline of one's own", "test_pipelines_ray.py"),
    "replay": ("row ids of another job, and a server", "test_replay.py"),
    "serve": ("goes on for ever", "test_serve_ray.py"),
}
# Words that name a job of another machine, and what is run in their place.
NOT_OURS = ("s3://", "jobs/deepseek_v32.yaml", "rows.parquet", "/data/", "my.yaml")  # test_road.py runs my.yaml


def name_command(words: list[str]) -> str:
    is_group = words[1] in ("evaluate", "pipelines") and len(words) > 2
    return " ".join(words[1:3]) if is_group else words[1]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the README's own example as spec.yaml, its input and output made local, and a finished OUT."""
    folder = tmp_path_factory.mktemp("job")
    (example,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    tree = yaml.safe_load(example)
    table = pa.table({tree["input"]["custom_id"]: ["a", "b", "c"], "topic": ["x"] * 3, "text": ["1", "2", "3"]})
    table = table.append_column(tree["prompt"]["sampling"], pa.array([None, '{"temperature": 0}', None], pa.string()))
    (folder / "in").mkdir()
    (folder / "CHECKPOINT").symlink_to(REPO / "batchgen" / "embedded")
    for name in ("nightly.yaml", "FILE..."):
        (folder / name).symlink_to(REPO / "jobs" / "nightly.yaml")
    pq.write_table(table, folder / "in" / "part.parquet")
    tree["input"]["paths"], tree["output"]["path"] = str(folder / "in"), str(folder / "OUT")
    tree["engine"] = {"kind": "simulated", "has_latency": False}
    tree["model"] = {}
    tree["cluster"] |= {"pool": "inline", "gpus_per_worker": 0.5}
    (folder / "spec.yaml").write_text(yaml.safe_dump(tree))
    assert run_here(folder, ["run", "spec.yaml"]).exit_code == 0
    return folder


def run_here(folder: Path, words: list[str]) -> Result:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return CliRunner().invoke(app, words)


def list_runnable() -> list[list[str]]:
    commands = {" ".join(words): words for words in list_commands("batchgen")}
    runnable = [words for words in commands.values() if name_command(words) not in ELSEWHERE]
    return [words for words in runnable if not any(word.startswith(NOT_OURS) for word in words)]


@pytest.mark.parametrize("words", list_runnable(), ids=" ".join)
def test_the_command_works(job: Path, words: list[str]) -> None:
    done = run_here(job, words[1:])
    if words[1] == "cancel":
        assert (done.exit_code, "nothing to cancel" in done.stderr) == (2, True), "the run has ended"
    else:
        assert done.exit_code == 0, (done.stderr, done.exception)


def test_what_cannot_run_here_is_run_elsewhere() -> None:
    shown = {name_command(words) for words in list_commands("batchgen")}
    assert ELSEWHERE.keys() <= shown, "the table names what the pages show"
    for command, (reason, file) in ELSEWHERE.items():
        assert reason
        text = (REPO / "tests" / file).read_text()
        # As the words of a call: a folder of that name would say nothing.
        words = ", ".join(f'"{word}"' for word in command.split())
        assert f"{words}, " in text or f"{words}]" in text, f"{command}: {file} does not invoke it"
    away = [words for words in list_commands("batchgen") if any(word.startswith(NOT_OURS) for word in words)]
    ours = {name_command(words) for words in list_runnable()} | ELSEWHERE.keys()
    assert {name_command(words) for words in away} <= ours, "each command also runs on a job of this machine"


def test_the_shell_completes_commands_and_options() -> None:
    env = {"PATH": "/usr/bin:/bin", "_BATCHGEN_COMPLETE": "complete_bash", "COMP_CWORD": "1"}
    command = [sys.executable, "-c", "from batchgen.cli import app; app(prog_name='batchgen')"]
    for words, wanted in (("batchgen sta", {"status", "stage"}), ("batchgen val", {"validate"})):
        done = subprocess.run(command, env={**env, "COMP_WORDS": words}, capture_output=True, text=True, timeout=60)
        assert set(done.stdout.split()) == wanted, done.stderr


# ---- Python ----------------------------------------------------------------------------------------------------------


def list_python() -> list[tuple[str, str]]:
    found = []
    for page in ("library.md", "output.md"):
        blocks = re.findall(r"```python\n(.*?)```", (REPO / "docs" / page).read_text(), re.DOTALL)
        found += [(f"{page} {number}", block) for number, block in enumerate(blocks)]
    return found


@pytest.mark.parametrize(("name", "block"), [pair for pair in list_python() if "import ray" not in pair[1]])
def test_the_snippet_runs(job: Path, tmp_path: Path, name: str, block: str) -> None:
    """Each in a process of its own, as a reader would."""
    (tmp_path / "OUT").symlink_to(job / "OUT")
    pq.write_table(pa.table({"question": ["a", "b"]}), tmp_path / "prompts.parquet")
    done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, (name, done.stderr[-2000:])


@pytest.mark.ray
def test_the_snippets_that_use_ray_run(job: Path, cluster: RayCluster) -> None:
    blocks = [block for _, block in list_python() if "import ray" in block]
    assert len(blocks) == 2
    env = {**cluster.env, "RAY_ADDRESS": cluster.address}
    # A cluster's workers have a folder of their own.
    command = [sys.executable, "-c", "\n".join(blocks).replace("OUT/", f"{job}/OUT/")]
    done = subprocess.run(command, cwd=job, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "3"


# ---- the reference ---------------------------------------------------------------------------------------------------


def test_the_reference_is_what_the_models_say() -> None:
    assert (REPO / "docs" / "spec.md").read_text() == make_reference(), "run: batchgen schema --markdown > docs/spec.md"


def test_the_reference_describes_every_field() -> None:
    named = {path for path, _ in list_sections()}
    assert {"input", "prompt", "engine, kind: tensorrt_llm", "cluster.workers", "output"} <= named
    rows = [line for line in make_reference().splitlines() if line.startswith("| `")]
    bare = [row for row in rows if re.search(r"\|\s*\|$", row) and "| `kind` |" not in row and "see below" not in row]
    assert bare == []
    assert len(rows) > 120


def test_a_fault_of_our_own_is_told_without_its_text(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever gets through to the edge: kind and place, exit code 70, a traceback with --debug only."""

    def fail(*_: object) -> None:
        raise ZeroDivisionError("SECRET prompt")

    monkeypatch.setattr("batchgen.specs.load.load_spec", fail)
    done = run_here(job, ["plan", "spec.yaml", "--json"])
    assert done.exit_code == 70
    assert "SECRET" not in done.output
    assert "ZeroDivisionError in" in done.stderr
    assert "--debug" in done.stderr
    assert json.loads(done.stdout)["state"] == "broken"
    assert "Traceback" not in done.stderr
    shown = run_here(job, ["plan", "spec.yaml", "--debug", "--json"])
    assert (shown.exit_code, json.loads(shown.stdout)["exit_code"]) == (70, 70), "seen or not, it ends in the same way"
    assert "ZeroDivisionError: " in shown.stderr
    assert "Traceback" in shown.stderr
