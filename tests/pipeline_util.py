"""Small pipelines that really run: a simulated engine, inline workers."""

import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

# `batchgen`, but that a scheduler looks every half second and not every five.
_EAGER = """import sys
from batchgen.pipelines.scheduler import Scheduler
Scheduler.run.__defaults__ = (0.5,)
from batchgen.cli import main
sys.exit(main())"""


def make_eager(*args: str) -> list[str]:
    """The command line of a process."""
    return [sys.executable, "-c", _EAGER, *args]


def write_prompts(path: Path, num_rows: int = 20) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = {"id": [f"q{n}" for n in range(num_rows)], "q": [f"say {n}" for n in range(num_rows)]}
    table["score"] = list(range(num_rows))
    pq.write_table(pa.table(table), path)


def make_job(root: str, name: str, paths: str, **changes: Any) -> dict[str, Any]:
    job: dict[str, Any] = {
        "input": {"paths": paths, "custom_id": "id", "passthrough": ["score"]},
        "prompt": {"column": "q"},
        "engine": {"kind": "simulated", "mean_tokens": 5},
        "output": {"path": f"{root}/{name}/{{{{ logical_time }}}}"},
        "cluster": {"pool": "inline"},
    }
    return {**job, **changes}


def make_pipeline(root: str, **changes: Any) -> dict[str, Any]:
    """Generate, then judge what is odd. Every minute, from 2026 on."""
    judge = make_job(root, "judged", "{{ input }}")
    judge["input"] = {"paths": "{{ input }}", "custom_id": "custom_id", "passthrough": ["score"]}
    judge["prompt"] = {"template": "Good? {text}"}
    tree = {
        "name": "nightly",
        "state": f"{root}/state",
        "schedule": {"cron": "0 2 * * *", "timezone": "Europe/Berlin"},
        "retries": {"max": 1, "delay": "0s"},
        "stages": [
            {"name": "generate", "job": make_job(root, "made", f"{root}/in")},
            {
                "name": "judge",
                "input": {"stage": "generate", "filter": "status = 'ok' AND score % 2 = 1"},
                "job": judge,
            },
        ],
        "publish": f"{root}/published",
    }
    return {**tree, **changes}


def write_pipeline(path: Path, tree: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return str(path)
