"""A digest of rows by content: the same for the same rows in the same order, however they are cut into batches, row groups
or files, and however Arrow lays them out. Pure.

For each column, and each level of a nested one, three streams are hashed: whether a value is there (a byte each), lengths
of lists and texts (8 bytes each), and the values that are there. Order, types and names count.
"""

import hashlib
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc


class RowDigest:
    """Takes tables of one schema, in order. Dictionaries and views count as the values that they stand for."""

    def __init__(self, schema: pa.Schema) -> None:
        self.num_rows = 0
        self._streams: dict[str, Any] = {}
        self._schema = pa.schema([pa.field(field.name, _plain(field.type)) for field in schema])

    def add(self, table: pa.Table) -> None:
        self.num_rows += table.num_rows
        for field in self._schema:
            for chunk in table[field.name].chunks:
                self._add(field.name, chunk.cast(field.type))

    def hexdigest(self) -> str:
        """Of all that was added."""
        whole = hashlib.sha256(_describe(self._schema).encode())
        whole.update(str(self.num_rows).encode())
        for name in sorted(self._streams):
            whole.update(name.encode() + b"\0" + self._streams[name].digest())
        return whole.hexdigest()

    def _feed(self, name: str, data: bytes | memoryview) -> None:
        self._streams.setdefault(name, hashlib.sha256()).update(data)

    def _add(self, name: str, array: pa.Array) -> None:
        self._feed(f"{name}\0valid", _bytes_of(pc.cast(pc.is_valid(array), pa.uint8())))
        values, kind = array.drop_null(), array.type
        if pa.types.is_struct(kind):
            for place, field in enumerate(kind):
                self._add(f"{name}\0{place}.{field.name}", pc.struct_field(values, place))
        elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
            self._feed(f"{name}\0length", _bytes_of(pc.cast(pc.list_value_length(values), pa.int64())))
            self._add(f"{name}\0item", pc.list_flatten(values))
        elif pa.types.is_large_binary(kind):
            self._feed(f"{name}\0length", _bytes_of(pc.cast(pc.binary_length(values), pa.int64())))
            self._feed(f"{name}\0data", _text_bytes(values))
        elif pa.types.is_boolean(kind):
            self._feed(f"{name}\0data", _bytes_of(pc.cast(values, pa.uint8())))
        elif not pa.types.is_null(kind):
            self._feed(f"{name}\0data", _bytes_of(values))


def _describe(schema: pa.Schema) -> str:
    return "\n".join(f"{field.name}: {field.type}" for field in schema)


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type that a value is hashed as: offsets of 64 bits, no dictionaries, no views, no extension."""
    if isinstance(kind, pa.ExtensionType):
        return _plain(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return _plain(kind.value_type)
    if _is_text(kind):
        return pa.large_binary()
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(field.name, _plain(field.type)) for field in kind])
    if pa.types.is_map(kind):
        pair = pa.struct([("key", _plain(kind.key_type)), ("value", _plain(kind.item_type))])
        return pa.large_list(pair)
    if _is_list(kind):
        return pa.large_list(pa.field("item", _plain(kind.value_type)))
    return kind


def _is_list(kind: pa.DataType) -> bool:
    types = pa.types
    tests = (types.is_list, types.is_large_list, types.is_fixed_size_list)
    return any(test(kind) for test in tests)


def _is_text(kind: pa.DataType) -> bool:
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    binary = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
    return any(test(kind) for test in (*tests, *binary))


def _bytes_of(array: pa.Array) -> memoryview:
    """Of values of a fixed width, none null."""
    data = array.buffers()[1]
    if data is None:
        return memoryview(b"")
    width = array.type.bit_width // 8
    return memoryview(data)[array.offset * width : (array.offset + len(array)) * width]


def _text_bytes(array: pa.Array) -> memoryview:
    """Of a large_binary array, none null: from its first value's first byte to its last one's last."""
    _, offsets, data = array.buffers()
    if offsets is None or data is None or len(array) == 0:
        return memoryview(b"")
    ends = memoryview(offsets).cast("q")
    return memoryview(data)[ends[array.offset] : ends[array.offset + len(array)]]
