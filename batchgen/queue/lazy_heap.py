"""Keys in order of a rank that changes, each step O(log n). Pure.

A changed or dropped key leaves its old entry in the heap until it comes to the top, or until half of the heap is such
leavings: then it is made anew, which costs O(1) for each change since the last time.
"""

import heapq
from typing import Generic, TypeVar

KeyT = TypeVar("KeyT", int, str)
RankT = TypeVar("RankT", float, tuple[float, str])

SPARE_ENTRIES = 64


class LazyHeap(Generic[KeyT, RankT]):
    """Lowest rank first; among equals the lowest key."""

    def __init__(self) -> None:
        self._ranks: dict[KeyT, RankT] = {}
        self._heap: list[tuple[RankT, KeyT]] = []

    def __len__(self) -> int:
        return len(self._ranks)

    def __contains__(self, key: KeyT) -> bool:
        return key in self._ranks

    def set(self, key: KeyT, rank: RankT) -> None:
        """Put a key in its place, there already or not."""
        if self._ranks.get(key) == rank:
            return
        self._ranks[key] = rank
        heapq.heappush(self._heap, (rank, key))
        if len(self._heap) > 2 * len(self._ranks) + SPARE_ENTRIES:
            self._heap = [(rank, key) for key, rank in self._ranks.items()]
            heapq.heapify(self._heap)

    def discard(self, key: KeyT) -> None:
        self._ranks.pop(key, None)

    def peek(self) -> tuple[RankT, KeyT] | None:
        """(rank, key) of the first; None when there is none."""
        while self._heap:
            rank, key = self._heap[0]
            if self._ranks.get(key) == rank:
                return rank, key
            heapq.heappop(self._heap)
        return None
