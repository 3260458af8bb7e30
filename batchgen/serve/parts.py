"""A file's content as parts of some MiB, so that no process ever holds all of it: written as they come, read by range.

Blocking. A part is one object of the store; parts without a record are nobody's, and are what a killed writer leaves.
"""

from collections.abc import Iterator

from batchgen.serve.records import FileRecord
from batchgen.serve.state import State, make_part_path

PART_BYTES = 8 * 2**20


class PartWriter:
    """Writes parts into one folder of content, which has a file's id. The same bytes make the same parts, so a repeated
    write changes nothing."""

    def __init__(self, state: State, tenant: str, folder: str) -> None:
        self._state, self._tenant, self._folder = state, tenant, folder
        self._buffer = bytearray()
        self._sizes: list[int] = []

    @property
    def is_full(self) -> bool:
        """Would `flush` write something now? Whoever may not block does it elsewhere."""
        return len(self._buffer) >= PART_BYTES

    @property
    def num_bytes(self) -> int:
        return sum(self._sizes) + len(self._buffer)

    def add(self, data: bytes) -> None:
        self._buffer += data

    def write(self, data: bytes) -> None:
        self.add(data)
        self.flush()

    def flush(self) -> None:
        while self.is_full:
            self._put(PART_BYTES)

    def close(self) -> tuple[int, ...]:
        """The sizes of all parts."""
        self.flush()
        if self._buffer:
            self._put(len(self._buffer))
        return tuple(self._sizes)

    def abandon(self) -> None:
        """What was written is deleted again."""
        paths = [make_part_path(self._tenant, self._folder, number) for number in range(len(self._sizes))]
        self._state.storage.delete_many(paths)

    def _put(self, num_bytes: int) -> None:
        path = make_part_path(self._tenant, self._folder, len(self._sizes))
        with memoryview(self._buffer) as view:
            data = view[:num_bytes].tobytes()  # a client's thread may hold it a moment longer than `put` lasts
        self._state.storage.put(path, data)
        del self._buffer[:num_bytes]
        self._sizes.append(num_bytes)


def read_content(state: State, record: FileRecord, start: int = 0, end: int | None = None) -> Iterator[bytes]:
    """The bytes from `start` up to `end`, a part at a time. Raises NotFound when the file is deleted meanwhile."""
    end = record.num_bytes if end is None else end
    position = 0
    for folder, number, num_bytes in record.parts:
        first, last = max(start - position, 0), min(end - position, num_bytes)
        if first < last:
            data = state.storage.read_bytes(make_part_path(record.tenant, folder, number))
            yield data if last - first == num_bytes else data[first:last]
        position += num_bytes
