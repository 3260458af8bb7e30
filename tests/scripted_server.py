"""An OpenAI-compatible server in a thread that answers each prompt as a test says it should, and counts."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class ScriptedServer(ThreadingHTTPServer):
    """`answer`: prompt and how often it was asked before -> text; a text that begins with '…' counts as cut off. Raises
    ValueError for a prompt to refuse."""

    daemon_threads = True

    def __init__(self, answer: Callable[[str, int], str]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer = answer
        self.prompts: list[str] = []
        self.lock = threading.Lock()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ScriptedServer

    def do_GET(self) -> None:
        self.reply(200, {"data": [{"id": "scripted", "max_model_len": 100_000}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][-1]["content"]
        with self.server.lock:
            number = self.server.prompts.count(prompt)
            self.server.prompts.append(prompt)
        try:
            text = self.server.answer(prompt, number)
        except ValueError:
            return self.reply(400, {"error": {"message": "no", "code": "refused"}})
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text.removeprefix("…")},
            "finish_reason": "length" if text.startswith("…") else "stop",
        }
        usage = {"prompt_tokens": len(prompt.split()), "completion_tokens": len(text.split())}
        return self.reply(200, {"id": "x", "model": "scripted", "choices": [choice], "usage": usage})

    def reply(self, status: int, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None: ...


@contextlib.contextmanager
def run_scripted_server(answer: Callable[[str, int], str]) -> Iterator[ScriptedServer]:
    with ScriptedServer(answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
