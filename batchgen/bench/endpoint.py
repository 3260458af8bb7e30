"""How long the endpoint takes to accept a large batch, and with how much memory: the whole process, looked at from outside.

A plain endpoint (`serve.plain`: ingress and conductor in one process) on a local folder is sent one JSONL file and told to
make a batch of it. Accepted is when the batch is in progress: every line read, checked and written as Parquet. Then its
rows are run, and the same rows again by `batchgen run`, with the same simulated engine, each time from first to last row
committed. Linux only (/proc).
"""

import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ENGINE = {
    "kind": "simulated",
    "slots": 256,
    "max_inflight": 512,
    "mean_tokens": 100,
    "decode_tokens_per_s": 200,
    "prefill_tokens_per_s": 1_000_000,
}
CLUSTER = {"pool": "inline"}
BOUNDARY = "batchgen-bench"
WORDS = "a prompt of ordinary words that says at some length what is wanted, and then says it again. "


@dataclass(frozen=True, slots=True)
class Figures:
    """Seconds and MiB. `peak_idle_mib`: before anything was sent; the others the peak until then."""

    num_requests: int
    file_mib: float
    upload_s: float
    accept_s: float
    peak_idle_mib: float
    peak_upload_mib: float
    peak_accept_mib: float
    batch_s: float | None = None
    peak_batch_mib: float | None = None
    run_s: float | None = None


def make_file(num_requests: int, body_bytes: int) -> bytes:
    text = (WORDS * (body_bytes // len(WORDS) + 1))[:body_bytes]
    lines = []
    for number in range(num_requests):
        messages = [{"role": "user", "content": f"{number}: {text}"}]
        body = {"model": "m", "messages": messages, "max_tokens": 200, "temperature": 0.5}
        line = {"custom_id": f"r{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
        lines.append(json.dumps(line))
    return "\n".join(lines).encode()


class Client:
    """Just enough of one: no package that isn't the product's own."""

    def __init__(self, port: int) -> None:
        self._port = port

    def send(self, method: str, path: str, body: bytes | None = None, kind: str = "application/json") -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=600)
        try:
            connection.request(method, path, body, {"Content-Type": kind} if body else {})
            reply = connection.getresponse()
            value = json.loads(reply.read())
        finally:
            connection.close()
        if reply.status != 200:
            raise SystemExit(f"{method} {path}: {value}")
        return value

    def upload(self, content: bytes) -> str:
        head = 'Content-Disposition: form-data; name="{}"{}\r\n\r\n'
        parts = [
            head.format("purpose", "").encode() + b"batch",
            head.format("file", '; filename="a"').encode() + content,
        ]
        body = b"".join(f"--{BOUNDARY}\r\n".encode() + part + b"\r\n" for part in parts)
        kind = f"multipart/form-data; boundary={BOUNDARY}"
        return str(self.send("POST", "/v1/files", body + f"--{BOUNDARY}--\r\n".encode(), kind)["id"])

    def wait(self, batch_id: str, states: set[str]) -> Any:
        while (batch := self.send("GET", f"/v1/batches/{batch_id}"))["status"] not in states:
            if batch["status"] in ("failed", "expired"):
                raise SystemExit(f"the batch is {batch['status']}: {batch['errors']}")
            time.sleep(0.05)
        return batch


def read_peak_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024, 1)


def measure(num_requests: int, body_bytes: int, *, is_run: bool) -> Figures:
    """One endpoint, one batch."""
    content = make_file(num_requests, body_bytes)
    with tempfile.TemporaryDirectory() as name, socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = int(sock.getsockname()[1])
        sock.close()
        folder = Path(name)
        model = {"engine": ENGINE, "cluster": CLUSTER}
        (folder / "endpoint.json").write_text(json.dumps({"store": str(folder / "store"), "models": {"m": model}}))
        command = [sys.executable, "-m", "batchgen.serve.plain", str(folder / "endpoint.json"), "--port", str(port)]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen([*command, "--no-keys"], stdout=log, stderr=log)
        try:
            return _measure(Client(port), process.pid, content, num_requests, folder, is_run=is_run)
        finally:
            process.terminate()
            process.wait()


def _measure(client: Client, pid: int, content: bytes, num_requests: int, folder: Path, *, is_run: bool) -> Figures:
    _wait_up(client)
    idle = read_peak_mib(pid)
    started = time.monotonic()
    file_id = client.upload(content)
    upload_s, upload_peak = time.monotonic() - started, read_peak_mib(pid)
    asked = {"input_file_id": file_id, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    started = time.monotonic()
    batch_id = client.send("POST", "/v1/batches", json.dumps(asked).encode())["id"]
    client.wait(batch_id, {"in_progress", "finalizing", "completed"})
    accept_s, accept_peak = time.monotonic() - started, read_peak_mib(pid)
    figures = Figures(
        num_requests,
        round(len(content) / 2**20, 1),
        round(upload_s, 2),
        round(accept_s, 2),
        idle,
        upload_peak,
        accept_peak,
    )
    if not is_run:
        client.send("POST", f"/v1/batches/{batch_id}/cancel")
        client.wait(batch_id, {"cancelled"})
        return figures
    started = time.monotonic()
    client.wait(batch_id, {"finalizing", "completed"})
    batch_s, batch_peak = time.monotonic() - started, read_peak_mib(pid)
    run_s = _run_again(folder, batch_id)
    return Figures(**{**asdict(figures), "batch_s": round(batch_s, 2), "peak_batch_mib": batch_peak, "run_s": run_s})


def _wait_up(client: Client) -> None:
    for _ in range(600):
        try:
            client.send("GET", "/ready")
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise SystemExit("the endpoint did not come up")


def _run_again(folder: Path, batch_id: str) -> float:
    """The batch's own spec, by the command line, into another folder."""
    saved = json.loads((folder / "store" / "t" / "local" / "jobs" / batch_id / "_batchgen" / "spec.json").read_text())
    spec = {**saved["spec"], "output": {**saved["spec"]["output"], "path": str(folder / "again")}}
    (folder / "again.json").write_text(json.dumps(spec))
    command = [sys.executable, "-m", "batchgen.cli", "run", str(folder / "again.json"), "--json"]
    started = time.monotonic()
    subprocess.run(command, check=True, capture_output=True, env={**os.environ})
    return round(time.monotonic() - started, 2)
