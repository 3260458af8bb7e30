"""Sets of rows as ranges: sorted, disjoint, half open `(start, end)` pairs of source rows. Pure.

A shard's rows in flight are named so in leases, events and control files: a few numbers, whatever their count.
"""

from collections.abc import Iterable, Iterator
from itertools import chain

RowRanges = tuple[tuple[int, int], ...]


def make_ranges(rows: Iterable[int]) -> RowRanges:
    """The smallest ranges that hold exactly these rows, given in any order."""
    ranges: list[tuple[int, int]] = []
    for row in sorted(set(rows)):
        if ranges and ranges[-1][1] == row:
            ranges[-1] = (ranges[-1][0], row + 1)
        else:
            ranges.append((row, row + 1))
    return tuple(ranges)


def count_rows(ranges: RowRanges) -> int:
    return sum(end - start for start, end in ranges)


def iter_rows(ranges: RowRanges) -> Iterator[int]:
    return chain.from_iterable(range(start, end) for start, end in ranges)


def subtract(ranges: RowRanges, taken: RowRanges) -> RowRanges:
    """What of the rows is not among those taken."""
    left: list[tuple[int, int]] = []
    for start, end in ranges:
        for taken_start, taken_end in taken:
            if taken_end <= start or end <= taken_start:
                continue
            if start < taken_start:
                left.append((start, taken_start))
            start = taken_end
            if start >= end:
                break
        if start < end:
            left.append((start, end))
    return tuple(left)


def unite(one: RowRanges, other: RowRanges) -> RowRanges:
    united: list[tuple[int, int]] = []
    for start, end in sorted((*one, *other)):
        if united and start <= united[-1][1]:
            united[-1] = (united[-1][0], max(end, united[-1][1]))
        else:
            united.append((start, end))
    return tuple(united)


def take_first(ranges: RowRanges, num_rows: int) -> tuple[RowRanges, RowRanges]:
    """(the first so many rows, the rest)."""
    first: list[tuple[int, int]] = []
    for place, (start, end) in enumerate(ranges):
        if num_rows <= 0:
            return tuple(first), ranges[place:]
        cut = min(end, start + num_rows)
        first.append((start, cut))
        num_rows -= cut - start
        if cut < end:
            return tuple(first), ((cut, end), *ranges[place + 1 :])
    return tuple(first), ()
