"""`serve deploy jobs/serve.yaml` on a running cluster: two models in one endpoint, engines that come as they are needed."""

import json
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from ray_cluster import MARK, RAY, REPO, RayCluster, find_port, list_marked, run_ray_cluster

from batchgen.serve.keys import make_key

pytestmark = [pytest.mark.ray, pytest.mark.soak, pytest.mark.timeout(400)]

CHAT = "/v1/chat/completions"
MIB = 2**20
NUM_ROWS = 1200
# An answer takes a second, eight at a time: one engine alone would need two and a half minutes.
BULK = {"kind": "simulated", "slots": 8, "max_inflight": 12, "sigma": 0, "mean_tokens": 20, "decode_tokens_per_s": 20}
CLUSTER = {"drain_s": 1, "cpus_per_worker": 0.5}


def make_tree(folder: Path) -> dict[str, Any]:
    bulk = {"engine": BULK, "cluster": {**CLUSTER, "workers": {"min": 1, "max": 3}}, "rows_per_shard": 30}
    sums = {"model": {"path": "embedded"}, "engine": {"kind": "transformers"}, "cluster": CLUSTER}
    models = {"bulk": {**bulk, "journal_interval_s": 1}, "sums": sums}
    return {
        "store": str(folder / "store"),
        "models": models,
        "tenants": {"acme": {"inputs": [f"file://{folder}/acme"]}},
    }


class Deployed:
    """The cluster, and the application on it."""

    def __init__(self, cluster: RayCluster, folder: Path) -> None:
        self._cluster, self.folder, self._port = cluster, folder, find_port()
        self.key, line = make_key("acme")
        (folder / "keys").write_text(line)
        (folder / "endpoint.yaml").write_text(yaml.safe_dump(make_tree(folder)))
        tree = yaml.safe_load((REPO / "jobs" / "serve.yaml").read_text())
        tree["http_options"]["port"] = self._port
        tree["applications"][0]["args"] |= {"spec": str(folder / "endpoint.yaml"), "keys": str(folder / "keys")}
        (folder / "serve.yaml").write_text(yaml.safe_dump(tree))
        self._call("deploy", str(folder / "serve.yaml"))
        self.url = f"http://127.0.0.1:{self._port}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=8)

    def _call(self, *args: str) -> str:
        command = [str(Path(RAY).parent / "serve"), *args, "--address", self._cluster.dashboard]
        done = subprocess.run(command, env=self._cluster.env, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    def wait_up(self) -> None:
        give_up_at = time.monotonic() + 120
        while True:
            status = yaml.safe_load(self._call("status"))["applications"].get("batchgen", {})
            assert status.get("status") != "DEPLOY_FAILED", status
            if status.get("status") == "RUNNING" and all(self.count_engines().get(model) for model in ("bulk", "sums")):
                return
            assert time.monotonic() < give_up_at, status
            time.sleep(1)

    def count_engines(self) -> dict[str, int]:
        try:
            text = httpx.get(f"{self.url}/metrics", headers={"Authorization": f"Bearer {self.key}"}).text
        except httpx.TransportError:
            return {}
        lines = [line for line in text.splitlines() if line.startswith("batchgen_engines_up{")]
        return {line.split('"')[1]: int(line.split()[-1]) for line in lines}

    def ask(self, model: str, text: str) -> str:
        messages: Any = [{"role": "user", "content": text}]
        made = self.client.chat.completions.create(model=model, messages=messages, temperature=0)
        return made.choices[0].message.content or ""

    @contextmanager
    def watching_memory(self) -> Iterator[dict[str, dict[str, int]]]:
        """MB that the proxy and the ingress have at first, and at most meanwhile: their own, their programs' files, and
        pages of Ray's object store, which are the machine's and not theirs."""
        parts = {"Ingress": "ray::ServeReplica:batchgen:Ingress", "Proxy": "ray::ProxyActor"}
        pids = {part: list_marked(self._cluster.env[MARK], name)[0] for part, name in parts.items()}
        seen = {part: {f"{kind}0": mb for kind, mb in read_memory(pid).items()} for part, pid in pids.items()}
        is_over = threading.Event()

        def look() -> None:
            while not is_over.wait(0.02):
                for part, pid in pids.items():
                    for kind, mb in read_memory(pid).items():
                        seen[part][kind] = max(seen[part].get(kind, 0), mb)

        looking = threading.Thread(target=look)
        looking.start()
        try:
            yield seen
        finally:
            is_over.set()
            looking.join()

    def create(self, model: str, num_rows: int, text: str = "", part_size: int | None = None) -> str:
        """A batch's id. `part_size`: its file goes in parts."""

        def make(row: int) -> str:
            messages = [{"role": "user", "content": f"{text}{row % 50} + 7 = ?"}]
            body = {"model": model, "temperature": 0, "messages": messages}
            return json.dumps({"custom_id": f"r{row}", "method": "POST", "url": CHAT, "body": body})

        content = "".join(f"{make(row)}\n" for row in range(num_rows)).encode()
        batch = self.client.batches.create(
            input_file_id=self.upload(content, part_size), endpoint=CHAT, completion_window="24h"
        )
        return batch.id

    def upload(self, content: bytes, part_size: int | None) -> str:
        """The file's id."""
        if part_size is None:
            return self.client.files.create(file=("in.jsonl", content), purpose="batch").id
        kind: Any = {"mime_type": "application/jsonl", "purpose": "batch", "bytes": len(content)}
        done = self.client.uploads.upload_file_chunked(file=content, filename="a", part_size=part_size, **kind)
        assert done.file is not None
        return done.file.id

    def delete(self) -> None:
        self._call("shutdown", "--yes")


def read_memory(pid: int) -> dict[str, int]:
    lines = [line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
    kinds = {"RssAnon:": "own", "RssFile:": "files", "RssShmem:": "store"}
    return {kinds[words[0]]: int(words[1]) // 1000 for words in lines if words and words[0] in kinds}


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    folder = tmp_path_factory.mktemp("deploy")
    with run_ray_cluster(folder, {}, num_cpus=4) as cluster:
        found = Deployed(cluster, folder)
        with found.client:
            found.wait_up()
            yield found


def test_two_models_answer_and_engines_come_as_a_batch_needs_them(deployed: Deployed) -> None:
    client = deployed.client
    assert {model.id for model in client.models.list()} == {"bulk", "sums"}
    assert deployed.ask("sums", "30 + 12 = ?") == "42"
    assert deployed.ask("bulk", "hello")
    assert deployed.count_engines() == {"bulk": 1, "sums": 1}
    batches = {"bulk": deployed.create("bulk", NUM_ROWS), "sums": deployed.create("sums", 50)}
    most, give_up_at = 1, time.monotonic() + 200
    while any(client.batches.retrieve(id_).status != "completed" for id_ in batches.values()):
        most = max(most, deployed.count_engines().get("bulk", 0))
        assert time.monotonic() < give_up_at
        time.sleep(0.5)
    assert 1 < most <= 3
    for model, id_ in batches.items():
        done = client.batches.retrieve(id_)
        assert done.model == model
        assert done.output_file_id is not None
        lines = [json.loads(line) for line in client.files.content(done.output_file_id).text.splitlines()]
        num_rows = NUM_ROWS if model == "bulk" else 50
        assert sorted(line["custom_id"] for line in lines) == sorted(f"r{row}" for row in range(num_rows))
        if model == "sums":
            right = [line["response"]["body"]["choices"][0]["message"]["content"] for line in lines]
            answers = {line["custom_id"]: text for line, text in zip(lines, right, strict=True)}
            assert sum(answers[f"r{row}"] == str(row + 7) for row in range(50)) >= 48


def test_a_datasets_logprobs_are_told_in_its_lines(deployed: Deployed) -> None:
    folder = deployed.folder / "acme"
    folder.mkdir()
    chats = [json.dumps([{"role": "user", "content": f"{row} + 7 = ?"}]) for row in range(3)]
    pq.write_table(pa.table({"messages": chats, "sampling": ['{"logprobs": 1}', None, None]}), folder / "a.parquet")
    client = deployed.client
    asked: Any = {"endpoint": CHAT, "completion_window": "24h", "extra_body": {"model": "sums"}}
    batch = client.batches.create(input_file_id=f"file://{folder}/*.parquet", **asked)
    give_up_at = time.monotonic() + 60
    while (done := client.batches.retrieve(batch.id)).status != "completed":
        assert time.monotonic() < give_up_at, done
        time.sleep(0.3)
    assert done.output_file_id is not None
    lines = [json.loads(line) for line in client.files.content(done.output_file_id).text.splitlines()]
    choices = [line["response"]["body"]["choices"][0] for line in lines]
    assert [choice["logprobs"] is not None for choice in choices] == [True, False, False]
    assert "".join(token["token"] for token in choices[0]["logprobs"]["content"]).startswith("7")


@pytest.mark.parametrize(("part_size", "most_mb"), [(8 * MIB, 60), (64 * MIB, 160), (None, 400)])
def test_50000_lines_are_accepted_through_serve(deployed: Deployed, part_size: int | None, most_mb: int) -> None:
    """186 MB. What comes faster than it is stored, Serve queues without a bound, in its proxy and in the replica: of parts
    one at a time."""
    client, started = deployed.client, time.monotonic()
    with deployed.watching_memory() as seen:
        batch_id = deployed.create("bulk", 50_000, text="y" * 3_600, part_size=part_size)
        while client.batches.retrieve(batch_id).status == "validating":
            time.sleep(0.1)
        seconds = time.monotonic() - started
    assert client.batches.retrieve(batch_id).status == "in_progress"
    client.batches.cancel(batch_id)
    print(f"{part_size}: 50,000 lines accepted in {seconds:.1f} s; MB {seen}")
    while client.batches.retrieve(batch_id).status != "cancelled":
        time.sleep(0.5)
    assert all(mb["own"] - mb["own0"] < most_mb for mb in seen.values())
    if part_size == 8 * MIB:
        assert seen["Ingress"]["own"] + seen["Ingress"]["files"] < 300


def test_engines_that_nobody_needs_go(deployed: Deployed) -> None:
    """After the batch above: back to the least number, a minute after."""
    give_up_at = time.monotonic() + 150
    while deployed.count_engines() != {"bulk": 1, "sums": 1}:
        assert time.monotonic() < give_up_at
        time.sleep(1)
    deployed.delete()
    give_up_at = time.monotonic() + 30
    while deployed.count_engines():
        assert time.monotonic() < give_up_at
        time.sleep(0.5)
