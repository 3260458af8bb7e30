"""What staging a checkpoint has to do: which files, in which parts, how each is checked, where the copy goes. Pure.

A copy's folder is named after its source and the versions of its files, so a changed source goes to another folder and
nobody's open copy is touched. What was fetched is recorded part by part in a sidecar, `_PARTS.jsonl`, which stays in the
finished copy: it is what a later check compares the disk with.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from batchgen.errors import SpecError, StorageError

MARKER = "_STAGED.json"
SIDECAR = "_PARTS.jsonl"
MARKER_VERSION = 1
OURS = frozenset({MARKER, SIDECAR})
SUMS = "SHA256SUMS"

What = Literal["model", "tokenizer"]
# Twins of the safetensors in other formats, which no engine here reads.
_TWINS = re.compile(r"^(pytorch_model.*\.bin|consolidated.*|.*\.(pth|pt|h5|msgpack|gguf|onnx)|(original|onnx)/.*)$")
_WEIGHTS = re.compile(r"\.(safetensors|bin|pth|pt|h5|msgpack|gguf|onnx)$")
_SUM_LINE = re.compile(r"^([0-9a-fA-F]{64})(?: [ *])?(.*)$")
# File systems keep some of a disk to themselves.
SPARE_SHARE = 0.01


@dataclass(frozen=True, slots=True)
class SourceFile:
    """`version`: as the store gives it; asked for with every part. `md5`, `sha256`: hexadecimal, where known."""

    path: str
    num_bytes: int
    version: str
    md5: str | None = None
    sha256: str | None = None


@dataclass(frozen=True, slots=True, order=True)
class Part:
    path: str
    start: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class StagePlan:
    source: str
    what: What
    files: tuple[SourceFile, ...]

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)

    @property
    def key(self) -> str:
        """Of the source, whatever its version: what the lock is named after."""
        digest = hashlib.sha256(f"{self.what} {self.source}".encode()).hexdigest()[:8]
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", self.source.rstrip("/").rpartition("/")[2]).strip("-.") or "model"
        return f"{name[:80]}-{digest}"

    @property
    def folder(self) -> str:
        """Of the source as it is now."""
        entries = [(file.path, file.num_bytes, file.version) for file in self.files]
        return f"{self.key}-{hashlib.sha256(json.dumps(entries).encode()).hexdigest()[:12]}"

    def marker(self) -> dict[str, Any]:
        return {"version": MARKER_VERSION, "source": self.source, "files": [asdict(file) for file in self.files]}


@dataclass(slots=True)
class Fetched:
    """What a sidecar says: whole files, and checksums of parts by (path, start, bytes)."""

    files: set[str] = field(default_factory=set)
    parts: dict[Part, int] = field(default_factory=dict)

    def drop(self, path: str) -> None:
        self.files.discard(path)
        self.parts = {part: crc for part, crc in self.parts.items() if part.path != path}

    def list_parts(self, path: str) -> list[Part]:
        return sorted(part for part in self.parts if part.path == path)


def choose_files(paths: Iterable[str], what: What) -> list[str]:
    """Those that an engine needs, or a tokenizer alone. Raises SpecError for a name that would leave the folder."""
    visible = [path for path in paths if path not in OURS and not any(part.startswith(".") for part in path.split("/"))]
    if strange := [path for path in visible if path.startswith("/") or "" in path.split("/") or "\0" in path]:
        raise SpecError(f"model.path: holds a file with the impossible name {strange[0]!r}; rename it")
    if what == "tokenizer":
        return [path for path in visible if "/" not in path and not _WEIGHTS.search(path)]
    has_safetensors = any(path.endswith(".safetensors") and "/" not in path for path in visible)
    return [path for path in visible if not (has_safetensors and _TWINS.match(path))]


def list_sum_files(paths: Iterable[str]) -> list[str]:
    """Files that hold checksums of others: `SHA256SUMS`, and `X.sha256` beside an X."""
    known = set(paths)
    return sorted(p for p in known if p == SUMS or (p.endswith(".sha256") and p.removesuffix(".sha256") in known))


def parse_sums(path: str, text: str) -> dict[str, str]:
    """SHA-256 by file, of a file as `sha256sum` writes it; a lone sum in `X.sha256` is X's. Raises SpecError."""
    sums: dict[str, str] = {}
    for line in filter(None, (line.strip() for line in text.splitlines())):
        found = _SUM_LINE.match(line)
        if found is None:
            raise SpecError(f"model.path: {path} is not what sha256sum writes; mend it or delete it")
        name = path.removesuffix(".sha256") if path != SUMS else found.group(2).strip().removeprefix("./")
        sums[name] = found.group(1).lower()
    return sums


def list_parts(file: SourceFile, part_bytes: int) -> list[Part]:
    """In order, without a gap; none for an empty file."""
    starts = range(0, file.num_bytes, part_bytes)
    return [Part(file.path, start, min(part_bytes, file.num_bytes - start)) for start in starts]


def format_part(part: Part, crc: int) -> str:
    return json.dumps({**asdict(part), "crc32": crc}) + "\n"


def format_file(file: SourceFile) -> str:
    return json.dumps({"path": file.path, "is_whole": True}) + "\n"


def parse_sidecar(lines: Iterable[str]) -> Fetched:
    """Whoever wrote it may have been killed at any byte: a line that is not whole says nothing."""
    fetched = Fetched()
    for entry in _parse_lines(lines):
        if entry.get("is_whole"):
            fetched.files.add(entry["path"])
        else:
            fetched.parts[Part(entry["path"], entry["start"], entry["num_bytes"])] = entry["crc32"]
    return fetched


def _parse_lines(lines: Iterable[str]) -> Iterator[Mapping[str, Any]]:
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and "path" in entry and ("is_whole" in entry or "crc32" in entry):
            yield entry


def check_space(plan: StagePlan, *, folder: str, num_there: int, num_free: int, older: Iterable[str] = ()) -> None:
    """Raises StorageError before a disk is filled. `num_there`: bytes of the copy that are on the disk already."""
    needed = plan.num_bytes - num_there
    if needed * (1 + SPARE_SHARE) <= num_free:
        return
    hint = "".join(f"; an older copy of it is {path}" for path in older)
    raise StorageError(
        f"cannot copy {plan.source} to {folder}: it takes {format_bytes(needed)} more and {format_bytes(num_free)} are "
        f"free there; free some space or set model.stage_dir to a larger disk{hint}"
    )


def format_bytes(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if abs(num_bytes) < 1000:
            return f"{num_bytes:,.0f} {unit}" if unit == "B" else f"{num_bytes:,.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.2f} TB"
