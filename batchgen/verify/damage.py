"""What parsing a file that somebody changed may raise, as one refusal. For our own files in the output folder only."""

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa

from batchgen.errors import BatchgenError, OutputError

RESTORE = "restore it, or start a new output.path"
# Damaged bytes decode to anything: numbers that are no sizes, names that are no fields, text that is no JSON. Arrow asks
# for as much memory as a damaged length says (ArrowMemoryError); an operating system that has no more says MemoryError.
OF_DAMAGE = (
    pa.ArrowException,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    OSError,
)


@contextmanager
def refusing_damage(where: str, what: str, kind: type[BatchgenError] = OutputError) -> Iterator[None]:
    """An error of this kind, 'where: what', for whatever comes of damaged bytes. Errors of ours (the store's too) pass."""
    try:
        yield
    except BatchgenError:
        raise
    except OF_DAMAGE as error:
        raise kind(f"{where}: {what}") from error
