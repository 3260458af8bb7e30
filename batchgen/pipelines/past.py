"""How dates ended of which nothing but their end is remembered: two bit sets a month, a bit a minute. Pure.

A key is a whole minute, so a month of any schedule fits 45,000 bits, and what a schedule does is regular: packed, a month
takes about a hundred bytes, however often the pipeline runs: so the history of ten years can be copied in one piece.
"""

import base64
import zlib
from dataclasses import dataclass, field, replace
from datetime import UTC
from typing import Literal

from batchgen.pipelines.calendar import parse_key

End = Literal["succeeded", "failed"]


@dataclass(frozen=True, slots=True)
class Month:
    """`succeeded`, `failed`: packed bit sets. `max_attempt`: the highest number of any attempt of its failed dates."""

    succeeded: str = ""
    failed: str = ""
    num_succeeded: int = 0
    num_failed: int = 0
    max_attempt: int = 0


@dataclass(slots=True)
class Past:
    """By the first seven letters of keys: `2026-11`."""

    months: dict[str, Month] = field(default_factory=dict)

    def add(self, key: str, end: End, attempt: int) -> None:
        """It ended so. Counted once, and as it ended last."""
        self.discard(key)
        name, bit = _locate(key)
        month = self.months.get(name, Month())
        if end == "succeeded":
            new = replace(month, succeeded=_pack(_unpack(month.succeeded) | bit), num_succeeded=month.num_succeeded + 1)
        else:
            new = replace(month, failed=_pack(_unpack(month.failed) | bit), num_failed=month.num_failed + 1)
            new = replace(new, max_attempt=max(month.max_attempt, attempt))
        self.months[name] = new

    def discard(self, key: str) -> int:
        """Forget it. The number that its next attempt has to be above."""
        name, bit = _locate(key)
        month, end = self.months.get(name), self.get_end(key)
        if month is None or end is None:
            return 0
        if end == "succeeded":
            new = replace(
                month, succeeded=_pack(_unpack(month.succeeded) & ~bit), num_succeeded=month.num_succeeded - 1
            )
        else:
            new = replace(month, failed=_pack(_unpack(month.failed) & ~bit), num_failed=month.num_failed - 1)
        self.months[name] = new
        return month.max_attempt

    def get_end(self, key: str) -> End | None:
        name, bit = _locate(key)
        month = self.months.get(name)
        if month is None:
            return None
        if _unpack(month.succeeded) & bit:
            return "succeeded"
        return "failed" if _unpack(month.failed) & bit else None

    def count(self, end: End) -> int:
        months = self.months.values()
        return sum(month.num_succeeded if end == "succeeded" else month.num_failed for month in months)


def _locate(key: str) -> tuple[str, int]:
    """(month, the bit of its minute)."""
    date = parse_key(key).astimezone(UTC)
    return key[:7], 1 << (((date.day - 1) * 24 + date.hour) * 60 + date.minute)


def _pack(bits: int) -> str:
    raw = bits.to_bytes((bits.bit_length() + 7) // 8, "little")
    return base64.b85encode(zlib.compress(raw, 6)).decode() if bits else ""


def _unpack(text: str) -> int:
    return int.from_bytes(zlib.decompress(base64.b85decode(text)), "little") if text else 0
