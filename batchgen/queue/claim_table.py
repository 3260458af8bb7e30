"""Which row of a job answers for a fingerprint: the first that asked. Pure, and compact: the driver holds millions.

Keys and values are 64 bits: half of a fingerprint, and a place (`make_place`), 16 bytes a claim in open addressing, so 20
to 45. No more than `MAX_CLAIMS` are held, in two halves: where the younger is full the older is forgotten, so the last
8.4 million claims are known, at least. Parts that grow by themselves keep growing from holding the driver up.
"""

from array import array

from batchgen.records import Slot

MAX_CLAIMS = 2**24
NUM_PARTS = 256
FIRST_SIZE = 16
MAX_FULL = 0.7
# A place: shard number above, the request's number in its input file below.
REQUEST_BITS = 44
NUM_KEY_BYTES = 8


def make_place(shard_number: int, slot: Slot, n: int) -> int:
    """`n`: requests a row."""
    return shard_number << REQUEST_BITS | (slot[0] * n + slot[1])


def get_shard(place: int) -> int:
    return place >> REQUEST_BITS


def get_slot(place: int, n: int) -> Slot:
    return divmod(place & (1 << REQUEST_BITS) - 1, n)


def make_key(fingerprint: bytes) -> int:
    """Never 0. Two fingerprints may have one: whoever reads an answer compares the whole."""
    return int.from_bytes(fingerprint[:NUM_KEY_BYTES], "little") or 1


class ClaimTable:
    """See the module."""

    def __init__(self, max_claims: int = MAX_CLAIMS) -> None:
        self._max_young = max(1, max_claims // 2)
        self._young, self._old = _Half(), _Half()

    def get(self, key: int) -> int | None:
        place = self._young.get(key)
        return self._old.get(key) if place is None else place

    def set(self, key: int, place: int) -> None:
        """Claimed first, or anew."""
        if self._young.num_claims >= self._max_young:
            self._young, self._old = _Half(), self._young
        self._young.set(key, place)

    @property
    def num_bytes(self) -> int:
        return self._young.num_bytes + self._old.num_bytes


class _Half:
    def __init__(self) -> None:
        self._parts = [_Part() for _ in range(NUM_PARTS)]
        self.num_claims = 0

    def get(self, key: int) -> int | None:
        return self._parts[key >> 56].get(key)

    def set(self, key: int, place: int) -> None:
        self.num_claims += self._parts[key >> 56].set(key, place)

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self._parts)


class _Part:
    """Open addressing, a power of two of places; 0 is no key."""

    __slots__ = ("_keys", "_num", "_places")

    def __init__(self) -> None:
        self._keys, self._places, self._num = _make_zeros(FIRST_SIZE), _make_zeros(FIRST_SIZE), 0

    def get(self, key: int) -> int | None:
        at = self._find(key)
        return self._places[at] if self._keys[at] else None

    def set(self, key: int, place: int) -> bool:
        """Is it new here?"""
        at = self._find(key)
        is_new = self._keys[at] == 0
        self._keys[at], self._places[at] = key, place
        self._num += is_new
        if self._num > MAX_FULL * len(self._keys):
            self._grow()
        return is_new

    @property
    def num_bytes(self) -> int:
        return 2 * len(self._keys) * self._keys.itemsize

    def _find(self, key: int) -> int:
        """Where it is, or would be."""
        keys, mask = self._keys, len(self._keys) - 1
        at = key & mask
        while (found := keys[at]) and found != key:
            at = (at + 1) & mask
        return at

    def _grow(self) -> None:
        keys, places, size = self._keys, self._places, 2 * len(self._keys)
        self._keys, self._places = _make_zeros(size), _make_zeros(size)
        for key, place in zip(keys, places, strict=True):
            if key:
                at = self._find(key)
                self._keys[at], self._places[at] = key, place


def _make_zeros(size: int) -> "array[int]":
    return array("Q", bytes(8 * size))
