"""Which client serves a URL. A vendor is imported when its URL is met."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from batchgen.stores.base import Client
from batchgen.stores.local import LocalClient

Opener = Callable[[str], Client]
_SCHEME = re.compile(r"^([a-zA-Z][a-zA-Z0-9+.-]*)://")
# The last one is asked.
_openers: list[Opener] = []


def scheme_of(url: str) -> str:
    """'' for a local path."""
    found = _SCHEME.match(url)
    return found.group(1).lower() if found else ""


def open_client(url: str) -> Client:
    """The client for a folder or file of this name."""
    return _openers[-1](url) if _openers else open_real_client(url)


def open_real_client(url: str) -> Client:
    """The clients of S3 and memory share what is costly."""
    scheme = scheme_of(url)
    if not scheme:
        return LocalClient(url)
    if scheme == "s3":
        from batchgen.stores.s3 import S3Client

        return S3Client()
    from batchgen.stores.remote import FsspecClient, MemoryClient

    return MemoryClient() if scheme == "memory" else FsspecClient(scheme)


@contextmanager
def opening_through(opener: Opener) -> Iterator[None]:
    """Every client that this process opens meanwhile is made by `opener`: where `faults` come between us and a store, and
    where a simulation puts its own. One at a time, set up before any work begins."""
    _openers.append(opener)
    try:
        yield
    finally:
        _openers.remove(opener)
