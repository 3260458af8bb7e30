"""Ids of files, uploads and batches: nobody can guess one, and their order is that of their making.

48 bits of milliseconds, then 80 random bits: a listing by name is a listing by time, and an id tells nothing of others.
What is not an id of ours is nobody's: it never becomes part of a path.
"""

import hashlib
import re
import secrets

FILE_ID = re.compile(r"file-[0-9a-f]{32}")
BATCH_ID = re.compile(r"batch_[0-9a-f]{32}")
UPLOAD_ID = re.compile(r"upload_[0-9a-f]{32}")
PIECE_ID = re.compile(r"part_[0-9a-f]{32}")


def make_file_id(now_s: float) -> str:
    return f"file-{_make_tail(now_s)}"


def make_batch_id(now_s: float) -> str:
    return f"batch_{_make_tail(now_s)}"


def make_upload_id(now_s: float) -> str:
    return f"upload_{_make_tail(now_s)}"


def make_piece_id(now_s: float) -> str:
    return f"part_{_make_tail(now_s)}"


def _make_tail(now_s: float) -> str:
    return f"{int(now_s * 1000) & (2**48 - 1):012x}{secrets.token_hex(10)}"


def read_made_at(id_: str) -> float:
    """Seconds since the epoch, as an id of ours says."""
    return int(id_[-32:-20], 16) / 1000


def make_dated_digest(now_s: float, *parts: str) -> str:
    """The tail of an id that the parts alone decide, beside their time: for what has an identity already."""
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    return f"{int(now_s * 1000) & (2**48 - 1):012x}{digest[:20]}"


def is_dated_digest(tail: str, *parts: str) -> bool:
    """Could it be of these parts, at whatever time?"""
    return tail[12:] == make_dated_digest(0.0, *parts)[12:]


def make_digest(*parts: str) -> str:
    """24 hexadecimal digits that the parts decide."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def is_file_id(text: str) -> bool:
    return FILE_ID.fullmatch(text) is not None


def is_batch_id(text: str) -> bool:
    return BATCH_ID.fullmatch(text) is not None


def is_upload_id(text: str) -> bool:
    return UPLOAD_ID.fullmatch(text) is not None


def is_piece_id(text: str) -> bool:
    return PIECE_ID.fullmatch(text) is not None
