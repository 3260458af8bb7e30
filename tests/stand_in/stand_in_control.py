"""How a test talks to the stand-in: its environment and its control file."""

import json
import os
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
# The other packages of a node with eight B200, for whoever looks at it before an engine starts.
NODE = FOLDER / "node"


def make_env(tmp_path: Path, num_ranks: int = 2) -> dict[str, str]:
    """What the engine's process needs beside its usual environment. Makes the GPU folder and an empty control file."""
    gpu_dir = tmp_path / "gpus"
    gpu_dir.mkdir(exist_ok=True)
    write_control(tmp_path)
    return {
        "PYTHONPATH": os.pathsep.join(
            [str(FOLDER), str(NODE), str(FOLDER.parent.parent), os.environ.get("PYTHONPATH", "")]
        ),
        "STAND_IN_GPU_DIR": str(gpu_dir),
        "STAND_IN_CONTROL": str(tmp_path / "control.json"),
        "STAND_IN_CALLS": str(tmp_path / "calls.jsonl"),
        "STAND_IN_NUM_RANKS": str(num_ranks),
    }


def write_control(tmp_path: Path, **control: Any) -> None:
    """Replaces the whole control file, atomically."""
    draft = tmp_path / "control.json.new"
    draft.write_text(json.dumps(control))
    draft.replace(tmp_path / "control.json")


def read_calls(tmp_path: Path) -> list[dict[str, Any]]:
    """Every LLM made and every request taken, in order."""
    path = tmp_path / "calls.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
