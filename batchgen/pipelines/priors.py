"""Whose measured lengths a run's jobs expect where their specs don't say: those of the run before it, of the same stage and
partition. Chosen when an attempt is submitted, and written into its order. An expectation decides order and sizes, so one
that can't be read is left out, never a reason to fail; and so is one of another model, prompt, sampling or engine: shards
that were cut for labels must not be filled with essays.
"""

from collections.abc import Callable, Mapping
from typing import Any

from batchgen.errors import InputError
from batchgen.length_files import find_prior
from batchgen.pipelines.graph import make_job_name
from batchgen.pipelines.partitions import Partition
from batchgen.pipelines.spec import PipelineSpec, StageSpec

# Sections of a job on which the lengths of its answers depend, as they stand in the file: dates are not in them yet.
_DECIDING = ("prompt", "model", "engine", "sampling")


def find_length_priors(
    spec: PipelineSpec,
    partition: Partition,
    earlier: PipelineSpec,
    previous: Mapping[str, str],
    warn: Callable[[str], None],
) -> dict[str, str]:
    """Output folders that have measured any, by the jobs' names. `earlier`, `previous`: the file of the run before, and its
    outputs."""
    known = {stage.name: _make_deciding(stage) for stage in earlier.stages}
    alike = (stage for stage in spec.stages if known.get(stage.name) == _make_deciding(stage))
    names = [make_job_name(stage.name, partition) for stage in alike if not _says_itself(stage)]
    found: dict[str, str] = {}
    for name in names:
        try:
            if name in previous and find_prior(previous[name], "length_prior") is not None:
                found[name] = previous[name]
        except InputError as error:
            warn(f"{spec.name} {name}: {error}; the run goes without")
    return found


def _make_deciding(stage: StageSpec) -> dict[str, Any]:
    """As JSON, which an earlier file comes from: YAML knows dates."""
    job = stage.model_dump(mode="json")["job"]
    return {name: job.get(name) for name in _DECIDING}


def _says_itself(stage: StageSpec) -> bool:
    """Has its job a `length_prior`? Null is one: no lengths are to be expected."""
    section = stage.job.get("input")
    return isinstance(section, dict) and "length_prior" in section


def with_length_prior(tree: dict[str, Any], url: str | None) -> dict[str, Any]:
    """The job, expecting what was measured there."""
    return tree if url is None else {**tree, "input": {**tree["input"], "length_prior": url}}
