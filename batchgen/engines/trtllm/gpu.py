"""Is the GPUs' memory free again? A killed rank's memory is given back by the driver some seconds after its process is
gone, and a rank that nobody can kill keeps it: an engine that starts before would fail for want of memory.

NVML through `pynvml` (the package nvidia-ml-py; TensorRT-LLM's image has it), imported when it is asked for.
"""

import contextlib
import os
from collections.abc import Mapping
from typing import Any

# What the driver keeps for itself on a GPU that nobody uses, with room: a context, ECC, the persistence daemon.
MAX_FREE_USED_BYTES = 4 * 2**30


def list_held(used: Mapping[str, int]) -> list[str]:
    """What keeps an engine from starting, a phrase for each GPU. Pure."""
    return [
        f"{name}: {used_bytes / 2**30:.1f} GiB" for name, used_bytes in used.items() if used_bytes > MAX_FREE_USED_BYTES
    ]


class NvmlMemory:
    """The GPUs of CUDA_VISIBLE_DEVICES (all where it is not set), by NVML. Blocks for some milliseconds."""

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml

    def read_used_bytes(self) -> Mapping[str, int]:
        """Bytes in use of each GPU that this process was given, by its name for people. Empty: there is none, or it can't
        be told."""
        self._nvml.nvmlInit()
        try:
            return {name: self._nvml.nvmlDeviceGetMemoryInfo(gpu).used for name, gpu in self._list_gpus().items()}
        finally:
            self._nvml.nvmlShutdown()

    def _list_gpus(self) -> dict[str, Any]:
        nvml = self._nvml
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = [str(index) for index in range(nvml.nvmlDeviceGetCount())] if visible is None else visible.split(",")
        gpus = {}
        for name in filter(None, map(str.strip, names)):
            # A name that NVML doesn't know (a MIG slice, a GPU outside this container) can't be waited for.
            with contextlib.suppress(nvml.NVMLError):
                by_index = nvml.nvmlDeviceGetHandleByIndex
                gpus[f"GPU {name}"] = by_index(int(name)) if name.isdigit() else nvml.nvmlDeviceGetHandleByUUID(name)
        return gpus


def find_gpu_memory() -> NvmlMemory | None:
    """NVML where it is to be had; None elsewhere, and then nobody waits."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # no driver on this machine
        return None
    pynvml.nvmlShutdown()
    return NvmlMemory(pynvml)
