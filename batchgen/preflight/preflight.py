"""Will this node carry the engine that a spec asks for? Facts in, lines out. Pure; how facts are gathered: `node_facts`.

Every line is one thing that was looked at: ok, warn (it may go wrong, or slowly) or fail (it will go wrong), with the mend.
What is said of versions, drivers and memory has its source beside it; what a public report says is told as such.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from batchgen.engines.trtllm.env import is_harmful
from batchgen.errors import BatchgenError, EngineDied, SpecError

Verdict = Literal["ok", "warn", "fail"]
Switch = Literal["auto", "on", "off"]

GIB = 2**30
IMAGE = "the image tensorrt-llm/release:1.2.1"
# Release notes of 1.2.1: its one product fix over 1.2.0 is a corrupted KV cache (block reuse with chunked prefill).
SAFE_VERSION = (1, 2, 1)
# 1.3.0rc27's image has Open MPI 5, with which spawning was reported to fail; up to rc26 it was 4.1.
MPI5_VERSION = (1, 3, 0, 27)
# The fourth number of a release; its candidates have smaller ones.
RELEASE = 1000
BLACKWELL = 10
# CUDA 13, which 1.2's base image has, needs the 580 branch, or its compatibility package over an older data-centre branch;
# the first branch that knows Blackwell is 570.
DRIVER, MIN_BLACKWELL_DRIVER = 580, 570
MIN_PYTHON = (3, 11)
# Of an idle B200 the driver keeps less than 1 GiB.
MAX_USED_BYTES = 4 * GIB

_VERSION = re.compile(r"^(\d+)\.(\d+)(?:\.(\d+))?(?:(a|b|rc)(\d+))?")


@dataclass(frozen=True, slots=True)
class Check:
    """`name` and `what` are for people and never hold a secret. `mend` is empty where all is well. `is_spec`: it is the
    spec that must change, on whatever node."""

    name: str
    verdict: Verdict
    what: str
    mend: str = ""
    is_spec: bool = False


@dataclass(frozen=True, slots=True)
class GpuFacts:
    name: str
    capability: tuple[int, int]
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class MpiFacts:
    """`library`: as MPI names itself. `is_spawning` None: it was not tried; `reason` says why, or what failed."""

    library: str | None = None
    is_spawning: bool | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """`packages`: versions by distribution, of those that are installed. `gpus`: those that this process may use;
    `gpu_problem`: why none can be seen. `variables`: names in the environment that launchers leave. Bytes of memory and of
    the disk that a model is copied to (`disk`), free now."""

    python: tuple[int, int]
    packages: Mapping[str, str]
    gpus: tuple[GpuFacts, ...]
    driver: str | None
    variables: tuple[str, ...]
    mpi: MpiFacts
    ram_bytes: int
    free_ram_bytes: int
    disk: str
    free_disk_bytes: int
    gpu_problem: str = ""


@dataclass(frozen=True, slots=True)
class EngineNeeds:
    """What one TensorRT-LLM engine asks of its node. `max_tokens`: of a request, where known. `kv_dtype`: auto or fp8."""

    num_gpus: int
    has_attention_dp: bool
    max_batch_size: int
    max_inflight: int
    max_model_len: int | None
    max_tokens: int | None
    kv_dtype: str
    kv_free_fraction: float
    block_reuse: Switch
    chunked_prefill: Switch
    scheduler_policy: str
    custom_tokenizer: str | None

    @property
    def num_ranks(self) -> int:
        """Parts of the engine that have a KV cache and requests of their own."""
        return self.num_gpus if self.has_attention_dp else 1


def make_error(checks: Sequence[Check]) -> BatchgenError | None:
    """The first failing line as an error; None where nothing fails. Another spec helps: SpecError; another node may help:
    EngineDied."""
    failed = next((check for check in checks if check.verdict == "fail"), None)
    if failed is None:
        return None
    sentence = f"{failed.name}: {failed.what}" + (f"; {failed.mend}" if failed.mend else "")
    return SpecError(sentence) if failed.is_spec else EngineDied(f"this node can't carry the engine: {sentence}")


def parse_version(text: str) -> tuple[int, ...] | None:
    """Comparable: 1.3.0rc27 -> (1, 3, 0, 27), below 1.3.0 -> (1, 3, 0, 1000). None for what is no version."""
    found = _VERSION.match(text)
    if found is None:
        return None
    major, minor, patch, kind, number = found.groups()
    before = int(number) - {"a": 200, "b": 100, "rc": 0}[kind] if kind else RELEASE
    return (int(major), int(minor), int(patch or 0), before)


def list_launcher_variables(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Names that make Open MPI or TensorRT-LLM take this process for a part of something else."""
    return tuple(sorted(filter(is_harmful, environ)))


# ---- the node itself


def check_machine(node: NodeFacts) -> list[Check]:
    """What holds for every engine."""
    python = ".".join(map(str, node.python))
    checks = [Check("python", "ok", python)]
    if node.python < MIN_PYTHON:
        checks = [Check("python", "fail", f"{python} is too old", "use Python 3.11 or newer")]
    memory = f"{node.free_ram_bytes / GIB:,.0f} of {node.ram_bytes / GIB:,.0f} GiB free"
    is_low = node.free_ram_bytes < 4 * GIB
    checks.append(Check("memory", "warn" if is_low else "ok", memory, "end what else runs here" if is_low else ""))
    checks.append(Check("disk", "ok", f"{node.free_disk_bytes / 1e9:,.0f} GB free at {node.disk}"))
    return checks


def check_gpus(node: NodeFacts, num_needed: int) -> list[Check]:
    """Count, kind and free memory. `num_needed` 0: none is asked for, so nothing can fail."""
    if not node.gpus:
        verdict: Verdict = "fail" if num_needed else "ok"
        what = f"none to be seen: {node.gpu_problem}" if node.gpu_problem else "none"
        mend = "run this on a GPU node, in a container that was given its GPUs" if num_needed else ""
        return [Check("gpus", verdict, what, mend)]
    checks = [_check_count(node.gpus, num_needed)]
    names = sorted({gpu.name for gpu in node.gpus})
    if len(names) > 1:
        checks.append(Check("gpu kinds", "warn", f"of several kinds: {', '.join(names)}", "use nodes with one kind"))
    return [*checks, _check_used(node.gpus), *_check_driver(node)]


def _check_count(gpus: Sequence[GpuFacts], num_needed: int) -> Check:
    first = gpus[0]
    kind = f"{first.name}, sm_{first.capability[0]}{first.capability[1]}, {first.total_bytes / GIB:,.0f} GiB"
    if len(gpus) < num_needed:
        mend = (
            "lower engine.tensor_parallel_size, or give the worker as many (cluster.gpus_per_worker, the node's kind)"
        )
        return Check("gpus", "fail", f"{len(gpus)} x {kind} where the engine needs {num_needed}", mend)
    return Check("gpus", "ok", f"{len(gpus)} x {kind}")


def _check_used(gpus: Sequence[GpuFacts]) -> Check:
    used = [gpu.total_bytes - gpu.free_bytes for gpu in gpus]
    busy = [f"GPU {number}: {size / GIB:.1f} GiB" for number, size in enumerate(used) if size > MAX_USED_BYTES]
    if not busy:
        return Check("gpu memory", "ok", f"{min(gpu.free_bytes for gpu in gpus) / GIB:,.0f} GiB free or more on each")
    mend = "end the processes that nvidia-smi names, or wait until they have ended"
    return Check("gpu memory", "warn", f"in use already: {', '.join(busy)}", mend)


def _check_driver(node: NodeFacts) -> list[Check]:
    major = re.match(r"\d+", node.driver or "")
    if major is None:
        return [Check("driver", "warn", "its version can't be read", "look at nvidia-smi")]
    branch, is_blackwell = int(major.group()), any(gpu.capability[0] >= BLACKWELL for gpu in node.gpus)
    if is_blackwell and branch < MIN_BLACKWELL_DRIVER:
        return [Check("driver", "fail", f"{node.driver} does not know Blackwell", f"install {DRIVER} or newer")]
    return [Check("driver", "ok", str(node.driver))]


# ---- TensorRT-LLM


def check_tensorrt_llm(node: NodeFacts, needs: EngineNeeds) -> list[Check]:
    """All of the node's side: the package, GPUs, driver, MPI."""
    checks = [*_check_version(node, needs), *check_gpus(node, needs.num_gpus)]
    branch = re.match(r"\d+", node.driver or "")
    if branch and MIN_BLACKWELL_DRIVER <= int(branch.group()) < DRIVER:
        what = f"{node.driver} is older than CUDA 13's own ({DRIVER}); the image needs its compatibility package for it"
        checks = [c for c in checks if c.name != "driver"] + [
            Check("driver", "warn", what, f"install {DRIVER} or newer")
        ]
    return [*checks, *check_mpi(node, is_needed=True)]


def _check_version(node: NodeFacts, needs: EngineNeeds) -> list[Check]:
    text = node.packages.get("tensorrt_llm")
    if text is None:
        return [Check("tensorrt_llm", "fail", "not installed in this Python", f"run the workers in {IMAGE}")]
    version = parse_version(text)
    if version is None:
        return [Check("tensorrt_llm", "warn", f"{text} is no version that can be compared", f"use {IMAGE}")]
    if version < (*SAFE_VERSION, RELEASE):
        switches = (needs.block_reuse, needs.chunked_prefill)
        fault = f"{text} corrupts the KV cache when block reuse and chunked prefill are both on"
        if switches == ("on", "on"):
            mend = f"use {IMAGE}, or set engine.enable_chunked_prefill to auto"
            return [Check("tensorrt_llm", "fail", f"{fault}, as the spec has them", mend, is_spec=True)]
        return [Check("tensorrt_llm", "warn", f"{fault}; the spec doesn't turn on both", f"use {IMAGE}")]
    if version[:3] == MPI5_VERSION[:3] and version[3] < RELEASE:
        what = f"{text} is a release candidate; whether it has 1.2.1's fix of the KV cache depends on its date"
        if version >= MPI5_VERSION:
            what += ", and its image has Open MPI 5, with which spawning ranks was reported to fail"
        return [Check("tensorrt_llm", "warn", what, f"use {IMAGE}")]
    return [Check("tensorrt_llm", "ok", text)]


def check_mpi(node: NodeFacts, *, is_needed: bool) -> list[Check]:
    """The ranks are MPI processes that the engine spawns."""
    checks = []
    if node.variables:
        what = f"a launcher left {', '.join(node.variables)}; batchgen takes them from the engine's environment"
        checks.append(
            Check("launcher", "warn" if is_needed else "ok", what, "start Ray without srun" if is_needed else "")
        )
    library = node.mpi.library or "mpi4py"
    if node.mpi.is_spawning:
        return [*checks, Check("mpi", "ok", f"{library} spawns processes")]
    verdict: Verdict = "fail" if is_needed else "ok"
    if node.mpi.is_spawning is None:
        mend = f"use {IMAGE}, which has it" if is_needed else ""
        return [*checks, Check("mpi", verdict, f"not tried: {node.mpi.reason}", mend)]
    mend = "use Open MPI 4.1 as in " + IMAGE + (f", and unset {', '.join(node.variables)}" if node.variables else "")
    return [*checks, Check("mpi", verdict, f"{library} can't spawn a process: {node.mpi.reason}", mend)]


# ---- transformers


def check_transformers(node: NodeFacts, device: str) -> list[Check]:
    """`device`: the spec's word."""
    checks = []
    for name in ("torch", "transformers"):
        version = node.packages.get(name)
        if version is None:
            checks.append(Check(name, "fail", "not installed in this Python", "pip install 'batchgen[local]'"))
        else:
            checks.append(Check(name, "ok", version))
    index = int(device.partition(":")[2] or 0) if device.startswith("cuda") else None
    if index is None:
        where = "CUDA" if node.gpus and device == "auto" else "the CPU"
        return [*checks, Check("device", "ok", f"engine.device {device}: {where}")]
    if index >= len(node.gpus):
        what = f"engine.device {device} is not here; {len(node.gpus)} GPUs are to be seen"
        return [*checks, Check("device", "fail", what, "set engine.device: auto, or use a GPU node", is_spec=True)]
    return [*checks, Check("device", "ok", f"engine.device {device}: {node.gpus[index].name}"), *check_gpus(node, 0)]
