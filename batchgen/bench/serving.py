"""The endpoint on one shared engine, beside `batchgen run`: a batch's rows/s over a run's, how long an interactive request
takes alone and under a full batch, and many small ones at once.

Everything is whole processes over HTTP on this machine, one after another; the ratios are of one and the same call. The
engine is the embedded model, a real one. Interactive requests ask one sum each, one after another, as one person would.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.parquet import read_table

CHAT, MODEL, PORT = "/v1/chat/completions", "sums", 8199
CLUSTER = {"workers": {"min": 1, "max": 1}, "log_interval_s": 0.5}
ENGINE = {"kind": "transformers"}
SAMPLING = {"max_tokens": 60, "temperature": 0}
START_S = 120.0


def run_all(num_rows: int, num_asks: int, num_at_once: int) -> dict[str, Any]:
    """All figures, as the README gives them."""
    with tempfile.TemporaryDirectory(prefix="batchgen-serving-") as name:
        folder = Path(name)
        run_s = time_run(folder, num_rows)
        with serving(folder):
            alone = [ask(number) for number in range(num_asks)]
            batch_id = start_batch(num_rows, "in.jsonl")
            whole_s = wait_batch(batch_id)
            batch_s = read_window(find_out(folder, batch_id))
            beside, batch_id = ask_beside_batch(num_asks, num_rows)
            beside_batch_s = read_window(find_out(folder, batch_id))
            at_once = ask_at_once(num_at_once)
    return {
        "rows": num_rows,
        "run_rows_per_s": round(num_rows / run_s, 1),
        "batch_rows_per_s": round(num_rows / batch_s, 1),
        "batch_over_run": round(run_s / batch_s, 3),
        "batch_in_progress_s": round(whole_s, 1),
        "interactive_ms": describe(alone),
        "interactive_beside_bulk_ms": describe(beside),
        "p99_ratio": round(describe(beside)["p99"] / describe(alone)["p99"], 2),
        "batch_rows_per_s_beside_interactive": round(num_rows / beside_batch_s, 1),
        "at_once": dict(at_once),
    }


def describe(times_s: list[float]) -> dict[str, float]:
    ordered = sorted(times_s)
    return {f"p{q}": round(1e3 * ordered[min(len(ordered) - 1, len(ordered) * q // 100)], 1) for q in (50, 90, 99)}


def make_question(number: int) -> str:
    """40,000 different ones: a run generates what is asked twice once."""
    a, b, way = number % 100, number // 100 % 100, number // 10_000 % 4
    return (f"{a} + {b} = ?", f"What is {a} + {b}?", f"Compute {a} + {b}.", f"Add {a} and {b}.")[way]


def time_run(folder: Path, num_rows: int) -> float:
    """Seconds of a plain run's rows: start-up is no part of either figure."""
    pq.write_table(pa.table({"question": [make_question(n) for n in range(num_rows)]}), folder / "in.parquet")
    spec = {
        "input": {"paths": [str(folder / "in.parquet")]},
        "prompt": {"column": "question"},
        "engine": ENGINE,
        "sampling": SAMPLING,
        "cluster": CLUSTER,
        "output": {"path": str(folder / "out")},
    }
    (folder / "job.json").write_text(json.dumps(spec))
    command = [sys.executable, "-m", "batchgen.cli", "run", str(folder / "job.json"), "--json"]
    subprocess.run(command, check=True, capture_output=True, env=make_env(folder, "run"))
    return read_window(folder / "out")


def read_window(out: Path) -> float:
    """Seconds from the first batch's begin to the last one's end."""
    files = sorted((out / "batch_stats").rglob("*.parquet"))
    stats = pa.concat_tables([read_table(str(path)) for path in files])
    ends = [
        (at.timestamp() if hasattr(at, "timestamp") else at, wall)
        for at, wall in zip(stats["started_at"].to_pylist(), stats["wall_s"].to_pylist(), strict=True)
        if at is not None and wall is not None  # the others are batches that a run lost
    ]
    return float(max(at + wall for at, wall in ends) - min(at for at, _ in ends))


def make_env(folder: Path, name: str) -> dict[str, str]:
    """A Ray of its own, never one that happens to run here. Sockets' names must be short."""
    del folder
    return {**os.environ, "RAY_TMPDIR": tempfile.mkdtemp(prefix=f"bg{name}", dir="/tmp")}


@contextmanager
def serving(folder: Path) -> Iterator[None]:
    model = {"engine": ENGINE, "sampling": SAMPLING, "cluster": CLUSTER}
    tree = {"store": str(folder / "store"), "models": {MODEL: model}, "limits": {"requests_per_minute": 10**6}}
    (folder / "endpoint.json").write_text(json.dumps(tree))
    command = [sys.executable, "-m", "batchgen.cli", "serve", str(folder / "endpoint.json"), "--no-keys"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*command, "--port", str(PORT)], stdout=log, stderr=log, env=make_env(folder, "srv"))
    try:
        give_up_at = time.monotonic() + START_S
        while not is_up():
            if process.poll() is not None or time.monotonic() > give_up_at:
                raise RuntimeError((folder / "log").read_text()[-2000:])
            time.sleep(0.5)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(90)


def is_up() -> bool:
    try:
        ask(1)
    except OSError:
        return False
    return True


# ---- over HTTP -------------------------------------------------------------------------------------------------------


def call(method: str, path: str, body: bytes | None = None, kind: str = "application/json") -> Any:
    url = f"http://127.0.0.1:{PORT}{path}"
    request = urllib.request.Request(url, data=body, method=method, headers={"content-type": kind})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.loads(answer.read())


def make_body(number: int) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": make_question(number)}]}


def ask(number: int) -> float:
    """Seconds of one interactive request."""
    began = time.monotonic()
    call("POST", CHAT, json.dumps(make_body(number)).encode())
    return time.monotonic() - began


def start_batch(num_rows: int, name: str) -> str:
    """Its id."""
    lines = [{"custom_id": f"r{n}", "method": "POST", "url": CHAT, "body": make_body(n)} for n in range(num_rows)]
    content = "".join(json.dumps(line) + "\n" for line in lines)
    mark = "batchgen-figure"
    form = f'--{mark}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--{mark}\r\n'
    form += f'Content-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n{content}\r\n--{mark}--\r\n'
    file = call("POST", "/v1/files", form.encode(), f"multipart/form-data; boundary={mark}")
    create = {"input_file_id": file["id"], "endpoint": CHAT, "completion_window": "24h"}
    return str(call("POST", "/v1/batches", json.dumps(create).encode())["id"])


def read_batch(batch_id: str) -> dict[str, Any]:
    found: dict[str, Any] = call("GET", f"/v1/batches/{batch_id}")
    return found


def find_out(folder: Path, batch_id: str) -> Path:
    """The output folder of its job."""
    (out,) = (folder / "store").glob(f"t/*/jobs/{batch_id}")
    return out


def wait_batch(batch_id: str) -> float:
    """Seconds from in_progress to finalizing by our own watch, which looks once a second: each look costs 15 ms of a core's
    time, and a plain run has nobody who looks."""
    began = None
    while (status := read_batch(batch_id)["status"]) in ("validating", "in_progress"):
        if began is None and status == "in_progress":
            began = time.monotonic()
        time.sleep(1.0 if status == "in_progress" else 0.2)
    if status not in ("finalizing", "completed"):
        raise RuntimeError(f"the batch ended as {status}")
    return time.monotonic() - (began or time.monotonic())


def ask_beside_batch(num_asks: int, num_rows: int) -> tuple[list[float], str]:
    """(seconds of requests while the batch was in progress, the batch's id)."""
    batch_id = start_batch(num_rows, "beside.jsonl")
    times: list[float] = []
    with ThreadPoolExecutor(1) as pool:
        while read_batch(batch_id)["status"] == "validating":
            time.sleep(0.2)
        waiting = pool.submit(wait_batch, batch_id)
        time.sleep(2.0)  # the window fills
        while not waiting.done() and len(times) < num_asks:
            times.append(ask(len(times)))
        waiting.result()
        return times, batch_id


def ask_at_once(num: int) -> Counter[str]:
    """How so many requests ended that were all there at once."""

    def end(number: int) -> str:
        try:
            ask(number)
        except urllib.error.HTTPError as error:
            return str(error.code)
        return "200"

    with ThreadPoolExecutor(num) as pool:
        return Counter(pool.map(end, range(num)))
