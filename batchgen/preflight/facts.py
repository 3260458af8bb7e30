"""Gathers what `preflight` judges, in seconds: GPUs by NVML, versions without importing anything heavy, an MPI spawn.

Nothing here fails: what can't be found out is a fact too, and its reason is kept. TensorRT-LLM, torch and MPI are never
imported in this process: importing the first takes half a minute and starts MPI.
"""

import csv
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from batchgen.paths import expand_home
from batchgen.preflight.preflight import GpuFacts, MpiFacts, NodeFacts, list_launcher_variables

PACKAGES = ("tensorrt_llm", "torch", "transformers", "mpi4py", "ray", "batchgen")
SMI_FIELDS = "index,uuid,name,compute_cap,memory.total,memory.free,driver_version"
SMI_TIMEOUT_S = 20.0
MPI_TIMEOUT_S = 45.0
_CHILD = "from mpi4py import MPI; parent = MPI.Comm.Get_parent(); parent.send(1, dest=0); parent.Disconnect()"
_SPAWN = f"""
import sys
from mpi4py import MPI
num = int(sys.argv[1])
ranks = MPI.COMM_SELF.Spawn(sys.executable, args=["-c", {_CHILD!r}], maxprocs=num)
print(sum(ranks.recv(source=rank) for rank in range(num)) == num, MPI.Get_library_version().splitlines()[0], flush=True)
ranks.Disconnect()
"""


def read_node(stage_dir: str, num_ranks: int = 1, *, environ: Mapping[str, str] = os.environ) -> NodeFacts:
    """`num_ranks`: MPI processes to spawn for a trial. `stage_dir`: whose disk is meant, there already or not."""
    gpus, driver, problem = read_gpus(environ.get("CUDA_VISIBLE_DEVICES"))
    page, disk = os.sysconf("SC_PAGE_SIZE"), find_existing(expand_home(stage_dir))
    return NodeFacts(
        python=(sys.version_info.major, sys.version_info.minor),
        packages=read_packages(),
        gpus=gpus,
        gpu_problem=problem,
        driver=driver,
        variables=list_launcher_variables(environ),
        mpi=try_mpi(num_ranks, environ),
        ram_bytes=os.sysconf("SC_PHYS_PAGES") * page,
        free_ram_bytes=read_free_ram(),
        disk=str(disk),
        free_disk_bytes=shutil.disk_usage(disk).free,
    )


def read_host() -> str:
    return socket.gethostname()


def read_packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def read_free_ram() -> int:
    """Bytes that a program could have: the page cache counts as free."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def find_existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(path for path in [folder.absolute(), *folder.absolute().parents] if path.is_dir())


# ---- GPUs

Device = tuple[str, str, GpuFacts]
"""Index, UUID, facts."""


def read_gpus(visible: str | None) -> tuple[tuple[GpuFacts, ...], str | None, str]:
    """(those that CUDA_VISIBLE_DEVICES leaves, the driver's version, why there is none)."""
    problem = "the package nvidia-ml-py is missing"
    try:
        devices, driver = read_nvml()
    except ImportError:
        try:
            devices, driver = read_smi()
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            return (), None, f"{problem}, and nvidia-smi failed ({type(error).__name__})"
    except NvmlFailed as error:
        return (), None, str(error)
    chosen = tuple(pick_visible(devices, visible))
    return chosen, driver, "" if chosen else f"CUDA_VISIBLE_DEVICES leaves none of {len(devices)}"


class NvmlFailed(Exception):
    """NVML's own word on why."""


def read_nvml() -> tuple[list[Device], str]:
    """ImportError where the package isn't there; NvmlFailed where there is no driver or it doesn't answer."""
    import pynvml as nvml

    try:
        nvml.nvmlInit()
        try:
            devices = [_read_device(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]
            return devices, to_text(nvml.nvmlSystemGetDriverVersion())
        finally:
            nvml.nvmlShutdown()
    except nvml.NVMLError as error:
        raise NvmlFailed(f"NVML says: {error}") from error


def _read_device(nvml: Any, index: int) -> Device:
    gpu = nvml.nvmlDeviceGetHandleByIndex(index)
    memory, (major, minor) = nvml.nvmlDeviceGetMemoryInfo(gpu), nvml.nvmlDeviceGetCudaComputeCapability(gpu)
    facts = GpuFacts(to_text(nvml.nvmlDeviceGetName(gpu)), (major, minor), int(memory.total), int(memory.free))
    return str(index), to_text(nvml.nvmlDeviceGetUUID(gpu)), facts


def to_text(value: str | bytes) -> str:
    """Older releases of the package give bytes."""
    return value.decode() if isinstance(value, bytes) else value


def read_smi() -> tuple[list[Device], str]:
    command = ["nvidia-smi", f"--query-gpu={SMI_FIELDS}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SMI_TIMEOUT_S, check=True)
    return parse_smi(done.stdout)


def parse_smi(text: str) -> tuple[list[Device], str]:
    """Sizes are in MiB. ValueError for what isn't this."""
    devices, driver = [], ""
    for row in csv.reader(text.splitlines(), skipinitialspace=True):
        index, uuid, name, capability, total, free, driver = row
        major, _, minor = capability.partition(".")
        devices.append((index, uuid, GpuFacts(name, (int(major), int(minor)), int(total) << 20, int(free) << 20)))
    return devices, driver


def pick_visible(devices: Sequence[Device], visible: str | None) -> list[GpuFacts]:
    """CUDA takes indexes or the beginnings of UUIDs, and stops at the first that it doesn't know."""
    if visible is None:
        return [facts for _, _, facts in devices]
    chosen: list[GpuFacts] = []
    for name in (part.strip() for part in visible.split(",")):
        found = [facts for index, uuid, facts in devices if name == index or (name and uuid.startswith(name))]
        if not found:
            break
        chosen += found[:1]
    return chosen


# ---- MPI


def try_mpi(num_ranks: int, environ: Mapping[str, str], timeout_s: float = MPI_TIMEOUT_S) -> MpiFacts:
    """Spawns ranks as the engine will, in its environment: what else would tell whether that works?"""
    if find_missing_module("mpi4py"):
        return MpiFacts(reason="mpi4py is not installed")
    dropped = set(list_launcher_variables(environ))
    kept = {name: value for name, value in environ.items() if name not in dropped}
    command = [sys.executable, "-c", _SPAWN, str(num_ranks)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, **pipes, env=kept, start_new_session=True) as process:
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return MpiFacts(is_spawning=False, reason=f"no answer within {timeout_s:g} s")
    return read_spawn(output, process.returncode)


def read_spawn(output: str, return_code: int) -> MpiFacts:
    """Of the trial's own line; MPI prints around it as it likes."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    told = next((line for line in lines if line.startswith(("True ", "False "))), None)
    library = " ".join(told.split()[1:]) if told else None
    if told is not None and told.startswith("True ") and return_code == 0:
        return MpiFacts(library, True)
    said = next((line for line in reversed(lines) if any(character.isalpha() for character in line)), "")
    return MpiFacts(library, False, f"it ended with {return_code} ({said[:200]})")


def find_missing_module(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is None
