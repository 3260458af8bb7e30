"""The Files API as the `openai` package sees it, and what is at its door: keys, tenants, sizes, rates."""

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from serve_process import Server, create, make_endpoint_tree, make_line, running, upload

MIB = 2**20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("endpoint")
    with running(Server(folder, make_endpoint_tree(str(folder / "store")))) as started:
        yield started


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return server.client()


@pytest.fixture
def raw(server: Server) -> Iterator[httpx.Client]:
    """For what the package would never send."""
    headers = {"Authorization": f"Bearer {server.keys['acme']}"}
    with httpx.Client(base_url=server.url[:-3], headers=headers, timeout=30) as started:
        yield started


def check_error(response: httpx.Response, status: int) -> dict[str, object]:
    """OpenAI's body, and the request's id."""
    assert response.status_code == status, response.text
    assert response.headers["x-request-id"].startswith("req_")
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return dict(error)


# ---- one file's life


def test_create_retrieve_list_content_delete(client: openai.OpenAI) -> None:
    file = upload(client, b"hello\n")
    assert (file.bytes, file.filename, file.purpose, file.object) == (6, "in.jsonl", "batch", "file")
    assert file.expires_at == file.created_at + 30 * 86400
    assert file._request_id is not None
    assert client.files.retrieve(file.id) == file
    assert client.files.content(file.id).read() == b"hello\n"
    assert file.id in [each.id for each in client.files.list()]
    deleted = client.files.delete(file.id)
    assert (deleted.id, deleted.deleted) == (file.id, True)
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError) as caught:
            call(file.id)
        assert caught.value.request_id is not None
    assert file.id not in [each.id for each in client.files.list()]


def test_pages_orders_and_purposes(server: Server) -> None:
    client = server.client("globex")
    made = [upload(client, b"x").id for _ in range(5)]
    other = client.files.create(file=("u.bin", b"y"), purpose="user_data")
    assert other.expires_at is None
    assert [file.id for file in client.files.list(purpose="batch", limit=2)] == made[::-1]
    assert [file.id for file in client.files.list(order="asc", limit=2)] == [*made, other.id]
    page = client.files.list(order="asc", limit=2)
    assert page.has_more
    assert [file.id for file in page.data] == made[:2]
    assert [file.id for file in client.files.list(order="asc", after=made[3])] == [made[4], other.id]


def test_a_file_that_has_expired_is_gone(client: openai.OpenAI) -> None:
    file = upload(client, b"x", expires_after={"anchor": "created_at", "seconds": 3600})
    assert file.expires_at == file.created_at + 3600
    with pytest.raises(openai.BadRequestError):
        upload(client, b"x", expires_after={"anchor": "created_at", "seconds": 60})


# ---- ranges


def test_ranges(raw: httpx.Client, client: openai.OpenAI) -> None:
    """Also over the borders of the parts that a file is kept in."""
    content = bytes(range(256)) * (80 * 1024)
    id_ = upload(client, content).id
    part = 8 * MIB
    cases = {
        "bytes=0-0": (0, 1),
        "bytes=5-": (5, len(content)),
        "bytes=-7": (len(content) - 7, len(content)),
        f"bytes={part - 3}-{part + 2}": (part - 3, part + 3),
        f"bytes=10-{10**17}": (10, len(content)),
        f"bytes=-{10**17}": (0, len(content)),
    }
    for header, (start, end) in cases.items():
        response = raw.get(f"/v1/files/{id_}/content", headers={"Range": header})
        assert response.status_code == 206
        assert response.headers["content-range"] == f"bytes {start}-{end - 1}/{len(content)}"
        assert int(response.headers["content-length"]) == end - start
        assert response.content == content[start:end]
    for header in ("bytes=4-2", "items=0-1", "bytes=0-1,4-5", "bytes=-", "bytes=a-b"):
        assert raw.get(f"/v1/files/{id_}/content", headers={"Range": header}).status_code == 200
    for header in (f"bytes={len(content)}-", "bytes=-0"):
        check_error(raw.get(f"/v1/files/{id_}/content", headers={"Range": header}), 416)


# ---- malformed uploads


def multipart(*parts: tuple[str, bytes], end: bytes = b"--b--\r\n") -> bytes:
    return b"".join(b"--b\r\n" + head.encode() + b"\r\n\r\n" + data + b"\r\n" for head, data in parts) + end


PURPOSE = ('Content-Disposition: form-data; name="purpose"', b"batch")
FILE = ('Content-Disposition: form-data; name="file"; filename="a"', b"content")
KIND = "multipart/form-data; boundary=b"


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("", b""),
        ("application/json", b"{}"),
        ("multipart/form-data", multipart(PURPOSE, FILE)),
        ("multipart/form-data; boundary=", multipart(PURPOSE, FILE)),
        (f"multipart/form-data; boundary={'b' * 1000}", multipart(PURPOSE, FILE)),
        (KIND, b""),
        (KIND, b"--b"),
        (KIND, b"no boundary at all"),
        (KIND, multipart(PURPOSE, FILE, end=b"")),
        (KIND, multipart(PURPOSE, FILE)[:-20]),
        (KIND, multipart(PURPOSE)),
        (KIND, multipart(FILE)),
        (KIND, multipart((PURPOSE[0], b"fine-tune"), FILE)),
        (KIND, multipart((PURPOSE[0], b"\xff"), FILE)),
        (KIND, multipart((PURPOSE[0], b"x" * 10_000), FILE)),
        (KIND, multipart(PURPOSE, FILE, FILE)),
        (KIND, multipart(PURPOSE, FILE, *[PURPOSE] * 20)),
        (KIND, multipart(PURPOSE, ("no header", b"x"))),
        (KIND, multipart(PURPOSE, ("A: " + "x" * 10_000, b"x"))),
        (KIND, multipart(PURPOSE, ('Content-Disposition: form-data; name="other"', b"x"))),
        (KIND, multipart(PURPOSE, FILE, ('Content-Disposition: form-data; name="expires_after[seconds]"', b"9"))),
    ],
)
def test_a_malformed_upload_is_a_400_and_leaves_nothing(
    server: Server, raw: httpx.Client, kind: str, body: bytes
) -> None:
    before = {file["id"] for file in raw.get("/v1/files").json()["data"]}
    check_error(raw.post("/v1/files", content=body, headers={"Content-Type": kind}), 400)
    assert {file["id"] for file in raw.get("/v1/files").json()["data"]} == before
    assert not any(path.is_file() for path in Path(server.tree["store"]).glob("uploads/*/*"))


@pytest.mark.parametrize("name", ["../../etc/passwd", "..\\x", "/abs", "a\x00b", "é" * 400, "t/acme/files/x.json"])
def test_a_files_name_is_only_a_name(server: Server, client: openai.OpenAI, name: str) -> None:
    file = client.files.create(file=(name, b"x"), purpose="batch")
    assert "/" not in file.filename
    assert "\\" not in file.filename
    assert len(file.filename) <= 255
    assert client.files.content(file.id).read() == b"x"
    found = [path for path in Path(server.tree["store"]).rglob("*") if "passwd" in path.name]
    assert found == []


def test_a_client_that_goes_away_leaves_nothing(server: Server) -> None:
    body = multipart(PURPOSE, FILE)
    head = (
        f"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.keys['acme']}\r\nContent-Type: {KIND}\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.sendall(head.encode() + b"Content-Length: 100000\r\n\r\n" + body)
        time.sleep(0.2)
    end = time.monotonic() + 20
    while any(path.is_file() for path in Path(server.tree["store"]).glob("uploads/*/*")):
        assert time.monotonic() < end
        time.sleep(0.05)


# ---- the door


def test_without_a_key_nothing_but_health(server: Server) -> None:
    with httpx.Client(base_url=server.url[:-3]) as nobody:
        for path in ("/health", "/ready", "/openapi.json"):
            assert nobody.get(path).status_code == 200
        for path in ("/v1/files", "/v1/batches", "/v1/models", "/docs", "/v1/nothing", "/health/"):
            assert check_error(nobody.get(path), 401)["code"] == "invalid_api_key"
    with (
        openai.OpenAI(base_url=server.url, api_key="sk-wrong", max_retries=0) as wrong,
        pytest.raises(openai.AuthenticationError),
    ):
        wrong.models.list()


def test_unknown_paths_and_methods(raw: httpx.Client) -> None:
    check_error(raw.get("/v1/nothing"), 404)
    check_error(raw.put("/v1/files"), 405)
    check_error(raw.get("/v1/files/"), 404)
    for path in ("/v1/files/../../x", "/v1/files/%2e%2e%2f%2e%2e", "/v1/files/file-..", "/v1/batches/%00"):
        assert raw.get(path).status_code == 404


def test_bodies_and_queries_that_make_no_sense(raw: httpx.Client) -> None:
    assert check_error(raw.post("/v1/batches", content=b"{"), 400)["code"] is not None
    for body in (b"", b"[]", b"null", b'"x"', b"{}", b"\xff", b"[" * 50_000, b'{"input_file_id": 1}'):
        check_error(raw.post("/v1/batches", content=body, headers={"Content-Type": "application/json"}), 400)
    for query in ("limit=0", "limit=101", "limit=x", "after=x", "after=../../x", f"after={'b' * 100}"):
        check_error(raw.get(f"/v1/batches?{query}"), 400)
    for query in ("limit=0", "limit=10001", "order=up", "after=batch_1"):
        check_error(raw.get(f"/v1/files?{query}"), 400)


@pytest.mark.parametrize(
    ("line", "headers", "status"),
    [
        ("POST /v1/batches HTTP/1.1", {"Idempotency-Key": "k" * 300}, 400),
        ("POST /v1/batches HTTP/1.1", {"Idempotency-Key": ""}, 400),
        ("POST /v1/batches HTTP/1.1", {"x-stainless-retry-count": "123456789"}, 400),
        ("POST /v1/batches HTTP/1.1", {"Content-Type": "text/plain"}, 400),
        ("POST /v1/batches HTTP/1.1", {"Content-Type": "\xff;;;="}, 400),
        ("POST /v1/batches HTTP/1.1", {"Idempotency-Key": "\xff"}, 404),
        ("POST /v1/batches HTTP/1.1", {"x-stainless-retry-count": "\xb2"}, 404),
        ("GET /v1/files HTTP/1.1", {"Authorization": "Bearer \xff\xfe"}, 401),
        ("GET /v1/files HTTP/1.1", {"Authorization": "Basic abc"}, 401),
        ("GET /v1/files?limit=%C2%B2 HTTP/1.1", {}, 400),
        ("GET /v1/batches/%ff HTTP/1.1", {}, 404),
        ("GET //v1/files HTTP/1.1", {}, 404),
    ],
)
def test_odd_headers_and_lines(server: Server, line: str, headers: dict[str, str], status: int) -> None:
    """As bytes, for no client would send them."""
    body = json.dumps({"input_file_id": "file-x", "endpoint": "/v1/completions", "completion_window": "24h"}).encode()
    known = {"Host": "x", "Authorization": f"Bearer {server.keys['acme']}", "Content-Type": "application/json"}
    known |= {"Content-Length": str(len(body)), "Connection": "close", **headers}
    text = "".join(f"{name}: {value}\r\n" for name, value in known.items())
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as sock:
        sock.sendall(f"{line}\r\n{text}\r\n".encode("latin-1") + body)
        answer = b"".join(iter(lambda: sock.recv(65536), b""))
    head, _, content = answer.partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status
    error = json.loads(content)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    if status == 400 and "Content-Type" not in headers:
        assert error["param"] in (*headers, "limit")


def test_cors_stays_closed(raw: httpx.Client) -> None:
    headers = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    assert raw.options("/v1/files", headers=headers).status_code == 405
    response = raw.get("/v1/models", headers={"Origin": "https://evil.example"})
    assert not [name for name in response.headers if name.startswith("access-control")]


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["fast", "slow"]
    assert client.models.retrieve("slow").id == "slow"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("no/such model")


def test_the_audit_line_has_no_secret_and_no_prompt(server: Server, client: openai.OpenAI) -> None:
    create(client, [make_line("a", messages=[{"role": "user", "content": "very private words"}])])
    client.batches.list(extra_query={"after": "batch_" + "0" * 32, "secret": "hidden"})
    log = (server.folder / "log").read_text()
    lines = [json.loads(line.partition("INFO ")[2]) for line in log.splitlines() if "batchgen.audit" in line]
    assert {"request_id", "tenant", "method", "path", "status", "ms"} == set(lines[-1])
    assert any(line["tenant"] == "acme" and line["path"] == "/v1/batches" for line in lines)
    for secret in (*server.keys.values(), "private words", "hidden", "say a"):
        assert secret not in log


def test_limits(tmp_path: Path) -> None:
    limits = {
        "max_file_bytes": 200_000,
        "max_body_bytes": 2000,
        "requests_per_minute": 120,
        "max_open_batches": 2,
        "max_running": 1,
        "max_uploads": 1,
    }
    tree = make_endpoint_tree(str(tmp_path / "store"), limits=limits)
    with running(Server(tmp_path / "endpoint", tree, tenants=("acme", "globex", "third"))) as server:
        client = server.client("acme")
        with pytest.raises(openai.APIStatusError) as caught:
            upload(client, b"x" * 200_001)
        assert caught.value.status_code == 413
        with pytest.raises(openai.APIStatusError) as caught:  # told in the head alone
            upload(client, b"x" * 10**6)
        assert caught.value.status_code == 413
        headers = {"Authorization": f"Bearer {server.keys['acme']}"}
        check_one_upload_at_a_time(server)

        def endless() -> Iterator[bytes]:
            for _ in range(100):
                yield b"x" * 10_000

        told = httpx.post(f"{server.url}/batches", content=endless(), headers=headers)
        check_error(told, 413)
        third = server.client("third")
        for _ in range(2):
            create(third, [make_line(f"r{number}", model="slow") for number in range(500)])
        with pytest.raises(openai.RateLimitError) as limited:
            create(third, [make_line("a", model="slow")])
        assert limited.value.code == "queue_full"
        assert int(limited.value.response.headers["retry-after"]) > 0
        other = server.client("globex")
        calls = [lambda: other.models.list()] * 100
        with pytest.raises(openai.RateLimitError) as limited:
            _ = [call() for call in calls]
        assert limited.value.code == "rate_limit_exceeded"
        assert int(limited.value.response.headers["retry-after"]) > 0
        assert server.client("acme").models.list()  # a tenant's rate is its own


def check_one_upload_at_a_time(server: Server) -> None:
    head = f"Host: x\r\nAuthorization: Bearer {server.keys['acme']}\r\nContent-Type: {KIND}\r\nContent-Length: 1000\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.sendall(f"POST /v1/files HTTP/1.1\r\n{head}".encode() + b"--b\r\n")
        end = time.monotonic() + 20
        while not any(path.is_file() for path in Path(server.tree["store"]).glob("uploads/*/*")):
            assert time.monotonic() < end
            time.sleep(0.05)
        with pytest.raises(openai.RateLimitError) as limited:
            upload(server.client("acme"), b"x")
        assert limited.value.code == "too_many_uploads"
        assert int(limited.value.response.headers["retry-after"]) > 0
    while True:  # the first has broken off, and its place is free
        try:
            assert upload(server.client("acme"), b"x").bytes == 1
            return
        except openai.RateLimitError:
            assert time.monotonic() < end
            time.sleep(0.1)


def test_without_keys_only_this_machine_is_answered(tmp_path: Path) -> None:
    tree = make_endpoint_tree(str(tmp_path / "store"))
    with running(Server(tmp_path / "endpoint", tree, has_keys=False)) as server:
        assert httpx.get(f"{server.url}/models").status_code == 200
        check_error(httpx.get(f"{server.url}/models", headers={"Host": "evil.example"}), 403)
        check_error(httpx.get(f"{server.url}/models", headers={"Origin": "https://evil.example"}), 403)
        check_error(httpx.get(f"{server.url}/models", headers={"Host": "["}), 403)
        check_error(httpx.get(f"{server.url}/models", headers={"Origin": "http://["}), 403)
