"""The pages' commands for Kubernetes, run by the real `kubectl` against a stand-in for its API server. It knows
KubeRay's kinds, holds what is sent against the fields that they have, and keeps it."""

import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import jsonschema
import pytest
import yaml
from jsonschema.exceptions import best_match
from test_commands import list_blocks

REPO = Path(__file__).parents[1]
VALIDATOR = jsonschema.Draft202012Validator(yaml.safe_load((REPO / "tests" / "kuberay_schema.yaml").read_text()))
KINDS = {"rayjobs": "RayJob", "rayclusters": "RayCluster", "rayservices": "RayService"}
VERBS = ["create", "get", "list", "patch", "watch"]
PREFIX = "/apis/ray.io/v1"


def make_discovery() -> dict[str, Any]:
    """What kubectl asks before it sends anything."""
    version = {"groupVersion": "ray.io/v1", "version": "v1"}
    rays = [{"name": name, "namespaced": True, "kind": kind, "verbs": VERBS} for name, kind in KINDS.items()]
    singular = [{**ray, "singularName": ray["name"][:-1]} for ray in rays]
    checked = {"parameters": [{"name": "fieldValidation", "in": "query"}]}
    paths = {
        f"{PREFIX}/namespaces/{{namespace}}/{name}/{{name}}": {
            "patch": {**checked, "x-kubernetes-group-version-kind": {"group": "ray.io", "version": "v1", "kind": kind}}
        }
        for name, kind in KINDS.items()
    }
    return {
        "/version": {"major": "1", "minor": "30", "gitVersion": "v1.30.0"},
        "/api": {"kind": "APIVersions", "versions": ["v1"]},
        "/api/v1": {
            "kind": "APIResourceList",
            "groupVersion": "v1",
            "resources": [
                {"name": "secrets", "singularName": "", "namespaced": True, "kind": "Secret", "verbs": VERBS}
            ],
        },
        "/apis": {
            "kind": "APIGroupList",
            "apiVersion": "v1",
            "groups": [{"name": "ray.io", "versions": [version], "preferredVersion": version}],
        },
        PREFIX: {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": "ray.io/v1", "resources": singular},
        "/openapi/v3": {"paths": {PREFIX[1:]: {"serverRelativeURL": f"/openapi/v3{PREFIX}"}}},
        f"/openapi/v3{PREFIX}": {"openapi": "3.0.0", "info": {"title": "ray", "version": "1"}, "paths": paths},
    }


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    known: ClassVar = make_discovery()
    kept: ClassVar[dict[str, Any]] = {}

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if "watch=true" in url.query:
            found = next(value for value in self.kept.values() if value["kind"] == "RayJob")
            return self._answer(200, {"type": "MODIFIED", "object": found})
        found = self.known.get(url.path) or self.kept.get(url.path)
        return self._answer(200, found) if found else self._refuse(404, "NotFound", url.path)

    def do_POST(self) -> None:
        sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        bare = {
            **sent,
            "metadata": {"name": sent["metadata"]["name"]},
        }  # kubectl adds the namespace, and what it applied
        is_ours = sent["apiVersion"].startswith("ray.io/")
        wrong = best_match(VALIDATOR.iter_errors(bare)) if is_ours else None
        if wrong is not None:
            return self._refuse(400, "BadRequest", f"strict decoding error: {wrong.message[:200]}")
        sent["metadata"] |= {"namespace": "default", "uid": "u", "resourceVersion": "1"}
        self.kept[f"{urlsplit(self.path).path}/{sent['metadata']['name']}"] = sent
        return self._answer(201, sent)

    def _refuse(self, code: int, reason: str, message: str) -> None:
        told = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "code": code}
        self._answer(code, {**told, "message": message})

    def _answer(self, code: int, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def env(tmp_path: Path) -> Iterator[dict[str, str]]:
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl on this machine: Debian has it in kubernetes-client")
    Handler.kept.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    made = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "c",
        "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "users": [{"name": "u", "user": {}}],
    }
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(made))
    own = {"KUBECONFIG": str(tmp_path / "kubeconfig"), "HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
    try:
        yield os.environ | own | {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret"}
    finally:
        server.shutdown()
        server.server_close()


def paste(script: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-e", "-c", script], cwd=REPO, env=env, capture_output=True, text=True, timeout=60)


def list_lines() -> list[str]:
    """kubectl's calls of all pages, each with the lines that it goes on for."""
    blocks = [block.replace("\\\n", " ") for _, block in list_blocks()]
    return [line for block in blocks for line in block.splitlines() if re.match(r"\s*kubectl ", line)]


def test_every_line_of_the_pages_is_carried_out(env: dict[str, str]) -> None:
    lines = list_lines()
    done = paste("\n".join(lines), env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {name.rpartition("/")[2] for name in Handler.kept} >= {"batchgen-s3", "batchgen"}
    assert sorted({value["kind"] for value in Handler.kept.values()}) == [
        "RayCluster",
        "RayJob",
        "RayService",
        "Secret",
    ]
    assert len(lines) == 5


def test_a_field_that_kuberay_does_not_have_is_refused(env: dict[str, str], tmp_path: Path) -> None:
    text = (REPO / "jobs" / "kuberay" / "rayjob.yaml").read_text()
    assert text.count("backoffLimit") == 1
    (tmp_path / "wrong.yaml").write_text(text.replace("backoffLimit", "backofLimit"))
    done = paste(f"kubectl create --filename {tmp_path / 'wrong.yaml'}", env)
    assert done.returncode != 0
    assert "backofLimit" in done.stderr
    assert Handler.kept == {}
