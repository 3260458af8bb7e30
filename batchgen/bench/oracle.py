"""What is possible at all: the exact makespan of rows on slots that never wait for anybody. Pure."""

import heapq
from collections.abc import Iterable, Sequence


def find_makespan_s(services_s: Iterable[float], slots: int) -> float:
    """Each row, in this order, takes the slot that is free first; seconds until the last one ends."""
    free_at = [0.0] * slots
    for service_s in services_s:
        heapq.heapreplace(free_at, free_at[0] + service_s)
    return max(free_at)


def find_fifo_s(services_s: Sequence[float], slots: int) -> float:
    """In the order of the input: the best that is possible without knowing lengths."""
    return find_makespan_s(services_s, slots)


def find_longest_first_s(services_s: Sequence[float], slots: int) -> float:
    """Knowing them. No schedule is more than a third shorter, and none is shorter than `find_bound_s`."""
    return find_makespan_s(sorted(services_s, reverse=True), slots)


def find_bound_s(services_s: Sequence[float], slots: int) -> float:
    """No schedule ends before this."""
    return max(sum(services_s) / slots, max(services_s, default=0.0))


def find_saturation(services_s: Sequence[float], slots: int, makespan_s: float) -> float:
    """Share of slot time, from the first start to the last end, that did work."""
    return sum(services_s) / (slots * makespan_s) if makespan_s > 0 else 0.0
