"""Puts virtual time under Python and the production code. Import it before anything of batchgen, in a process of its own:
`time.monotonic` and others become default arguments when batchgen's modules load.

What is replaced: clocks, sleep, random ids, threads (by strands, or done at once), the engine that is made, the opener of
clients, the store's probe and the operating system's word on dead processes. All else is what users run.
"""

import concurrent.futures
import functools
import random
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any

import pyarrow as pa
import pyarrow.acero as acero
import pyarrow.parquet as pq

from .kernel import Kernel, Threading

_kernels: list[Kernel] = []
_real_monotonic, _real_time, _real_sleep, _real_uuid4 = time.monotonic, time.time, time.sleep, uuid.uuid4


def enter(kernel: Kernel) -> None:
    _kernels.append(kernel)
    random.seed(kernel.rng.random())


def leave() -> None:
    _kernels.pop()


def get_kernel() -> Kernel:
    return _kernels[-1]


def _monotonic() -> float:
    return _kernels[-1].monotonic() if _kernels else _real_monotonic()


def _wall() -> float:
    return _kernels[-1].wall() if _kernels else _real_time()


def _sleep(seconds: float) -> None:
    if _kernels:
        _kernels[-1].sleep(seconds)
    else:
        _real_sleep(seconds)


def _uuid4() -> uuid.UUID:
    return uuid.UUID(int=_kernels[-1].rng.getrandbits(128), version=4) if _kernels else _real_uuid4()


class InlineExecutor:
    """A ThreadPoolExecutor that does everything at once, in the order given."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> "InlineExecutor":
        return self

    def __exit__(self, *_: object) -> None: ...

    def map(self, work: Callable[..., Any], *items: Iterable[Any]) -> Iterator[Any]:
        return iter([work(*arguments) for arguments in zip(*items, strict=False)])

    def submit(self, work: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        future.set_result(work(*arguments))
        return future


time.monotonic, time.time, time.sleep, uuid.uuid4 = _monotonic, _wall, _sleep, _uuid4
concurrent.futures.ThreadPoolExecutor = InlineExecutor  # type: ignore[misc,assignment]


def _read_table(source: Any, columns: list[str] | None = None) -> pa.Table:
    """The same bytes hold the same table: a dozen runs of a world read the same plan, stats and commits over and over."""
    return _parse_table(bytes(source.read()), None if columns is None else tuple(columns))


@functools.lru_cache(1024)
def _parse_table(data: bytes, columns: tuple[str, ...] | None) -> pa.Table:
    return pq.ParquetFile(pa.BufferReader(data)).read(columns=None if columns is None else list(columns))


def _without_threads(owner: Any, name: str) -> None:
    """Arrow's own threads bring nothing to files of ten rows but the wait for them."""
    work = getattr(owner, name)
    setattr(owner, name, lambda *args, **options: work(*args, **{**options, "use_threads": False}))


def _open_parquet(self: pq.ParquetFile, source: Any, **options: Any) -> None:
    """From memory, for the same reason: a Python file would be read ahead by threads."""
    held = source if isinstance(source, pa.NativeFile) else pa.BufferReader(source.read())
    _real_open(self, held, **{**options, "pre_buffer": False})


for _name in ("read", "read_row_group", "iter_batches"):
    _without_threads(pq.ParquetFile, _name)
_without_threads(acero, "_group_by")
_real_open, pq.ParquetFile.__init__ = pq.ParquetFile.__init__, _open_parquet
pq.read_table = _read_table

from batchgen.driver import run  # noqa: E402, I001
from batchgen.driver import hold  # noqa: E402
from batchgen.driver import lease as driver_lease  # noqa: E402
from batchgen.stores.probe import StoreAbilities  # noqa: E402
from batchgen.reuse import carrier  # noqa: E402
from batchgen.worker import worker  # noqa: E402

threads = Threading(get_kernel)
hold.threading = threads  # type: ignore[assignment]
driver_lease.threading = threads  # type: ignore[assignment]
carrier.threading = threads  # type: ignore[assignment]
hold.probe = lambda _: StoreAbilities(is_exclusive=True, can_replace=True, reason=None)
__all__ = ["driver_lease", "enter", "get_kernel", "hold", "leave", "run", "worker"]
