"""Files in parts, with the `openai` package's own `uploads.upload_file_chunked`, and what goes wrong on the way."""

import asyncio
import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from serve_process import Server, make_endpoint_tree, make_jsonl, make_line, read_lines, running, wait_over

from batchgen.errors import StorageError
from batchgen.serve.ids import make_piece_id
from batchgen.serve.records import FileRecord, Piece
from batchgen.serve.state import State, make_part_path
from batchgen.serve.sweep import ABANDONED_S, sweep
from batchgen.serve.upload_records import LIFETIME_S, UploadRecord
from batchgen.serve.uploads import complete_upload, create_upload, make_piece_folder
from batchgen.serve.wire import CompleteUpload, CreateUpload

MIB = 2**20
LIMITS = {"max_part_bytes": MIB, "max_file_bytes": 40 * MIB}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("endpoint")
    with running(Server(folder, make_endpoint_tree(str(folder / "store"), limits=LIMITS))) as started:
        yield started


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with server.client() as opened:
        yield opened


def begin(client: openai.OpenAI, num_bytes: int, **fields: Any) -> str:
    known: Any = {"filename": "in.jsonl", "mime_type": "application/jsonl", "purpose": "batch", **fields}
    return client.uploads.create(bytes=num_bytes, **known).id


def add(client: openai.OpenAI, upload_id: str, data: bytes) -> str:
    return client.uploads.parts.create(upload_id, data=data).id


# ---- the package's own way


def test_a_file_in_parts_is_a_batchs_input(client: openai.OpenAI, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(make_jsonl([make_line(f"r{row}", user="y" * 2000) for row in range(2000)]))
    size, md5 = path.stat().st_size, hashlib.md5(path.read_bytes()).hexdigest()
    kind: Any = {"mime_type": "application/jsonl", "purpose": "batch"}
    done = client.uploads.upload_file_chunked(file=path, part_size=MIB, md5=md5, **kind)
    assert (done.status, done.bytes, done.filename, done.object) == ("completed", size, "in.jsonl", "upload")
    assert done.expires_at == done.created_at + 3600
    assert done.file is not None
    file = client.files.retrieve(done.file.id)
    assert file == done.file
    assert (file.bytes, file.filename, file.purpose) == (size, "in.jsonl", "batch")
    assert file.expires_at == file.created_at + 30 * 86400
    assert client.files.content(file.id).read() == path.read_bytes()
    window: Any = {"endpoint": "/v1/chat/completions", "completion_window": "24h"}
    batch = wait_over(client, client.batches.create(input_file_id=file.id, **window).id)
    assert batch.status == "completed"
    assert read_lines(client, batch.output_file_id).keys() == {f"r{row}" for row in range(2000)}
    client.files.delete(file.id)
    with pytest.raises(openai.NotFoundError):
        client.files.content(file.id)


def test_the_async_client_sends_parts_at_once(server: Server) -> None:
    """They are put in the order that is asked for at the end."""
    pieces = [bytes([number]) * (MIB - number) for number in range(12)]

    async def send() -> bytes:
        async with server.async_client() as client:
            kind: Any = {"filename": "f", "mime_type": "text/plain", "purpose": "user_data"}
            upload = await client.uploads.create(bytes=sum(map(len, pieces)), **kind)
            calls = [client.with_options(max_retries=5).uploads.parts.create(upload.id, data=piece) for piece in pieces]
            parts = await asyncio.gather(*calls)
            assert {part.upload_id for part in parts} == {upload.id}
            done = await client.uploads.complete(upload.id, part_ids=[part.id for part in reversed(parts)])
            assert done.file is not None
            assert done.file.expires_at is None
            return (await client.files.content(done.file.id)).content

    assert asyncio.run(send()) == b"".join(reversed(pieces))


def test_a_range_lies_over_parts(server: Server, client: openai.OpenAI) -> None:
    upload_id = begin(client, 9)
    parts = [add(client, upload_id, data) for data in (b"abc", b"def", b"ghi")]
    done = client.uploads.complete(upload_id, part_ids=parts)
    assert done.file is not None
    headers = {"Authorization": f"Bearer {server.keys['acme']}", "Range": "bytes=2-6"}
    assert httpx.get(f"{server.url}/files/{done.file.id}/content", headers=headers).content == b"cdefg"


# ---- ends


def test_completed_twice_is_the_same_file_and_nothing_else(client: openai.OpenAI) -> None:
    upload_id = begin(client, 6)
    first, second = add(client, upload_id, b"abc"), add(client, upload_id, b"def")
    done = client.uploads.complete(upload_id, part_ids=[first, second])
    assert client.uploads.complete(upload_id, part_ids=[first, second]) == done
    for call in (
        lambda: client.uploads.complete(upload_id, part_ids=[second, first]),
        lambda: client.uploads.cancel(upload_id),
        lambda: add(client, upload_id, b"x"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            call()
        assert caught.value.code == "upload_not_pending"
    assert done.file is not None
    client.files.delete(done.file.id)
    client.uploads.complete(upload_id, part_ids=[first, second])  # sent again: no file comes back
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(done.file.id)


def test_two_that_complete_at_once_agree(client: openai.OpenAI) -> None:
    upload_id = begin(client, 6)
    orders = [[add(client, upload_id, b"abc"), add(client, upload_id, b"def")]]
    orders.append(orders[0][::-1])

    def end(number: int) -> str:
        try:
            done = client.uploads.complete(upload_id, part_ids=orders[number % 2])
        except openai.BadRequestError as error:
            return str(error.code)
        assert done.file is not None
        return done.file.id

    with ThreadPoolExecutor(8) as threads:
        ends = set(threads.map(end, range(16)))
    assert len(ends) == 2
    assert "upload_not_pending" in ends
    (file_id,) = ends - {"upload_not_pending"}
    assert client.files.content(file_id).read() in (b"abcdef", b"defabc")


def test_a_cancelled_upload_leaves_nothing(server: Server, client: openai.OpenAI) -> None:
    upload_id = begin(client, 6)
    part = add(client, upload_id, b"abcdef")
    assert client.uploads.cancel(upload_id).status == "cancelled"
    assert client.uploads.cancel(upload_id).status == "cancelled"
    with pytest.raises(openai.BadRequestError, match="cancelled"):
        client.uploads.complete(upload_id, part_ids=[part])
    with pytest.raises(openai.BadRequestError, match="cancelled"):
        add(client, upload_id, b"x")
    left = [path for path in Path(server.tree["store"]).rglob("*") if path.is_file() and upload_id in str(path)]
    assert [path.name for path in left] == [f"{upload_id}.json"]


def test_an_upload_expires(server: Server, client: openai.OpenAI) -> None:
    upload_id = begin(client, 3)
    part = add(client, upload_id, b"abc")
    state = State(server.tree["store"])
    record = state.read_upload("acme", upload_id)
    assert record is not None
    state.change_upload(record, lambda known: known.model_copy(update={"created_at": known.created_at - LIFETIME_S}))
    for call in (
        lambda: client.uploads.complete(upload_id, part_ids=[part]),
        lambda: client.uploads.cancel(upload_id),
        lambda: add(client, upload_id, b"x"),
    ):
        with pytest.raises(openai.BadRequestError, match="expired"):
            call()


# ---- what makes no sense


def test_what_does_not_fit_is_told(client: openai.OpenAI) -> None:
    upload_id = begin(client, 6)
    first, second = add(client, upload_id, b"abc"), add(client, upload_id, b"def")
    other = add(client, begin(client, 6), b"def")
    for fields, code in (
        ({"part_ids": [first]}, "bytes_mismatch"),
        ({"part_ids": [first, first]}, "invalid_value"),
        ({"part_ids": [first, other]}, "part_not_found"),
        ({"part_ids": [first, "../../x"]}, "part_not_found"),
        ({"part_ids": []}, "invalid_value"),
        ({"part_ids": [first, second], "md5": hashlib.md5(b"x").hexdigest()}, "checksum_mismatch"),
        ({"part_ids": [first, second], "md5": "x"}, "invalid_value"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.uploads.complete(upload_id, **fields)  # type: ignore[arg-type]
        assert caught.value.code == code, fields
    assert client.uploads.complete(upload_id, part_ids=[first, second]).status == "completed"
    for fields in ({"num_bytes": 0}, {"purpose": "fine-tune"}, {"filename": ""}, {"expires_after": {"seconds": 1}}):
        with pytest.raises(openai.BadRequestError):
            begin(client, **{"num_bytes": 6, **fields})  # type: ignore[arg-type]


def test_sizes_are_limited(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        begin(client, LIMITS["max_file_bytes"] + 1)
    assert (caught.value.status_code, caught.value.code) == (413, "file_too_large")
    upload_id = begin(client, 2 * MIB)
    for num_bytes in (MIB + 1, 2 * MIB):  # of a part, and of its whole body
        with pytest.raises(openai.APIStatusError) as caught:
            add(client, upload_id, b"x" * num_bytes)
        assert caught.value.status_code == 413
    assert add(client, upload_id, b"x" * MIB)
    small = begin(client, 3)
    with pytest.raises(openai.APIStatusError) as caught:
        add(client, small, b"abcd")
    assert caught.value.status_code == 413


def test_another_tenants_upload_is_not_there(server: Server, client: openai.OpenAI) -> None:
    upload_id = begin(client, 3)
    part = add(client, upload_id, b"abc")
    with server.client("globex") as other:
        for call in (
            lambda: add(other, upload_id, b"abc"),
            lambda: other.uploads.complete(upload_id, part_ids=[part]),
            lambda: other.uploads.cancel(upload_id),
            lambda: other.uploads.cancel("upload_" + "0" * 32),
            lambda: other.uploads.cancel("..%2f"),
        ):
            with pytest.raises(openai.NotFoundError):
                call()
    assert client.uploads.complete(upload_id, part_ids=[part]).status == "completed"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"--b",
        b'--b\r\nContent-Disposition: form-data; name="data"; filename="a"\r\n\r\nabc',
        b'--b\r\nContent-Disposition: form-data; name="data"; filename="a"\r\n\r\n\r\n--b--\r\n',
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nabc\r\n--b--\r\n',
        b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--b--\r\n',
    ],
)
def test_a_malformed_part_is_a_400_and_leaves_nothing(server: Server, client: openai.OpenAI, body: bytes) -> None:
    upload_id = begin(client, 3)
    url, headers = f"{server.url}/uploads/{upload_id}/parts", {"Authorization": f"Bearer {server.keys['acme']}"}
    response = httpx.post(url, content=body, headers={**headers, "Content-Type": "multipart/form-data; boundary=b"})
    assert response.status_code == 400
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    store = Path(server.tree["store"]) / "t" / "acme"
    assert not (store / "pieces" / upload_id).exists()
    assert not [path for path in (store / "content" / upload_id).rglob("*") if path.is_file()]


# ---- killed in between, and swept


class Breaking(State):
    """Its next file is not written, as if the process had been killed before."""

    is_broken = True

    def create_file(self, record: FileRecord) -> None:
        if self.is_broken:
            raise StorageError("killed")
        super().create_file(record)


def put_piece(state: State, record: UploadRecord, data: bytes) -> str:
    piece_id = make_piece_id(state.now())
    folder = make_piece_folder(record, piece_id)
    state.storage.put(make_part_path(record.tenant, folder, 0), data)
    state.create_piece(record, piece_id, Piece(folder=folder, part_bytes=(len(data),)))
    return piece_id


ASKED = CreateUpload(bytes=6, filename="f", mime_type="x", purpose="user_data")


def test_a_completion_that_was_cut_off_is_made_whole_by_the_next(tmp_path: Path) -> None:
    state = Breaking(str(tmp_path))
    record = create_upload(state, "acme", ASKED, "f", None)
    asked = CompleteUpload(part_ids=[put_piece(state, record, b"abc"), put_piece(state, record, b"def")])
    with pytest.raises(StorageError, match="killed"):
        complete_upload(state, record, asked)
    assert state.list_file_ids("acme") == []
    state.is_broken = False
    known = state.read_upload("acme", record.id)
    assert known is not None
    done = complete_upload(state, known, asked)
    assert done.file is not None
    assert state.list_file_ids("acme") == [done.file.id]


def test_a_completion_that_was_cut_off_for_good_leaves_nothing(tmp_path: Path) -> None:
    now = [1_000_000.0]
    state = Breaking(str(tmp_path), now=lambda: now[0])
    record = create_upload(state, "acme", ASKED, "f", None)
    with pytest.raises(StorageError, match="killed"):
        complete_upload(state, record, CompleteUpload(part_ids=[put_piece(state, record, b"abcdef")]))
    now[0] += ABANDONED_S + LIFETIME_S + 1
    sweep(state, pytest.fail)
    assert state.storage.list_files("t") == []


def test_the_sweep_keeps_what_files_are_made_of(tmp_path: Path) -> None:
    now = [1_000_000.0]
    state = State(str(tmp_path), now=lambda: now[0])
    record = create_upload(state, "acme", ASKED, "f", None)
    used, unused = put_piece(state, record, b"abcdef"), put_piece(state, record, b"unused")
    file = complete_upload(state, record, CompleteUpload(part_ids=[used])).file
    assert file is not None
    left = create_upload(state, "acme", ASKED, "f", None)
    put_piece(state, left, b"abc")
    state.storage.put(make_part_path("acme", make_piece_folder(left, make_piece_id(now[0])), 0), b"killed on its way")
    now[0] += ABANDONED_S
    sweep(state, pytest.fail)
    assert len(state.list_upload_ids("acme")) == 2  # a part may still be on its way
    now[0] += LIFETIME_S + 1
    sweep(state, pytest.fail)
    assert state.list_upload_ids("acme") == []
    kept = [info.path for info in state.storage.list_files("t")]
    assert kept == [make_part_path("acme", make_piece_folder(record, used), 0), f"t/acme/files/{file.id}.json"]
    assert unused not in str(kept)
    state.delete_file(file)
    assert state.storage.list_files("t") == []
