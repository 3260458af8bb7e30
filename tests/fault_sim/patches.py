"""Puts virtual time under Python and the production code. Import it before anything of batchgen, in a process of its own:
`time.monotonic` and others become default arguments when batchgen's modules load.

What is replaced: clocks, sleep, random ids, threads (by strands, or done at once), the engine that is made, the opener of
clients, the store's probe and the operating system's word on dead processes. All else is what users run.
"""

import concurrent.futures
import functools
import gc
import io
import itertools
import math
import random
import time
import types
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any

import pyarrow as pa
import pyarrow.acero as acero
import pyarrow.parquet as pq

from .kernel import Kernel, Threading

COLLECT_WORLDS = 10
_num_worlds = itertools.count(1)
_kernels: list[Kernel] = []
_digests: dict[str, str | None] = {}
_real_monotonic, _real_time, _real_sleep, _real_uuid4 = time.monotonic, time.time, time.sleep, uuid.uuid4


def enter(kernel: Kernel) -> None:
    _kernels.append(kernel)
    random.seed(kernel.rng.random())


def leave() -> None:
    _kernels.pop()


def collect_garbage() -> None:
    """After some worlds: it takes as long for one."""
    if next(_num_worlds) % COLLECT_WORLDS == 0:
        gc.collect()


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


class CachedParquet:
    """A `pq.ParquetFile` as `batchgen.parquet` uses it. The same bytes hold the same rows: a dozen runs of a world, and its
    `verify`, read the same plan, journal, stats and commits over and over. An error is met anew each time."""

    def __init__(self, source: Any, *, pre_buffer: bool, page_checksum_verification: bool) -> None:
        del pre_buffer  # by threads of Arrow's, which bring nothing to files of ten rows but the wait for them
        self._data = source.getvalue() if isinstance(source, io.BytesIO) else bytes(source.read())
        self._is_checked = page_checksum_verification
        file = _open_parquet(self._data, page_checksum_verification)
        self.metadata, self.schema_arrow, self.num_row_groups = file.metadata, file.schema_arrow, file.num_row_groups

    def read(self, columns: list[str] | None, *, use_threads: bool) -> pa.Table:
        del use_threads
        return _read_parquet(self._data, self._is_checked, None, columns and tuple(columns))

    def read_row_group(self, number: int, columns: list[str] | None, *, use_threads: bool) -> pa.Table:
        del use_threads
        return _read_parquet(self._data, self._is_checked, number, columns and tuple(columns))

    def iter_batches(
        self, max_rows: int, *, use_threads: bool, columns: list[str] | None, row_groups: list[int] | None
    ) -> Iterator[pa.RecordBatch]:
        file = _open_parquet(self._data, self._is_checked)
        return file.iter_batches(max_rows, use_threads=use_threads, columns=columns, row_groups=row_groups)


class _Opened:
    """A real one, with what it would make anew each time that it is asked."""

    def __init__(self, data: bytes, is_checked: bool) -> None:
        file = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False, page_checksum_verification=is_checked)
        self.read, self.read_row_group, self.iter_batches = file.read, file.read_row_group, file.iter_batches
        self.metadata, self.schema_arrow, self.num_row_groups = file.metadata, file.schema_arrow, file.num_row_groups


@functools.lru_cache(256)
def _open_parquet(data: bytes, is_checked: bool) -> _Opened:
    return _Opened(data, is_checked)


@functools.lru_cache(1024)
def _read_parquet(data: bytes, is_checked: bool, group: int | None, columns: tuple[str, ...] | None) -> pa.Table:
    file, names = _open_parquet(data, is_checked), None if columns is None else list(columns)
    if group is None:
        return file.read(columns=names, use_threads=False)
    return file.read_row_group(group, columns=names, use_threads=False)


class QuickWriter(pq.ParquetWriter):
    """Files of ten rows, as they are: zstd makes a context for each of their columns, which is half of writing them; and
    nobody asks for what Parquet can tell of their values."""

    def __init__(self, where: Any, schema: pa.Schema, **options: Any) -> None:
        plain = {"compression": "none", "compression_level": None, "use_dictionary": False, "write_statistics": False}
        super().__init__(where, schema, **{**options, **plain})


def _digest_tokenizer(spec: Any) -> str | None:
    """The embedded model's, whose files do not change while worlds run."""
    assert spec.model.path == "embedded"
    if spec.engine.kind not in _digests:
        _digests[spec.engine.kind] = tokenizer_files.digest_tokenizer(spec)
    return _digests[spec.engine.kind]


def _group_by_in_this_thread(*args: Any, **options: Any) -> pa.Table:
    return _group_by(*args, **{**options, "use_threads": False})


_group_by = acero._group_by
acero._group_by = _group_by_in_this_thread
pq.ParquetWriter = pq.core.ParquetWriter = QuickWriter

from batchgen import parquet  # noqa: E402, I001
from batchgen.driver import job  # noqa: E402
from batchgen.driver import run  # noqa: E402
from batchgen.driver import hold  # noqa: E402
from batchgen.driver import lease as driver_lease  # noqa: E402
from batchgen.preflight import tokenizer_files  # noqa: E402
from batchgen.queue import staffing  # noqa: E402
from batchgen.stores.probe import StoreAbilities  # noqa: E402
from batchgen.reuse import carrier  # noqa: E402
from batchgen.verify import verify  # noqa: E402
from batchgen.worker import worker  # noqa: E402

parquet.pq = types.SimpleNamespace(ParquetFile=CachedParquet)  # type: ignore[assignment]
for _module in (job, verify):
    _module.digest_tokenizer = _digest_tokenizer  # type: ignore[attr-defined]
# A run that hangs is to be found, not started again.
staffing.MAX_IDLE_S = math.inf
threads = Threading(get_kernel)
hold.threading = threads  # type: ignore[assignment]
driver_lease.threading = threads  # type: ignore[assignment]
carrier.threading = threads  # type: ignore[assignment]
hold.probe = lambda _: StoreAbilities(is_exclusive=True, can_replace=True, reason=None)
__all__ = ["driver_lease", "enter", "get_kernel", "hold", "leave", "run", "worker"]
