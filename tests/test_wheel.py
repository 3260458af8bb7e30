"""What is built is what is here: a wheel by `python -m build`, in an environment of its own, without this checkout.

The environment has the packages of this one, by a path: what is tried is ours, and it takes seconds. That the
dependencies' floors can be installed is tried by hand (CONTRIBUTING.md).
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from email import message_from_bytes
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchgen import __version__

REPO = Path(__file__).parents[1]
BUILT_FROM = ["pyproject.toml", "README.md", "LICENSE"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """From a copy: a build writes beside its sources. Through the source distribution, so that this is whole, too."""
    copy = tmp_path_factory.mktemp("source")
    shutil.copytree(REPO / "batchgen", copy / "batchgen", ignore=shutil.ignore_patterns("__pycache__"))
    for name in BUILT_FROM:
        shutil.copy(REPO / name, copy / name)
    command = [sys.executable, "-m", "build", "--no-isolation", str(copy)]  # the registry need not be there
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = (copy / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def home(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment with the wheel in it."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], timeout=60, check=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)], timeout=60, check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    # A plain path: an editable batchgen's own .pth in there is not followed.
    (packages / "others.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder / "bin"


def call(folder: Path, *command: str | Path) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_the_wheel_holds_every_file_of_the_package_and_no_other(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = (path.relative_to(REPO) for path in (REPO / "batchgen").rglob("*") if path.is_file())
    assert names == {str(path) for path in sources if "__pycache__" not in path.parts}
    needed = {"py.typed", "embedded/model.safetensors", "report/page.css", "serve/page/index.html"}
    needed |= {"grafana/dashboard.json", "grafana/alerts.yaml", "report/page.html.j2"}
    assert {f"batchgen/{name}" for name in needed} <= names


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    facts = {name.partition(".dist-info/")[2]: archive.read(name) for name in archive.namelist() if "dist-info" in name}
    about = message_from_bytes(facts["METADATA"])
    assert (about["Name"], about["Version"]) == ("batchgen", __version__)
    assert (about["License-Expression"], about["Requires-Python"]) == ("MIT", ">=3.11")
    assert "licenses/LICENSE" in facts
    assert b"batchgen = batchgen.cli:main" in facts["entry_points.txt"]
    assert wheel.name == f"batchgen-{__version__}-py3-none-any.whl"


def test_an_installed_batchgen_runs_a_job_and_shows_it(home: Path, tmp_path: Path) -> None:
    assert call(tmp_path, home / "batchgen", "--version").stdout == f"{__version__}\n"
    where = call(tmp_path, home / "python", "-c", "import batchgen; print(batchgen.__file__)").stdout
    assert where.startswith(str(home.parent)), "not this checkout's"
    pq.write_table(pa.table({"q": [f"question {row}" for row in range(20)]}), tmp_path / "in.parquet")
    spec = {
        "input": {"paths": "in.parquet"},
        "prompt": {"column": "q"},
        "engine": {"kind": "simulated", "has_latency": False},
        "output": {"path": "out"},
        "cluster": {"pool": "inline"},
    }
    (tmp_path / "spec.yaml").write_text(json.dumps(spec))
    done = call(tmp_path, home / "batchgen", "run", "spec.yaml", "--json")
    assert json.loads(done.stdout.splitlines()[-1])["rows"]["ok"] == 20
    assert pq.read_table(tmp_path / "out" / "data").num_rows == 20
    call(tmp_path, home / "batchgen", "report", "out", "--html", "page.html")
    assert "<style>:root" in (tmp_path / "page.html").read_text()
    assert json.loads(call(tmp_path, home / "batchgen", "schema").stdout)["title"] == "JobSpec"


def test_an_installed_batchgen_has_its_model_and_pages(home: Path, tmp_path: Path) -> None:
    code = (
        "from importlib.resources import files\n"
        "import batchgen, batchgen.serve.routes_page as pages\n"
        "print(batchgen.generate(['7 + 5 ='])[0].text)\n"
        "print(len(pages.make_handler('index.html', 'text/html')().body) > 100)\n"
        "print((files('batchgen') / 'grafana' / 'alerts.yaml').is_file())"
    )
    assert call(tmp_path, home / "python", "-c", code).stdout.split() == ["12", "True", "True"]


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("batchgen re", {"report", "replay"}),
        ("batchgen compact --t", {"--target-mb"}),
        ("batchgen pipelines ba", {"backfill"}),
    ],
)
def test_bash_completes_commands_and_options(home: Path, tmp_path: Path, line: str, offered: set[str]) -> None:
    """The function that `--show-completion` prints and `--install-completion` installs, in a real bash."""
    script = (
        'PATH="$1:$PATH"; export _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION=1\n'
        'eval "$(batchgen --show-completion bash)"\n'
        'read -ra COMP_WORDS <<< "$2"; COMP_CWORD=$((${#COMP_WORDS[@]} - 1))\n'
        '_batchgen_completion batchgen; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    assert set(call(tmp_path, "bash", "-c", script, "bash", home, line).stdout.split()) == offered
