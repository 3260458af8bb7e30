"""What a user reads when a store can't be used: one sentence with the URL and the mend, and never a secret."""

import pickle
import re
from pathlib import Path

import pytest
from s3_server import S3Proxy

from batchgen.errors import InputError, OutputError, StorageError
from batchgen.storage import Storage, list_inputs, read_text
from batchgen.stores.probe import probe


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")


def sentences(url: str) -> list[str]:
    """What a user would read: of an output folder, and of an input."""
    with pytest.raises(OutputError) as output:
        probe(Storage(url))
    with pytest.raises(InputError) as listed:
        list_inputs(url)
    for error in (output, listed):
        assert url in str(error.value)
        assert "\n" not in str(error.value)
        assert "secret" not in str(error.value)
        assert type(pickle.loads(pickle.dumps(error.value))) is error.type
    return [str(output.value), str(listed.value)]


@pytest.mark.s3
def test_missing_bucket(s3_url: str) -> None:
    del s3_url
    for sentence in sentences("s3://no-such-bucket/out"):
        assert "the bucket does not exist; create it or correct the URL" in sentence


@pytest.mark.s3
@pytest.mark.usefixtures("impatient")
def test_unreachable_endpoint(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    for sentence in sentences(s3_url):
        assert "the store cannot be reached; check AWS_ENDPOINT_URL and the network" in sentence


@pytest.mark.s3
@pytest.mark.usefixtures("impatient")
def test_no_credentials(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    for sentence in sentences(s3_url):
        assert "no usable AWS credentials were found; set AWS_ACCESS_KEY_ID" in sentence


@pytest.mark.s3
@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (403, "AccessDenied", "access is denied; let these credentials"),
        (403, "InvalidAccessKeyId", "(access|key)"),
        (503, "SlowDown", "(slow down|not available).*; start it again later"),
        (418, "Teapot", r"the store answered (Teapot|418); "),
    ],
)
def test_refusals(s3_url: str, s3_proxy: S3Proxy, status: int, code: str, expected: str) -> None:
    s3_proxy.answer(status, code)
    for sentence in sentences(s3_url):
        assert re.search(expected, sentence), sentence


def test_unwritable_folders(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="a part of the path is a file, not a folder; choose another"):
        probe(Storage(f"{tmp_path}/file/out"))
    with pytest.raises(OutputError, match="can't be the output folder"):
        probe(Storage("/proc/batchgen"))


def test_a_password_in_a_url_is_refused_and_not_repeated() -> None:
    for use in (Storage, read_text, list_inputs):
        with pytest.raises((StorageError, InputError), match="leave credentials to the environment") as caught:
            use("s3://key:hunter2@bucket/x")
        assert "hunter2" not in str(caught.value)
