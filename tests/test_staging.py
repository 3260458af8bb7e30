"""A model's way from a store to the node's disk: once, whole, and from where it broke off."""

import asyncio
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_files, make_safetensors
from s3_server import S3Proxy, S3Server

from batchgen.engines.hf_tokenizer import HFTokenizer
from batchgen.engines.transformers import TransformersEngine
from batchgen.errors import Cancelled, EngineDied, SpecError, StorageError
from batchgen.spec import ModelSpec
from batchgen.specs.engine import TransformersEngineSpec
from batchgen.staging.hub import find_cached
from batchgen.staging.lock import StageProgress
from batchgen.staging.plan import MARKER, choose_files, list_parts, parse_sidecar, parse_sums
from batchgen.staging.staging import StageOptions, make_plan, stage, stage_model
from batchgen.storage import Storage

PART_BYTES = 40_000
OPTIONS = StageOptions(num_threads=4, part_bytes=PART_BYTES, poll_s=0.02)
ONE_BY_ONE = StageOptions(num_threads=1, part_bytes=PART_BYTES, poll_s=0.02)
FILES = make_files()
CHILD = """
import sys
from batchgen.spec import ModelSpec
from batchgen.staging.staging import StageOptions, stage
options = StageOptions(num_threads=1, part_bytes=int(sys.argv[3]), poll_s=0.02)
show = lambda progress: print(progress.describe(), flush=True)
print(stage(ModelSpec(path=sys.argv[1], stage_dir=sys.argv[2]), on_progress=show, options=options), flush=True)
"""


def ignore(_: StageProgress) -> None: ...


def copy(url: str, stage_dir: Path, options: StageOptions = OPTIONS, **more: Any) -> Path:
    return stage(ModelSpec(path=url, stage_dir=str(stage_dir)), on_progress=ignore, options=options, **more)


def upload(url: str, files: dict[str, bytes] = FILES) -> None:
    for name, content in files.items():
        Storage(url).put(name, content)


def read_copy(folder: Path) -> dict[str, bytes]:
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in found.items() if not name.startswith("_")}


def count_gets(proxy: S3Proxy, name: str = ".safetensors") -> int:
    return sum(seen.method == "GET" and seen.path.endswith(name) for seen in proxy.seen)


def count_parts(files: dict[str, bytes] = FILES) -> int:
    return sum(-(-len(content) // PART_BYTES) for name, content in files.items() if name.endswith(".safetensors"))


@contextlib.contextmanager
def start_child(url: str, stage_dir: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", CHILD, url, str(stage_dir), str(PART_BYTES)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


# ---- what is copied


@pytest.mark.s3
def test_a_copy_is_whole_and_made_once(s3_url: str, s3_proxy: S3Proxy, tmp_path: Path) -> None:
    upload(s3_url)
    seen: list[StageProgress] = []
    model = ModelSpec(path=s3_url, stage_dir=str(tmp_path))
    folder = stage(model, on_progress=seen.append, options=OPTIONS)
    assert read_copy(folder) == FILES
    assert folder.parent == tmp_path
    assert seen[-1].num_bytes_done == seen[-1].num_bytes == sum(map(len, FILES.values()))
    assert json.loads((folder / MARKER).read_text())["source"] == s3_url
    assert count_gets(s3_proxy) == count_parts()
    assert copy(s3_url, tmp_path) == folder
    assert count_gets(s3_proxy) == count_parts()


def test_a_local_folder_is_copied_only_where_it_is_asked_for(tmp_path: Path) -> None:
    upload(str(tmp_path / "nfs"))
    assert stage(ModelSpec(path=str(tmp_path / "nfs"))) == tmp_path / "nfs"
    folder = copy(str(tmp_path / "nfs"), tmp_path / "nvme")
    assert read_copy(folder) == FILES
    assert folder.parent == tmp_path / "nvme"


def test_an_event_loop_goes_on_while_it_is_copied(tmp_path: Path) -> None:
    upload(str(tmp_path / "nfs"))
    model = ModelSpec(path=str(tmp_path / "nfs"), stage_dir=str(tmp_path / "nvme"))
    assert read_copy(asyncio.run(stage_model(model, ignore))) == FILES


@pytest.mark.s3
def test_the_tokenizer_alone_costs_no_weights(s3_url: str, s3_proxy: S3Proxy, tmp_path: Path) -> None:
    embedded = Path(stage(ModelSpec()))
    upload(s3_url, {path.name: path.read_bytes() for path in embedded.iterdir()})
    assert HFTokenizer(ModelSpec(path=s3_url, stage_dir=str(tmp_path))).vocab_size > 0
    assert count_gets(s3_proxy) == 0


@pytest.mark.s3
def test_the_transformers_engine_loads_from_a_url(s3_url: str, tmp_path: Path) -> None:
    embedded = Path(stage(ModelSpec()))
    upload(s3_url, {path.name: path.read_bytes() for path in embedded.iterdir()})
    section = TransformersEngineSpec(kind="transformers")

    async def open_and_close(model: ModelSpec) -> int | None:
        engine = TransformersEngine(model, section)
        await engine.open()
        await engine.close()
        return engine.max_model_len

    assert asyncio.run(open_and_close(ModelSpec(path=s3_url, stage_dir=str(tmp_path)))) == 1024
    Storage(s3_url).put("model.safetensors", (embedded / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(EngineDied, match="truncated"):
        asyncio.run(open_and_close(ModelSpec(path=s3_url, stage_dir=str(tmp_path))))


# ---- many at once, and killed


@pytest.mark.s3
def test_two_processes_download_once_and_the_second_sees_how_far_the_first_is(
    s3_url: str, s3_proxy: S3Proxy, tmp_path: Path
) -> None:
    upload(s3_url)
    held = s3_proxy.hold_reply(r"00002-of-00002\.safetensors$", nth=3, method="GET")
    with start_child(s3_url, tmp_path) as first:
        assert held.is_forwarded.wait(120)
        with start_child(s3_url, tmp_path) as second:
            assert second.stdout is not None
            assert first.stdout is not None
            line = second.stdout.readline()
            assert line.startswith(f"waiting for process {first.pid}, which copies {s3_url}: ")
            assert line.endswith(" of 400.6 kB\n")
            held.release()
            ends = [process.stdout.read().splitlines()[-1] for process in (first, second)]
    assert ends[0] == ends[1]
    assert read_copy(Path(ends[0])) == FILES
    assert count_gets(s3_proxy) == count_parts()


def kill_at(nth: int, url: str, proxy: S3Proxy, stage_dir: Path) -> None:
    """SIGKILL while the n-th part of weights is under way."""
    held = proxy.hold_reply(r"\.safetensors$", nth=nth, method="GET")
    with start_child(url, stage_dir) as child:
        assert held.is_forwarded.wait(120)
        child.send_signal(signal.SIGKILL)
        child.wait()
    held.release()


@pytest.mark.s3
def test_after_sigkill_only_the_rest_is_fetched(s3_url: str, s3_proxy: S3Proxy, tmp_path: Path) -> None:
    upload(s3_url)
    num_done = 7
    kill_at(num_done + 1, s3_url, s3_proxy, tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir() and not path.name.endswith(".staging")]
    s3_proxy.seen.clear()
    folder = copy(s3_url, tmp_path)
    assert read_copy(folder) == FILES
    assert count_gets(s3_proxy) == count_parts() - num_done


@pytest.mark.s3
def test_what_was_recorded_and_then_rotted_is_fetched_again(s3_url: str, s3_proxy: S3Proxy, tmp_path: Path) -> None:
    upload(s3_url)
    kill_at(4, s3_url, s3_proxy, tmp_path)
    (partial_file,) = tmp_path.rglob("*.part")
    flip(partial_file, PART_BYTES + 5)
    s3_proxy.seen.clear()
    assert read_copy(copy(s3_url, tmp_path)) == FILES
    assert count_gets(s3_proxy) == count_parts() - 2


def test_stopping_keeps_what_was_copied(tmp_path: Path) -> None:
    upload(str(tmp_path / "nfs"))
    stop = threading.Event()

    def stop_half_way(progress: StageProgress) -> None:
        if (progress.num_bytes_done or 0) > 200_000:
            stop.set()

    model = ModelSpec(path=str(tmp_path / "nfs"), stage_dir=str(tmp_path / "nvme"))
    with pytest.raises(Cancelled, match="what was copied is kept"):
        stage(model, on_progress=stop_half_way, stop=stop, options=ONE_BY_ONE)
    (sidecar,) = tmp_path.rglob("_PARTS.jsonl")
    assert 5 <= len(parse_sidecar(sidecar.read_text().splitlines()).parts) < count_parts()
    assert read_copy(copy(model.path, tmp_path / "nvme")) == FILES


# ---- damage


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_byte_that_flips_on_the_disk_is_found_and_mended_by_verify(tmp_path: Path) -> None:
    upload(str(tmp_path / "nfs"))
    folder = copy(str(tmp_path / "nfs"), tmp_path / "nvme")
    flip(folder / "model-00002-of-00002.safetensors", 150_000)
    assert read_copy(copy(str(tmp_path / "nfs"), tmp_path / "nvme")) != FILES  # sizes don't tell
    assert copy(str(tmp_path / "nfs"), tmp_path / "nvme", verify=True) == folder
    assert read_copy(folder) == FILES


@pytest.mark.parametrize("is_gone", [True, False])
def test_a_file_that_is_not_whole_in_the_copy_is_fetched_alone(is_gone: bool, tmp_path: Path) -> None:
    upload(str(tmp_path / "nfs"))
    folder = copy(str(tmp_path / "nfs"), tmp_path / "nvme")
    damaged = folder / "model-00001-of-00002.safetensors"
    if is_gone:
        damaged.unlink()
    else:
        os.truncate(damaged, 1000)
    kept = (folder / "model-00002-of-00002.safetensors").stat().st_ino
    assert copy(str(tmp_path / "nfs"), tmp_path / "nvme") == folder
    assert read_copy(folder) == FILES
    assert (folder / "model-00002-of-00002.safetensors").stat().st_ino == kept


class FlippingProxy(S3Proxy):
    """Flips a byte in the first replies that are asked for."""

    num_flips = 0

    async def _forward(self, request: Any) -> Any:
        response = await super()._forward(request)
        if self.num_flips and request.method == "GET" and request.path.endswith("00001-of-00002.safetensors"):
            self.num_flips -= 1
            response.body = response.body[:-1] + bytes([response.body[-1] ^ 1])
        return response


@pytest.mark.s3
@pytest.mark.parametrize("num_flips", [1, 1000])
def test_a_byte_that_flips_on_the_way_is_found_by_the_stores_md5(
    num_flips: int, s3_url: str, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(s3_url)
    with FlippingProxy(s3_server.endpoint).running() as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        proxy.num_flips = num_flips
        if num_flips == 1:
            assert read_copy(copy(s3_url, tmp_path)) == FILES
            return
        with pytest.raises(
            StorageError, match=r"00001-of-00002.safetensors has another md5 than its source says, twice"
        ):
            copy(s3_url, tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir() and not path.name.endswith(".staging")]


@pytest.mark.parametrize("name", ["SHA256SUMS", "model-00001-of-00002.safetensors.sha256"])
def test_checksums_beside_the_files_are_held_to(name: str, tmp_path: Path) -> None:
    source, shard = str(tmp_path / "nfs"), "model-00001-of-00002.safetensors"
    digest = hashlib.sha256(FILES[shard]).hexdigest()
    upload(source, {**FILES, name: f"{digest}  {shard}\n".encode()})
    copy(source, tmp_path / "nvme")
    wrong = FILES[shard][:-1] + bytes([FILES[shard][-1] ^ 1])
    Storage(source).put(shard, wrong)
    with pytest.raises(StorageError, match=f"{shard} has another sha256 than its source says"):
        copy(source, tmp_path / "nvme")


def test_a_source_that_is_not_whole_is_refused_before_anything_is_copied(tmp_path: Path) -> None:
    source = str(tmp_path / "nfs")
    upload(source, {name: content for name, content in FILES.items() if "00002-of" not in name})
    with pytest.raises(SpecError, match="1 files that its index names are missing, the first is model-00002-of-00002"):
        copy(source, tmp_path / "nvme")
    assert not (tmp_path / "nvme").exists()
    with pytest.raises(SpecError, match="there are no files of a checkpoint"):
        copy(f"file://{tmp_path}/nothing", tmp_path / "nvme")
    with pytest.raises(SpecError, match="is not a folder on this machine"):
        copy(f"{tmp_path}/nothing", tmp_path / "nvme")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (make_safetensors({"a.weight": ("BF16", 100)})[:-3], "is truncated"),
        (make_safetensors({"a.weight": ("BF16", 100)}) + b"x", "is too long"),
        (b"<Error>AccessDenied</Error>", "no sane header length"),
        (b"abc", "too short"),
    ],
)
def test_a_safetensors_file_that_contradicts_itself_is_refused(content: bytes, reason: str, tmp_path: Path) -> None:
    upload(str(tmp_path / "nfs"), {"model.safetensors": content, "config.json": b"{}"})
    with pytest.raises(StorageError, match=f"model.safetensors .*{reason}"):
        copy(str(tmp_path / "nfs"), tmp_path / "nvme")


# ---- a source that changes


def test_a_changed_source_is_copied_anew_beside_the_old_copy(tmp_path: Path) -> None:
    source = str(tmp_path / "nfs")
    upload(source)
    old = copy(source, tmp_path / "nvme")
    changed = {**FILES, "tokenizer.json": b'{"new": 1}'}
    Storage(source).put("tokenizer.json", changed["tokenizer.json"])
    new = copy(source, tmp_path / "nvme")
    assert new != old
    assert (read_copy(old), read_copy(new)) == (FILES, changed)
    Storage(source).put("tokenizer.json", b"3")
    with pytest.raises(StorageError, match=f"an older copy of it is {old}"):
        copy(source, tmp_path / "nvme", StageOptions(find_free=lambda _: 1000))


@pytest.mark.s3
def test_a_source_that_changes_while_it_is_copied(s3_url: str, s3_proxy: S3Proxy, tmp_path: Path) -> None:
    upload(s3_url)
    shard = "model-00002-of-00002.safetensors"
    held = s3_proxy.hold_reply(f"{shard}$", nth=2, method="GET")
    failures: list[BaseException] = []

    def work() -> None:
        try:
            copy(s3_url, tmp_path, ONE_BY_ONE)
        except StorageError as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert held.is_forwarded.wait(120)
    Storage(s3_url).put(shard, FILES["model-00001-of-00002.safetensors"])
    held.release()
    thread.join(30)
    assert "was changed while it was copied" in str(failures[0])
    assert read_copy(copy(s3_url, tmp_path))[shard] == FILES["model-00001-of-00002.safetensors"]
    assert not list(tmp_path.glob("*.staging"))


# ---- full disks


def test_a_disk_that_is_too_small_is_refused_before_it_is_filled(tmp_path: Path) -> None:
    upload(str(tmp_path / "nfs"))
    with pytest.raises(StorageError, match=r"it takes 400\.6 kB more and 300\.0 kB are free there; free some space or"):
        copy(str(tmp_path / "nfs"), tmp_path / "nvme", StageOptions(find_free=lambda _: 300_000))
    assert list(tmp_path.rglob("*.part")) == []


def test_a_disk_that_fills_up_all_the_same(tmp_path: Path) -> None:
    """`/dev/full` answers every write as a full disk does."""
    source = str(tmp_path / "nfs")
    upload(source)
    staging = tmp_path / "nvme" / f"{make_plan(source).folder}.staging"
    staging.mkdir(parents=True)
    full = staging / "model-00001-of-00002.safetensors.part"
    full.symlink_to("/dev/full")
    with pytest.raises(StorageError, match=r"cannot write .*: the disk is full; free some space"):
        copy(source, tmp_path / "nvme")
    full.unlink()
    assert read_copy(copy(source, tmp_path / "nvme")) == FILES


# ---- the hub


class Hub(BaseHTTPRequestHandler):
    """Speaks what snapshot_download asks of a hub."""

    files: dict[str, bytes]
    asked: list[str]
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.asked.append(f"{self.command} {self.path}")
        commit = "a" * 40
        if "/tree/" in self.path:
            entries = [{"type": "file", "path": n, "size": len(b), "oid": "0" * 40} for n, b in self.files.items()]
            self._send(200, json.dumps(entries).encode())
        elif self.path.startswith("/api/models/"):
            body = json.dumps(
                {"id": "org/model", "sha": commit, "siblings": [{"rfilename": f} for f in self.files]}
            ).encode()
            self._send(200, body)
        elif (name := self.path.rpartition("/")[2]) in self.files:
            body = self.files[name]
            self._send(200, body, {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": commit})
        else:
            self._send(404, b"")

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None: ...


def fetch_from_hub(port: int, stage_dir: Path) -> "subprocess.CompletedProcess[str]":
    """In a process of its own: the hub's client reads its address when it is imported."""
    env = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-c", CHILD, "org/model", str(stage_dir), "1"]
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=60, check=False)


@contextlib.contextmanager
def run_hub(files: dict[str, bytes], asked: list[str]) -> Iterator[int]:
    handler = type("OneHub", (Hub,), {"files": files, "asked": asked})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def test_a_hub_id_goes_through_the_hubs_own_client(tmp_path: Path) -> None:
    asked: list[str] = []
    with run_hub({**FILES, "model.gguf": b"never read"}, asked) as port:
        done = fetch_from_hub(port, tmp_path)
        assert done.returncode == 0, done.stderr
        assert read_copy(Path(done.stdout.splitlines()[-1])) == FILES
        assert find_cached(ModelSpec(path="org/model", stage_dir=str(tmp_path))) == Path(done.stdout.splitlines()[-1])
        num_gets = sum(call.startswith("GET /org/") for call in asked)
        assert fetch_from_hub(port, tmp_path).stdout == done.stdout
        assert sum(call.startswith("GET /org/") for call in asked) == num_gets


def test_what_a_hub_gives_is_looked_at_too(tmp_path: Path) -> None:
    with run_hub(
        {**FILES, "model-00001-of-00002.safetensors": FILES["model-00001-of-00002.safetensors"][:-1]}, []
    ) as port:
        done = fetch_from_hub(port, tmp_path)
    assert "model-00001-of-00002.safetensors is truncated" in done.stderr.splitlines()[-1]


def test_a_hub_that_is_away(tmp_path: Path) -> None:
    last = fetch_from_hub(9, tmp_path).stderr.splitlines()[-1]
    assert last.startswith("batchgen.errors.SpecError: model.path: org/model can't be had from the hub (")
    assert find_cached(ModelSpec(path="org/model", stage_dir=str(tmp_path))) is None


# ---- pure


def test_choosing() -> None:
    paths = [
        "model.safetensors",
        "config.json",
        "pytorch_model.bin",
        "original/a.pth",
        ".git/x",
        "sub/a.py",
        "_STAGED.json",
    ]
    assert choose_files(paths, "model") == ["model.safetensors", "config.json", "sub/a.py"]
    assert choose_files(paths, "tokenizer") == ["config.json"]
    assert choose_files(["pytorch_model.bin", "config.json"], "model") == ["pytorch_model.bin", "config.json"]
    with pytest.raises(SpecError, match="impossible name"):
        choose_files(["a//b"], "model")


def test_a_name_that_leads_out_of_the_folder_is_never_written() -> None:
    assert choose_files(["../../etc/passwd", "config.json"], "model") == ["config.json"]


def test_sums_are_read_as_sha256sum_writes_them() -> None:
    digest = "a" * 64
    assert parse_sums("SHA256SUMS", f"{digest}  a b.json\n{digest} *./c\n") == {"a b.json": digest, "c": digest}
    assert parse_sums("x.bin.sha256", digest) == {"x.bin": digest}
    with pytest.raises(SpecError, match="not what sha256sum writes"):
        parse_sums("SHA256SUMS", "hello")


def test_parts_cover_a_file(tmp_path: Path) -> None:
    upload(str(tmp_path), {"model.safetensors": b"x" * 101})
    (file,) = make_plan(str(tmp_path)).files
    parts = list_parts(file, 25)
    assert [(part.start, part.num_bytes) for part in parts] == [(0, 25), (25, 25), (50, 25), (75, 25), (100, 1)]


def test_a_torn_sidecar_says_what_is_whole_in_it() -> None:
    whole = '{"path": "a", "start": 0, "num_bytes": 5, "crc32": 1}'
    assert len(parse_sidecar(["", whole, whole[:-9], "[]", '{"path": "a", "is_whole": true}']).parts) == 1
