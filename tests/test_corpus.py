"""Real and malformed Parquet files from another project: each ends in rows or in a refusal that names it.

Never a traceback, a crash of the process, or a hang. Every column is passed through, so that what can be read is written
and verified too. The files lie beside the checkout and are no part of it.
"""

import json
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CORPUS = Path(__file__).parents[2] / "shared" / "data" / "parquet_corpus"
FILES = sorted(path.relative_to(CORPUS).as_posix() for path in CORPUS.rglob("*") if path.is_file())
TIMEOUT_S = 60.0

pytestmark = pytest.mark.skipif(not FILES, reason=f"the Parquet corpus is not at {CORPUS}")


class Child:
    """A process that looks at one file after the other; a new one after a crash or a hang."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str] = queue.Queue()

    def look(self, path: Path) -> dict[str, Any]:
        process = self._process or self._start()
        assert process.stdin is not None
        process.stdin.write(f"{path}\n")
        process.stdin.flush()
        try:
            line = self._lines.get(timeout=TIMEOUT_S)
        except queue.Empty:
            self.stop()
            pytest.fail(f"{path.name}: no end after {TIMEOUT_S:g} s")
        if not line:
            self.stop()
            pytest.fail(f"{path.name}: the process died")
        return dict(json.loads(line))

    def _start(self) -> "subprocess.Popen[str]":
        command = [sys.executable, str(Path(__file__).with_name("corpus_child.py"))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._lines = queue.Queue()
        threading.Thread(target=pump, args=(self._process, self._lines), daemon=True).start()
        return self._process

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def pump(process: "subprocess.Popen[str]", lines: "queue.Queue[str]") -> None:
    """Its lines, and an empty one at its end."""
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put("")


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    looking = Child()
    yield looking
    looking.stop()


@pytest.mark.parametrize("name", FILES)
def test_every_file_is_read_or_refused_by_name(child: Child, name: str) -> None:
    said = child.look(CORPUS / name)
    assert said["ended"] in {"finished", "refused"}, said
    if said["ended"] == "refused":
        assert name.rpartition("/")[2] in said["why"] or said["why"].startswith("input.paths: "), said
        assert (said["validate"], "; " in said["why"]) == (2, True), said
    else:
        assert said["rows"]["is_complete"]
        assert said["found"] == []


def test_a_page_with_a_wrong_checksum_is_no_prompt(child: Child) -> None:
    said = child.look(CORPUS / "data/datapage_v1-corrupt-checksum.parquet")
    assert said["rows"]["error"] > 0
    said = child.look(CORPUS / "data/datapage_v1-uncompressed-checksum.parquet")
    assert said["rows"]["error"] == 0


def test_encrypted_columns_are_refused_with_the_mend(child: Child) -> None:
    said = child.look(CORPUS / "data/encrypt_columns_plaintext_footer.parquet.encrypted")
    assert "has encrypted columns, which are not supported; decrypt it first" in said["why"]
