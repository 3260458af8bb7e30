"""A test double of NVML's Python package (nvidia-ml-py): eight B200 whose memory is the stand-in's ledger. Without a
ledger it is a machine without a driver."""

import os
from dataclasses import dataclass

from gpu_ledger import GPU_BYTES, read_used_bytes

NUM_GPUS = 8


class NVMLError(Exception):
    pass


@dataclass(frozen=True)
class Memory:
    total: int
    free: int
    used: int


def nvmlInit() -> None:
    if "STAND_IN_GPU_DIR" not in os.environ:
        raise NVMLError("Driver Not Loaded")


def nvmlShutdown() -> None:
    pass


def nvmlDeviceGetCount() -> int:
    return NUM_GPUS


def nvmlDeviceGetHandleByIndex(index: int) -> int:
    if not 0 <= index < NUM_GPUS:
        raise NVMLError("Invalid Argument")
    return index


def nvmlDeviceGetHandleByUUID(uuid: str) -> int:
    return nvmlDeviceGetHandleByIndex(int(uuid.removeprefix("GPU-")))


def nvmlDeviceGetUUID(gpu: int) -> str:
    return f"GPU-{gpu}"


def nvmlDeviceGetName(_: int) -> str:
    return "NVIDIA B200"


def nvmlDeviceGetCudaComputeCapability(_: int) -> tuple[int, int]:
    return 10, 0


def nvmlDeviceGetMemoryInfo(gpu: int) -> Memory:
    used = read_used_bytes(os.environ["STAND_IN_GPU_DIR"]).get(gpu, 0)
    return Memory(GPU_BYTES, GPU_BYTES - used, used)


def nvmlSystemGetDriverVersion() -> str:
    return "580.159.04"
