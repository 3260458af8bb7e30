"""A multipart body becomes a file in the store, or a piece of one, part by part as it arrives: no more than one part of it
is in memory.

The record comes last: what breaks off before that leaves parts that nobody sees, and they are deleted here. The sweep does
it where that can't be known here: this process is killed, a part or the record may be on its way still.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from batchgen.serve.errors import ApiError, bad_request
from batchgen.serve.ids import make_file_id
from batchgen.serve.parts import PartWriter
from batchgen.serve.records import FileRecord, Piece, make_file_record
from batchgen.serve.spec import Limits
from batchgen.serve.state import State
from batchgen.serve.wire import Purpose

MAX_FIELD_BYTES = 1024
MAX_PARTS = 16
PURPOSES: tuple[Purpose, ...] = ("batch", "user_data")
FILE_FIELDS = ("purpose", "expires_after[anchor]", "expires_after[seconds]")


@dataclass(slots=True)
class Form:
    """What the parser has seen. Its callbacks only note; the writer is flushed between two pieces of the body."""

    writer: PartWriter
    max_bytes: int
    file_field: str = "file"
    other_fields: tuple[str, ...] = FILE_FIELDS
    fields: dict[str, bytes] = field(default_factory=dict)
    filename: str | None = None
    is_whole: bool = False
    _headers: dict[bytes, bytes] = field(default_factory=dict)
    _name: str = ""
    _is_file: bool = False
    _header: tuple[bytearray, bytearray] = field(default_factory=lambda: (bytearray(), bytearray()))
    _num_parts: int = 0

    def make_parser(self, content_type: str) -> MultipartParser:
        """Raises ApiError for another kind of body."""
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary")
        if kind != b"multipart/form-data" or not boundary:
            named = " and ".join((self.file_field, *self.other_fields[:1]))
            raise bad_request(f"send multipart/form-data with {named}", self.file_field, "invalid_body")
        try:
            return MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin_part,
                    "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
                    "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
                    "on_header_end": self._end_header,
                    "on_headers_finished": self._begin_data,
                    "on_part_data": self._add_data,
                    "on_end": self._end,
                },
            )
        except FormParserError:
            raise bad_request("the multipart boundary is malformed", self.file_field, "invalid_body") from None

    def _begin_part(self) -> None:
        self._headers = {}
        self._num_parts += 1
        if self._num_parts > MAX_PARTS:
            raise bad_request(f"the body has more than {MAX_PARTS} fields", None, "invalid_body")

    def _end_header(self) -> None:
        name, value = self._header
        self._headers[bytes(name).lower()] = bytes(value)
        self._header = (bytearray(), bytearray())

    def _begin_data(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        self._name = options.get(b"name", b"").decode(errors="replace")
        self._is_file = self._name == self.file_field
        if not self._is_file:
            if self._name not in self.other_fields:
                named = ", ".join((self.file_field, *self.other_fields))
                raise bad_request(f"a field is none of {named}", None, "unknown_parameter")
            self.fields[self._name] = b""
            return
        if self.filename is not None:
            raise bad_request("send one file at a time", self.file_field, "invalid_body")
        self.filename = clean_name(options.get(b"filename", b"").decode(errors="replace"))

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        if not self._is_file:
            self.fields[self._name] += data[start:end]
            if len(self.fields[self._name]) > MAX_FIELD_BYTES:
                raise bad_request(f"the field {self._name} is too long", self._name, "invalid_value")
            return
        self.writer.add(data[start:end])
        if self.writer.num_bytes > self.max_bytes:
            raise make_too_large(self.max_bytes, self.file_field)

    def _end(self) -> None:
        self.is_whole = True


def make_too_large(most: int, param: str) -> ApiError:
    told = f"The file is larger than the {most} bytes that are taken here."
    return ApiError(413, told, param=param, code="file_too_large")


def clean_name(name: str) -> str:
    """As it will be shown: the last part of a path, without control characters. It never names anything in the store."""
    bare = name.replace("\\", "/").rpartition("/")[2]
    return "".join(char for char in bare if char.isprintable())[:255] or "file"


async def receive(form: Form, parser: MultipartParser, body: AsyncIterator[bytes]) -> None:
    """The whole body; what is not written yet is in the writer. Raises ApiError for one that is not whole."""
    async for data in body:
        try:
            parser.write(data)
        except FormParserError:
            raise bad_request("the multipart body is malformed", form.file_field, "invalid_body") from None
        if form.writer.is_full:
            await asyncio.to_thread(form.writer.flush)
    if not form.is_whole:
        raise bad_request("the multipart body breaks off", form.file_field, "invalid_body")
    if form.filename is None:
        raise bad_request(f"{form.file_field} is required", form.file_field, "missing_required_parameter")


async def receive_file(
    state: State, tenant: str, content_type: str, body: AsyncIterator[bytes], limits: Limits
) -> FileRecord:
    """The file, which is in the store then. Raises ApiError; whatever else is raised leaves no file either."""
    file_id = make_file_id(state.now())
    writer = PartWriter(state, tenant, file_id)
    form = Form(writer, limits.max_file_bytes)
    parser = form.make_parser(content_type)
    await asyncio.to_thread(state.begin_upload, tenant, file_id)
    has_begun_record = False
    try:
        await receive(form, parser, body)
        record = make_record(state, tenant, file_id, form, limits)
        sizes = await asyncio.to_thread(writer.close)
        record = record.model_copy(update={"part_bytes": sizes})
        has_begun_record = True
        await asyncio.to_thread(state.create_file, record)
    except BaseException as error:
        if not has_begun_record:  # else a file without its parts might come to be seen
            await asyncio.to_thread(writer.abandon)
            if isinstance(error, Exception):  # and no thread of a cancelled call is at work on a part
                await asyncio.to_thread(state.end_upload, tenant, file_id)
        raise
    await asyncio.to_thread(state.end_upload, tenant, file_id)
    return record


async def receive_piece(
    state: State, tenant: str, folder: str, content_type: str, body: AsyncIterator[bytes], max_bytes: int
) -> Piece:
    """Its bytes, which lie there then, and are nobody's yet. Raises ApiError; what stays behind the sweep finds."""
    writer = PartWriter(state, tenant, folder)
    form = Form(writer, max_bytes, "data", ())
    parser = form.make_parser(content_type)
    try:
        await receive(form, parser, body)
        if not writer.num_bytes:
            raise bad_request("data is empty", "data", "invalid_value")
        return Piece(folder=folder, part_bytes=await asyncio.to_thread(writer.close))
    except BaseException:
        await asyncio.to_thread(writer.abandon)
        raise


def make_record(state: State, tenant: str, file_id: str, form: Form, limits: Limits) -> FileRecord:
    """Raises ApiError for a form that holds what it may not."""
    assert form.filename is not None
    purpose = form.fields.get("purpose", b"").decode(errors="replace")
    if purpose not in PURPOSES:
        raise bad_request(f"purpose must be one of {', '.join(PURPOSES)}", "purpose", "invalid_value")
    kept_s = choose_kept_s(read_expiry(form.fields), purpose, limits)
    return make_file_record(file_id, tenant, form.filename, purpose, kept_s, state.now())


def choose_kept_s(asked_s: int | None, purpose: Purpose, limits: Limits) -> int | None:
    """How long a file is kept (s); None: until it is deleted."""
    return int(limits.file_expires_s) if asked_s is None and purpose == "batch" else asked_s


def read_expiry(fields: dict[str, bytes]) -> int | None:
    """Seconds, where the form says so. Raises ApiError."""
    anchor, seconds = fields.get("expires_after[anchor]"), fields.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return None
    if anchor != b"created_at":
        raise bad_request("expires_after.anchor must be created_at", "expires_after", "invalid_value")
    text = (seconds or b"").decode(errors="replace")
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and 3600 <= int(text) <= 2_592_000):
        raise bad_request("expires_after.seconds must be 3600 to 2592000", "expires_after", "invalid_value")
    return int(text)
