"""How many answers have a text that another one has, from what each file says of its own: samples that add up. Pure.

Repeats within a file are counted. Those between files are estimated from digests of the texts: of a file's different texts
those are kept whose digest ends in `num_bits` zeros, as few bits as leave no more than there is room for. So a text is
drawn by itself: kept by one file, it is kept by every other that has it and as few bits. Nothing is estimated where no
digest was left out. A text that fills half of the output repeats within files, so no draw can miss it; between files each
text counts once a file at most.
"""

import base64
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Digests = npt.NDArray[np.uint64]

# In a file: 43 kB of its footer as text.
MAX_DIGESTS = 4096
# At whoever adds them up: 16 MiB, and some times that while they are sorted.
MAX_ADDED = 2**21
NO_DIGESTS: Digests = np.empty(0, np.uint64)


@dataclass(frozen=True, slots=True)
class TextSample:
    """Of one file: how many answers, how many different texts, and the digests of those texts that were drawn."""

    num_answers: int
    num_texts: int
    num_bits: int
    digests: Digests


def digest_texts(rows: pa.Table) -> Digests:
    """8 bytes of digest of each answer's text, in order. Needs the columns status and text."""
    ok = rows.select(["status", "text"]).filter(pc.equal(rows["status"], "ok"))
    views = (view for part in ok["text"].chunks for view in _iter_bytes(part))
    digests = b"".join(hashlib.blake2b(view, digest_size=8).digest() for view in views)
    return np.frombuffer(digests, "<u8")


def _iter_bytes(texts: pa.Array) -> Iterator[memoryview]:
    """Each text where it lies: a copy of each would double what they take. A null is an empty one."""
    plain = pc.fill_null(texts, "").cast(pa.large_binary())
    _, offsets, data = plain.buffers()
    ends = np.frombuffer(offsets, np.int64)[plain.offset : plain.offset + len(plain) + 1].tolist() if len(plain) else []
    view = memoryview(b"" if data is None else data)
    return (view[start:end] for start, end in pairwise(ends))


def make_text_sample(parts: Sequence[Digests], max_digests: int = MAX_DIGESTS) -> TextSample:
    """Of the digests of all answers of a file."""
    digests = np.concatenate([NO_DIGESTS, *parts])
    kept, num_bits = np.unique(digests), 0
    num_texts = len(kept)
    while len(kept) > max_digests:
        num_bits += 1
        kept = _choose(kept, num_bits)
    return TextSample(len(digests), num_texts, num_bits, kept)


def _choose(digests: Digests, num_bits: int) -> Digests:
    chosen: Digests = digests[digests & np.uint64(2**num_bits - 1) == 0]
    return chosen


def dump_text_sample(sample: TextSample) -> bytes:
    """As text, for readers of Parquet that take its metadata for nothing else."""
    fields = {"num_answers": sample.num_answers, "num_texts": sample.num_texts, "num_bits": sample.num_bits}
    return json.dumps({**fields, "digests": base64.b64encode(sample.digests.tobytes()).decode()}).encode()


def parse_text_sample(raw: bytes) -> TextSample:
    """Raises ValueError for what is none."""
    fields = json.loads(raw)
    try:
        digests = np.frombuffer(base64.b64decode(fields["digests"]), "<u8")
        return TextSample(int(fields["num_answers"]), int(fields["num_texts"]), int(fields["num_bits"]), digests)
    except (KeyError, TypeError) as error:
        raise ValueError("no sample of texts") from error


@dataclass(slots=True)
class TextTally:
    """Many files' samples, added up in bounded memory. In any order the same comes out."""

    num_answers: int = 0
    num_texts: int = 0
    _num_bits: int = 0
    _digests: list[Digests] = field(default_factory=list)
    _num_kept: int = 0

    def add(self, sample: TextSample) -> None:
        self.num_answers += sample.num_answers
        self.num_texts += sample.num_texts
        if sample.num_bits > self._num_bits:
            self._keep(sample.num_bits)
        digests = sample.digests if sample.num_bits == self._num_bits else _choose(sample.digests, self._num_bits)
        self._digests.append(digests)
        self._num_kept += len(digests)
        while self._num_kept > MAX_ADDED:
            self._keep(self._num_bits + 1)

    def _keep(self, num_bits: int) -> None:
        self._num_bits = num_bits
        self._digests = [_choose(np.concatenate([NO_DIGESTS, *self._digests]), num_bits)]
        self._num_kept = len(self._digests[0])

    def count_repeated(self) -> int:
        """Answers whose text another one has, the first of each text not counted."""
        drawn = np.concatenate([NO_DIGESTS, *self._digests])
        share = (len(drawn) - len(np.unique(drawn))) / len(drawn) if len(drawn) else 0.0
        return self.num_answers - self.num_texts + round(self.num_texts * share)
