"""The endpoint in a process of its own, as a user starts it, and the real clients that talk to it."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import yaml

from batchgen.serve.keys import make_key
from batchgen.serve.records import BatchRecord

TERMINAL = {"completed", "failed", "expired", "cancelled"}
CHAT = "/v1/chat/completions"
FAST = {"kind": "simulated", "has_latency": False, "mean_tokens": 12}
# Half a second an answer, eight a second.
SLOW = {"kind": "simulated", "slots": 4, "max_inflight": 8, "sigma": 0, "mean_tokens": 10, "decode_tokens_per_s": 20}
CLUSTER = {"pool": "inline", "drain_s": 1, "log_interval_s": 0.2}


def make_endpoint_tree(store: str, **fields: Any) -> dict[str, Any]:
    """An endpoint with a model that answers at once and one that takes its time."""
    common = {"cluster": CLUSTER, "journal_interval_s": 0.3, "rows_per_shard": 50}
    models = {"fast": {"engine": FAST, **common}, "slow": {"engine": SLOW, **common}}
    limits = {"requests_per_minute": 1_000_000, "max_running": 3}
    tree = {"store": store, "models": models, "limits": limits}
    return {**tree, **fields, "limits": {**limits, **fields.get("limits", {})}}


def find_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@dataclass
class Server:
    """One endpoint on one port; may be killed and started again."""

    folder: Path
    tree: dict[str, Any]
    env: dict[str, str] = field(default_factory=dict)
    tenants: Sequence[str] = ("acme", "globex")
    has_keys: bool = True
    process: subprocess.Popen[bytes] | None = None
    _clients: list[openai.OpenAI] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.port, self.url = find_port(), ""
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.spec, self.key_file = self.folder / "endpoint.yaml", self.folder / "keys"
        self.spec.write_text(yaml.safe_dump(self.tree))
        made = {tenant: make_key(tenant) for tenant in self.tenants}
        self.keys = {tenant: key for tenant, (key, _) in made.items()}
        self.key_file.write_text("".join(f"{line}\n" for _, line in made.values()))

    def start(self) -> None:
        door = ["--keys", str(self.key_file)] if self.has_keys else ["--no-keys"]
        command = [sys.executable, "-m", "batchgen.serve.plain", str(self.spec), "--port", str(self.port), *door]
        with (self.folder / "log").open("ab") as log:
            env = {**os.environ, **self.env}
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=env)
        self.wait_ready()

    def wait_ready(self, timeout_s: float = 120) -> None:
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            assert self.process is not None
            assert self.process.poll() is None, (self.folder / "log").read_text()[-2000:]
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url[:-3]}/ready", timeout=5).status_code == 200:
                    return
            time.sleep(0.05)
        raise TimeoutError("the endpoint did not come up")

    def kill(self) -> None:
        """SIGKILL: it has no chance to save anything."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        """And its clients: those that are only dropped leave sockets to whichever test the collector comes by in."""
        while self._clients:
            self._clients.pop().close()
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def client(self, tenant: str = "acme", **fields: Any) -> openai.OpenAI:
        """Closed with the endpoint."""
        known = {"base_url": self.url, "max_retries": 0, "timeout": 60}
        self._clients.append(made := openai.OpenAI(api_key=self.keys[tenant], **{**known, **fields}))
        return made

    def async_client(self, tenant: str = "acme") -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=self.url, api_key=self.keys[tenant], max_retries=0, timeout=60)

    def read_peak_rss(self) -> int:
        """Bytes."""
        assert self.process is not None
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


@contextlib.contextmanager
def running(server: Server) -> Iterator[Server]:
    server.start()
    try:
        yield server
    finally:
        server.stop()


def make_line(custom_id: str, *, model: str = "fast", url: str = CHAT, **body: Any) -> dict[str, Any]:
    prompt = {"messages": [{"role": "user", "content": f"say {custom_id}"}]} if url == CHAT else {"prompt": custom_id}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": model, **prompt, **body}}


def make_jsonl(lines: Sequence[Any]) -> bytes:
    return b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)


def upload(client: openai.OpenAI, content: bytes, **fields: Any) -> openai.types.FileObject:
    return client.files.create(file=("in.jsonl", content), purpose="batch", **fields)


def create(client: openai.OpenAI, lines: Sequence[Any] | bytes, **fields: Any) -> openai.types.Batch:
    content = lines if isinstance(lines, bytes) else make_jsonl(lines)
    known = {"endpoint": CHAT, "completion_window": "24h", "input_file_id": upload(client, content).id}
    return client.batches.create(**{**known, **fields})


def wait_for(client: openai.OpenAI, batch_id: str, states: set[str], timeout_s: float = 180) -> openai.types.Batch:
    """Until it is in one of these states; on the way counts never go back and always fit."""
    end, last = time.monotonic() + timeout_s, (0, 0)
    while time.monotonic() < end:
        batch = client.batches.retrieve(batch_id)
        counts = batch.request_counts
        assert counts is not None
        if batch.status != "failed":
            assert (counts.completed, counts.failed) >= last or batch.status in TERMINAL
            last = (counts.completed, counts.failed)
        if batch.status in states:
            return batch
        assert batch.status not in TERMINAL, batch
        time.sleep(0.05)
    raise TimeoutError(f"{batch_id} is {batch.status}")


def wait_over(client: openai.OpenAI, batch_id: str, timeout_s: float = 180) -> openai.types.Batch:
    """Until it has ended: then every request is accounted for."""
    batch = wait_for(client, batch_id, TERMINAL, timeout_s)
    counts = batch.request_counts
    assert counts is not None
    assert counts.total == counts.completed + counts.failed
    return batch


def read_lines(client: openai.OpenAI, file_id: str | None) -> dict[str, dict[str, Any]]:
    """Lines of a result file by custom_id, of which there is one each."""
    if file_id is None:
        return {}
    lines = [json.loads(line) for line in client.files.content(file_id).text.splitlines()]
    found = {line["custom_id"]: line for line in lines}
    assert len(found) == len(lines)
    return found


def check_left_over(client: openai.OpenAI, done: openai.types.Batch, code: str) -> None:
    answers, errors = read_lines(client, done.output_file_id), read_lines(client, done.error_file_id)
    assert done.request_counts is not None
    assert (len(answers), len(errors)) == (done.request_counts.completed, done.request_counts.failed)
    assert not answers.keys() & errors.keys()
    assert {line["error"]["code"] for line in errors.values()} == {code}
    assert all(line["response"] is None for line in errors.values())


def end_window(record: BatchRecord) -> BatchRecord:
    return record.model_copy(update={"batch": record.batch.model_copy(update={"expires_at": int(time.time())})})


class Losing:
    """A TCP proxy that, once, passes a request on and cuts the connection when the reply comes."""

    def __init__(self, target: int) -> None:
        self._target, self.loses_next = target, False
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._server.getsockname()[1])

    def __enter__(self) -> "Losing":
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed: the end
            while True:
                inner, _ = self._server.accept()
                threading.Thread(target=self._serve, args=(inner,), daemon=True).start()

    def _serve(self, inner: socket.socket) -> None:
        outer = socket.create_connection(("127.0.0.1", self._target))
        threading.Thread(target=self._pump, args=(inner, outer), daemon=True).start()
        with inner, outer, contextlib.suppress(OSError):
            while (data := outer.recv(65536)) and not self.loses_next:
                inner.sendall(data)
            if data:
                self.loses_next = False
            for side in (inner, outer):  # closing alone would not wake the other thread
                side.shutdown(socket.SHUT_RDWR)

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
