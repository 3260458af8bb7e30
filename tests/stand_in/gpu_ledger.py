"""The GPUs' memory, as files: a rank holds its GPU for as long as it holds the lock on its file, and the kernel drops a
lock when its process is gone, however that ended. What a fake of NVML may be made of."""

import fcntl
import os
from pathlib import Path
from typing import IO

GPU_BYTES = 192 * 2**30
HELD_BYTES = 150 * 2**30


def hold_gpu(folder: str, gpu: int) -> IO[str]:
    """The open file that keeps the memory; the caller keeps it. For ranks."""
    path = Path(folder) / f"gpu{gpu}-pid{os.getpid()}"
    file = path.open("w")
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


def read_holders(folder: str | Path) -> dict[int, list[int]]:
    """GPU -> processes that hold memory of it. GPUs that were never held are absent."""
    holders: dict[int, list[int]] = {}
    for path in sorted(Path(folder).glob("gpu*-pid*")):
        gpu, pid = (int(part.strip("gpuid")) for part in path.name.split("-"))
        with path.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                holders.setdefault(gpu, []).append(pid)
            else:
                holders.setdefault(gpu, [])
    return holders


def read_used_bytes(folder: str | Path) -> dict[int, int]:
    """GPU -> bytes in use."""
    return {gpu: HELD_BYTES * len(pids) for gpu, pids in read_holders(folder).items()}
