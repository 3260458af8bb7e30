"""The environment of the engine's processes, made from the actor's. Pure.

Ray, Slurm and the launchers put variables there that MPI or TensorRT-LLM take for meant: each line here is one that keeps
an engine from starting, or lets it start wrongly.
"""

from collections.abc import Mapping

# Open MPI takes a process with these for one of the launcher's own job steps, and can't spawn ranks.
LAUNCHER_VARIABLES = {"SLURM_JOBID", "SLURM_JOB_ID", "SLURM_NODELIST"}
LAUNCHER_PREFIXES = ("PMIX_", "PMI_", "OMPI_COMM_WORLD_", "OMPI_UNIVERSE_", "PRTE_")
# The first forces the Ray orchestrator, the second makes the vendor believe that Ray counts its GPUs.
RAY_VARIABLES = {"TLLM_DISABLE_MPI", "RAY_LOCAL_WORLD_SIZE"}


def is_harmful(name: str) -> bool:
    """Must the engine's processes not see it?"""
    return name in LAUNCHER_VARIABLES | RAY_VARIABLES or name.startswith(LAUNCHER_PREFIXES)


def make_environment(environ: Mapping[str, str], mark: str, mark_value: str, import_path: str) -> dict[str, str]:
    """CUDA_VISIBLE_DEVICES stays as Ray gave it. `import_path`: the folder that holds this very batchgen, which comes
    first, so that both ends of the wire are one build."""
    kept = {name: value for name, value in environ.items() if not is_harmful(name)}
    paths = [import_path, *filter(None, environ.get("PYTHONPATH", "").split(":"))]
    return {**kept, mark: mark_value, "PYTHONPATH": ":".join(paths)}
