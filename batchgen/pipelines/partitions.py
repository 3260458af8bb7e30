"""The partitions of a date: every combination of the values that a pipeline names, each with a name of its own. Pure.

The name stands in submission ids, paths and the log, so it has no more than letters, digits, `_`, `-` and `.`: values that
have others, or are long, end in a digest of themselves instead. A pipeline without partitions has one, named ''.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from itertools import product

from batchgen.pipelines.spec import PipelineSpec

Partition = Mapping[str, str]
_PLAIN = re.compile(r"[A-Za-z0-9_-]{1,40}")
_MAX_PLAIN = 80


def list_partitions(spec: PipelineSpec) -> dict[str, dict[str, str]]:
    """Values by the partition's name, in the order in which they are written."""
    combinations = product(*spec.partitions.values())
    return {make_partition_name(values): dict(zip(spec.partitions, values, strict=True)) for values in combinations}


def make_partition_name(values: Sequence[str]) -> str:
    """Unlike that of any other values; '' of none."""
    if not values:
        return ""
    plain = ".".join(values)
    if len(plain) <= _MAX_PLAIN and all(_PLAIN.fullmatch(value) for value in values):
        return plain
    readable = re.sub(r"[^A-Za-z0-9_-]+", "-", "-".join(values))[:40].strip("-")
    digest = hashlib.sha256("\0".join(values).encode()).hexdigest()[:12]
    return f"{readable}.{digest}".lstrip(".")
