"""S3 and what speaks its protocol, over s3fs.

Endpoint, region and credentials come from the standard AWS environment and are renewed by botocore's own chain.
Listings are never cached. A condition travels with the request (`If-None-Match: *`, `If-Match`), also when a
multipart upload is completed. Every request is tried 8 times (AWS_MAX_ATTEMPTS, AWS_RETRY_MODE), so a dead endpoint
costs about half a minute. An upload that is cut off by SIGKILL leaves parts which only a lifecycle rule removes.
"""

import asyncio
import contextlib
import os
import random
import re
import time
from typing import Any

import s3fs
from fsspec.asyn import sync

from batchgen.errors import AlreadyExists, Conflict, NotFound, StorageError
from batchgen.stores.base import (
    ABSENT,
    FileInfo,
    StoreFile,
    error_code,
    is_missing,
    is_refused,
    make_error,
    make_read_error,
)
from batchgen.stores.remote import MAX_READ_TRIES, TRANSIENT, FsspecClient, explanation, mapped, vendor_errors

PART_BYTES = 50 * 2**20
# A connection that says nothing for so long is tried anew.
READ_TIMEOUT_S = 60.0
_ONE_PUT_BYTES = 2 * PART_BYTES
_PARALLEL_PARTS = 4
_MAX_CREATE_TRIES = 6
_MD5 = re.compile(r"[0-9a-f]{32}")
_PUT_RACE_CODES = frozenset({"ConditionalRequestConflict", "OperationAborted", "409"})


def open_s3() -> s3fs.S3FileSystem:
    """One instance a process (s3fs keeps it). What the environment sets is left to botocore."""
    retries: dict[str, Any] = {}
    if "AWS_RETRY_MODE" not in os.environ:
        retries["mode"] = "standard"
    if "AWS_MAX_ATTEMPTS" not in os.environ:
        retries["total_max_attempts"] = 8
    options: dict[str, Any] = {"max_pool_connections": 64, "connect_timeout": 10, "read_timeout": READ_TIMEOUT_S}
    if retries:
        options["retries"] = retries
    # The body is signed with its SHA-256 anyway; the checksum trailer is what other makers' stores stumble over.
    if "AWS_REQUEST_CHECKSUM_CALCULATION" not in os.environ:
        options["request_checksum_calculation"] = "when_required"
    if "AWS_RESPONSE_CHECKSUM_VALIDATION" not in os.environ:
        options["response_checksum_validation"] = "when_required"
    store = s3fs.S3FileSystem(use_listings_cache=False, config_kwargs=options)
    store.retries = 2  # on top of botocore's, for a body that breaks off; the default 5 would square the wait
    return store


class S3Client(FsspecClient):
    can_replace = True

    def __init__(self) -> None:
        super().__init__("s3")

    def _open_fs(self, kind: Any) -> Any:
        del kind
        return open_s3()

    def _bare(self, url: str) -> str:
        return url.partition("://")[2]

    def _at(self, url: str) -> dict[str, str]:
        bucket, key, _ = self._fs.split_path(self._bare(url))
        return {"Bucket": bucket, "Key": key}

    def info(self, name: str) -> FileInfo | None:
        """HEAD alone: s3fs's own `info` goes on to look for a folder of that name."""
        if not self._at(name)["Key"]:
            return None
        try:
            with mapped(name):
                head = self._fs.call_s3("head_object", **self._at(name))
        except NotFound:
            return None
        etag = head["ETag"].strip('"')
        return FileInfo(name, head["ContentLength"], etag, etag if self._is_md5(name, head) else None)

    def _is_md5(self, name: str, head: dict[str, Any]) -> bool:
        """The etag is the content's MD5 unless the object was uploaded in parts, encrypted by a key of KMS or of the
        customer's, or lies in a directory bucket (AWS's documentation of PutObject's ETag)."""
        is_keyed = "SSECustomerAlgorithm" in head or head.get("ServerSideEncryption", "AES256") != "AES256"
        is_directory = self._at(name)["Bucket"].endswith("--x-s3")
        return not is_keyed and not is_directory and bool(_MD5.fullmatch(head["ETag"].strip('"')))

    def read_range(self, name: str, start: int, num_bytes: int, version: str) -> bytes:
        at = {**self._at(name), "Range": f"bytes={start}-{start + num_bytes - 1}", "IfMatch": f'"{version}"'}
        return self._read(name, at)[0]

    def read(self, name: str) -> tuple[bytes, str]:
        return self._read(name, self._at(name))

    def _read(self, name: str, at: dict[str, str]) -> tuple[bytes, str]:
        for tries_left in reversed(range(MAX_READ_TRIES)):
            try:
                data, etag = sync(self._fs.loop, self._get, at)
            except vendor_errors() as error:
                if is_refused(error):
                    raise Conflict(f"{name} was changed while it was read") from error
                if not (tries_left and isinstance(error, TRANSIENT)):
                    raise make_read_error(name, error, explanation(error)) from error
            else:
                return data, etag.strip('"')
        raise AssertionError("the last try returns or raises")

    async def _get(self, at: dict[str, str]) -> tuple[bytes, str]:
        response = await self._fs._call_s3("get_object", **at)
        async with response["Body"] as body:
            return await body.read(), response["ETag"]

    def open(self, name: str, block_bytes: int) -> StoreFile:
        """s3fs's file sends `If-Match` with every range, so there is nothing left to verify at the end."""
        with mapped(name):
            raw = self._fs.open(self._bare(name), "rb", block_size=block_bytes)
        return StoreFile(raw, name, raw.details["ETag"].strip('"'), mapped, lambda: None)

    def write(self, name: str, data: bytes | memoryview, if_version: str | None) -> str:
        headers = {} if if_version is None else {"IfMatch": f'"{if_version}"'} if if_version else {"IfNoneMatch": "*"}
        for tries_left in reversed(range(_MAX_CREATE_TRIES)):
            try:
                return str(sync(self._fs.loop, self._upload, self._at(name), memoryview(data).cast("B"), headers))
            except vendor_errors() as error:
                if not (tries_left and error_code(error) in _PUT_RACE_CODES):
                    raise self._write_error(name, if_version, error) from error
            # Two conditional writes met: neither may have won, so the loser asks again, at a time of its own.
            time.sleep(random.uniform(0.02, 0.2) * (_MAX_CREATE_TRIES - tries_left))
        raise AssertionError("the last try returns or raises")

    def _write_error(self, name: str, if_version: str | None, error: BaseException) -> StorageError:
        # A completed multipart upload is gone: whoever repeats a completion whose reply was lost meets NoSuchUpload.
        is_repeated = error_code(error) == "NoSuchUpload" and self.info(name) is not None
        if if_version == ABSENT and (is_refused(error) or is_repeated):
            return AlreadyExists(f"{name} exists already")
        if if_version and (is_refused(error) or is_missing(error) or is_repeated):
            return Conflict(f"{name} was changed by another writer")
        return make_error("write", name, error, explanation(error))

    async def _upload(self, at: dict[str, str], data: memoryview, headers: dict[str, str]) -> str:
        if data.nbytes < _ONE_PUT_BYTES:
            out = await self._fs._call_s3("put_object", **at, Body=bytes(data), **headers)
        else:
            out = await self._upload_parts(at, data, headers)
        return str(out["ETag"]).strip('"')

    async def _upload_parts(self, at: dict[str, str], data: memoryview, headers: dict[str, str]) -> Any:
        upload = {**at, "UploadId": (await self._fs._call_s3("create_multipart_upload", **at))["UploadId"]}
        is_done = False
        try:
            parts: list[dict[str, Any]] = []
            numbers = range(1, -(-data.nbytes // PART_BYTES) + 1)
            for first in range(0, len(numbers), _PARALLEL_PARTS):
                some = numbers[first : first + _PARALLEL_PARTS]
                parts += await asyncio.gather(*[self._upload_part(upload, data, number) for number in some])
            out = await self._fs._call_s3(
                "complete_multipart_upload", **upload, MultipartUpload={"Parts": parts}, **headers
            )
            is_done = True
            return out
        finally:
            if not is_done:
                with contextlib.suppress(*vendor_errors()):  # what failed before is the error to report
                    await self._fs._call_s3("abort_multipart_upload", **upload)

    async def _upload_part(self, upload: dict[str, str], data: memoryview, number: int) -> dict[str, Any]:
        body = bytes(data[(number - 1) * PART_BYTES : number * PART_BYTES])
        out = await self._fs._call_s3("upload_part", **upload, PartNumber=number, Body=body)
        return {"PartNumber": number, "ETag": out["ETag"]}

    def delete(self, name: str) -> None:
        """One by one on purpose: some stores refuse the bulk request for want of a Content-MD5."""
        try:
            with mapped(name, "delete"):
                self._fs.call_s3("delete_object", **self._at(name))
        except StorageError as error:
            if not is_missing(error):
                raise
