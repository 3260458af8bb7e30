"""What the files of a Hugging Face checkpoint say of themselves: safetensors headers, the index, the modules' kinds. Pure.

A safetensors file is 8 bytes (little endian: the header's length), the header (JSON: name -> dtype, shape, offsets into
the data) and the data, without a gap and with nothing behind it (the format's own description). So a header and a size
tell a whole file from a truncated one without reading the weights.
"""

import json
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

INDEX = "model.safetensors.index.json"
QUANT_CONFIG = "hf_quant_config.json"
LENGTH_BYTES = 8
# The format's reference reader refuses longer ones.
MAX_HEADER_BYTES = 100_000_000

_EXPERT = re.compile(r"\.experts\.\d+\.")
_SCALES = (".weight_scale_2", ".weight_scale", ".input_scale")


@dataclass(frozen=True, slots=True)
class Tensor:
    """`dtype` in the format's words: BF16, F32, F8_E4M3, U8, …"""

    name: str
    dtype: str
    num_bytes: int
    shape: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class CheckpointFacts:
    """`sizes`: bytes by path. `indexed`: the files that the index names; None without an index. `faults`: sentences on
    broken files. `packed`: modules with NVFP4 weights; `plain`: those whose `weight` is a plain matrix (experts stand for
    each other: `experts.N`). Weight bytes without the routed experts', and theirs."""

    source: str
    sizes: Mapping[str, int]
    config: Mapping[str, Any]
    quant_config: Mapping[str, Any] | None = None
    indexed: frozenset[str] | None = None
    faults: tuple[str, ...] = ()
    packed: frozenset[str] = frozenset()
    plain: frozenset[str] = frozenset()
    num_shared_bytes: int = 0
    num_expert_bytes: int = 0

    @property
    def num_weight_bytes(self) -> int:
        return self.num_shared_bytes + self.num_expert_bytes

    @property
    def missing(self) -> list[str]:
        """Files that the index names and that are not there."""
        return sorted((self.indexed or frozenset()) - self.sizes.keys())


@dataclass(slots=True)
class Modules:
    """Gathers tensors of many files."""

    packed: set[str] = field(default_factory=set)
    matrices: set[str] = field(default_factory=set)
    num_shared_bytes: int = 0
    num_expert_bytes: int = 0

    def add(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            if _EXPERT.search(tensor.name):
                self.num_expert_bytes += tensor.num_bytes
            else:
                self.num_shared_bytes += tensor.num_bytes
            name = name_experts(tensor.name)
            if name.endswith(_SCALES[0]):
                self.packed.add(name.removesuffix(_SCALES[0]))
            elif name.endswith(".weight") and not name.endswith("norm.weight"):
                self.matrices.add(name.removesuffix(".weight"))

    @property
    def plain(self) -> frozenset[str]:
        return frozenset(self.matrices - self.packed)


def name_experts(name: str) -> str:
    """One name for all experts of a layer: there are 256 of them, quantised alike."""
    return _EXPERT.sub(".experts.N.", name)


def read_length(start: bytes) -> int:
    """Bytes of the header, from the first 8 of the file. Raises ValueError, a clause that says what is wrong."""
    if len(start) < LENGTH_BYTES:
        raise ValueError(f"is {len(start)} bytes long, too short for a safetensors file")
    (length,) = struct.unpack("<Q", start[:LENGTH_BYTES])
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise ValueError("is no safetensors file: its first 8 bytes give no sane header length")
    return int(length)


def parse_header(header: bytes, num_file_bytes: int) -> list[Tensor]:
    """The tensors of a file of this size. Raises ValueError, a clause that says what is wrong."""
    try:
        entries = json.loads(header)
        tensors = {name: (entry, *entry["data_offsets"]) for name, entry in entries.items() if name != META}
        ends = [int(end) for _, _, end in tensors.values()]
        found = [
            Tensor(name, str(entry["dtype"]), end - start, tuple(map(int, entry["shape"])))
            for name, (entry, start, end) in tensors.items()
        ]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError("has a header that is not safetensors JSON; it is damaged") from error
    expected = LENGTH_BYTES + len(header) + max(ends, default=0)
    if num_file_bytes != expected:
        kind = "truncated" if num_file_bytes < expected else "too long"
        raise ValueError(f"is {kind}: {num_file_bytes:,} bytes where its header asks for {expected:,}")
    return found


META = "__metadata__"


def parse_index(text: str) -> frozenset[str]:
    """The files that an index names. Raises ValueError."""
    try:
        return frozenset(str(name) for name in json.loads(text)["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError("is no safetensors index: it has no weight_map") from error
