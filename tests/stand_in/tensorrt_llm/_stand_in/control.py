"""The control file, read when it changes. Standard library only: the ranks load it by path."""

import json
from pathlib import Path
from typing import Any


class Control:
    """Switches and one-shot faults; what the faults were when it was made never fires."""

    def __init__(self, path: str | None) -> None:
        self._path = Path(path) if path else None
        self._stamp: tuple[int, int] | None = None
        self._values: dict[str, Any] = {}
        self._seen: dict[str, Any] = {}
        self._read()
        self._seen = dict(self._values)

    def get(self, name: str, default: Any = None) -> Any:
        self._read()
        return self._values.get(name, default)

    def has_fired(self, name: str, rank: int | None = None) -> bool:
        """Whether a one-shot fault was set since the last look, for this rank."""
        value = self.get(name)
        if value == self._seen.get(name):
            return False
        self._seen[name] = value
        target = value[1] if isinstance(value, list) else 0
        return value is not None and (rank is None or rank == target)

    def _read(self) -> None:
        if self._path is None:
            return
        try:
            stat = self._path.stat()
            if (stat.st_mtime_ns, stat.st_ino) != self._stamp:
                self._values = json.loads(self._path.read_text())
                self._stamp = (stat.st_mtime_ns, stat.st_ino)
        except FileNotFoundError:
            self._values = {}
