"""The Range header of a download. Pure."""

import re

_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


class Unsatisfiable(Exception):
    """The range lies outside the file."""


def parse_range(header: str | None, num_bytes: int) -> tuple[int, int] | None:
    """(start, end) of one range; None where the whole file is to be sent: no header, several ranges, or one that isn't
    understood, as the standard has it. Raises Unsatisfiable."""
    found = _RANGE.fullmatch(header or "")
    if found is None or found[1] == found[2] == "":
        return None
    if found[1] == "":
        length = int(found[2])
        if length == 0 or num_bytes == 0:
            raise Unsatisfiable
        return max(0, num_bytes - length), num_bytes
    start = int(found[1])
    end = num_bytes if found[2] == "" else min(int(found[2]) + 1, num_bytes)
    if found[2] != "" and int(found[2]) < start:
        return None
    if start >= num_bytes:
        raise Unsatisfiable
    return start, end
