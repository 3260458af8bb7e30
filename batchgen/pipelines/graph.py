"""The stages of a run: their order, what each may refer to, and which folder each writes. Pure.

A stage depends on the stage whose rows it reads and on every stage that its job names. Jobs are rendered in that order,
so that `stages.NAME.output` is known when it is asked for.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from math import prod
from typing import Any

from batchgen.pipelines.calendar import make_key
from batchgen.pipelines.partitions import Partition, list_partitions, make_partition_name
from batchgen.pipelines.spec import PipelineSpec, StageSpec
from batchgen.pipelines.template import Path, TemplateError, check_closed, list_names, render

# Names of template variables that are not partitions'.
OWN_VARIABLES = frozenset(
    {"logical_date", "logical_time", "logical_hour", "pipeline", "run", "input", "stages", "previous"}
)
# Each partition is some objects in the store for every date, and a line in the copies of the log.
MAX_PARTITIONS = 1000
# Beside a stage's output, its name with this at its end: the rows of an earlier stage that its filter let through.
FILTERED = ".input"


class GraphError(ValueError):
    """The stages don't fit together. `path`: of the culprit in the pipeline's tree."""

    def __init__(self, path: Path, message: str) -> None:
        super().__init__(message)
        self.path = path


@dataclass(frozen=True, slots=True)
class StageJob:
    """One job of a run. `tree`: its rendered spec; `source`: output folder of the stage whose rows it reads; `filter`:
    which of them, None for all."""

    stage: StageSpec
    partition: Partition
    tree: dict[str, Any]
    output: str
    source: str | None
    filter: str | None = None

    @property
    def name(self) -> str:
        """Unique in a run."""
        return make_job_name(self.stage.name, self.partition)


def make_job_name(stage: str, partition: Partition) -> str:
    return "/".join(filter(None, [stage, make_partition_name(list(partition.values()))]))


def check_names(spec: PipelineSpec) -> None:
    """Raises GraphError for a name that stands for two things, and for more partitions than can be kept."""
    names = [stage.name for stage in spec.stages]
    for number, name in enumerate(names):
        if name in names[:number]:
            raise GraphError(("stages", number, "name"), f"two stages have the name '{name}'; give each its own")
    for name, values in spec.partitions.items():
        if name in OWN_VARIABLES or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise GraphError(
                ("partitions", name),
                f"partitions: '{name}' can't be its name; choose another, of letters, digits and _",
            )
        for number, value in enumerate(values):
            if value in values[:number]:
                raise GraphError(("partitions", name, number), f"{name} has the value '{value}' twice; write it once")
    num_partitions = prod(len(values) for values in spec.partitions.values())
    if num_partitions > MAX_PARTITIONS:
        raise GraphError(
            ("partitions",),
            f"{num_partitions:,} partitions, more than {MAX_PARTITIONS:,}; make several pipelines of them",
        )


def find_needs(spec: PipelineSpec, number: int) -> dict[str, Path]:
    """Names of the stages that a stage needs, and where it says so. Raises GraphError for one that isn't there."""
    stage, names = spec.stages[number], {stage.name for stage in spec.stages}
    needs: dict[str, Path] = {}
    if stage.input is not None:
        needs[stage.input.stage] = ("stages", number, "input", "stage")
    for name in list_names(stage.job):
        parts = name.split(".")
        if parts[0] == "stages" and len(parts) == 3:
            needs.setdefault(parts[1], ("stages", number, "job"))
    for name, path in needs.items():
        if name not in names:
            raise GraphError(path, f"there is no stage '{name}'; there are: {', '.join(sorted(names))}")
    return needs


def order_stages(spec: PipelineSpec) -> list[int]:
    """Positions of the stages, each after what it needs, otherwise as written. Raises GraphError for a cycle."""
    needs = [find_needs(spec, number) for number in range(len(spec.stages))]
    left, done, order = list(range(len(needs))), set[str](), list[int]()
    while left:
        ready = next((number for number in left if needs[number].keys() <= done), None)
        if ready is None:
            names = ", ".join(spec.stages[number].name for number in left)
            culprit = next(path for number in left for name, path in needs[number].items() if name not in done)
            raise GraphError(culprit, f"the stages {names} need each other in a circle; let one read the input itself")
        left.remove(ready)
        order.append(ready)
        done.add(spec.stages[ready].name)
    return order


def make_date_values(spec: PipelineSpec, date: datetime, partition: Partition | None = None) -> dict[str, str | None]:
    """What a logical date and a partition give: for `wait_for`, and for the jobs."""
    local = spec.schedule.calendar.to_local(date)
    return {
        "logical_date": local.strftime("%Y-%m-%d"),
        "logical_hour": local.strftime("%H"),
        "logical_time": make_key(date),
        "pipeline": spec.name,
        "run": make_key(date),
        **(partition or {}),
    }


def make_jobs(
    spec: PipelineSpec,
    date: datetime,
    previous: Mapping[str, str] | None,
    *,
    only: str | None = None,
    only_outputs: bool = False,
) -> Iterator[StageJob]:
    """The jobs of a run in the order in which they are to run. `previous`: outputs of the previous successful run by the
    jobs' names. `only`: the name of a partition. `only_outputs`: nothing but `output.path` is rendered (fast). Raises
    GraphError, TemplateError with a path from the pipeline's root."""
    order = order_stages(spec)
    for partition_name, partition in list_partitions(spec).items():
        if only not in (None, partition_name):
            continue
        values = make_date_values(spec, date, partition)
        for stage in spec.stages:
            values[f"previous.{stage.name}"] = previous.get(make_job_name(stage.name, partition)) if previous else None
        for number in order:
            job = _make_job(spec, number, partition, values, only_outputs)
            values[f"stages.{job.stage.name}.output"] = job.output
            values[f"stages.{job.stage.name}.data"] = f"{job.output.rstrip('/')}/data"
            yield job


def _make_job(
    spec: PipelineSpec, number: int, partition: Partition, values: Mapping[str, str | None], only_outputs: bool
) -> StageJob:
    stage, root = spec.stages[number], ("stages", number, "job")
    chosen = _render_filter(stage, number, values)
    path = stage.job.get("output", {}).get("path") if isinstance(stage.job.get("output"), dict) else None
    if not isinstance(path, str):
        raise GraphError(root, f"the job of stage '{stage.name}' needs output.path; add it")
    try:
        output = render(path, values, ("output", "path"))
        if not isinstance(output, str):
            raise TemplateError(("output", "path"), 0, "has no value on the first run; name a folder")
        check_closed(output, ("output", "path"))
        source = None if stage.input is None else values[f"stages.{stage.input.stage}.output"]
        known = dict(values)
        if source is not None:
            known["input"] = f"{source.rstrip('/')}/data" if chosen is None else f"{output.rstrip('/')}{FILTERED}"
        tree = {} if only_outputs else render(stage.job, known)
    except TemplateError as error:
        raise TemplateError((*root, *error.path), error.line, str(error)) from None
    return StageJob(stage, partition, tree, output, source, chosen)


def _render_filter(stage: StageSpec, number: int, values: Mapping[str, str | None]) -> str | None:
    if stage.input is None or stage.input.filter is None:
        return None
    return str(render(stage.input.filter, values, ("stages", number, "input", "filter")))


def find_overlap(outputs: Sequence[tuple[str, Any]]) -> tuple[Any, Any] | None:
    """Owners of two folders that are the same or lie in each other. `outputs`: (path, owner)."""
    by_path = sorted((f"{path.rstrip('/')}/", number) for number, (path, _) in enumerate(outputs))
    for (path, number), (other, other_number) in pairwise(by_path):
        if other.startswith(path):
            first, second = sorted((number, other_number))
            return outputs[first][1], outputs[second][1]
    return None


def list_outputs(spec: PipelineSpec, dates: Iterable[datetime]) -> list[tuple[str, tuple[datetime, StageJob]]]:
    """(output folder, who writes it) of every job on these dates, and of what its filter lets through."""
    jobs = [(date, job) for date in dates for job in make_jobs(spec, date, None, only_outputs=True)]
    filtered = [(f"{job.output.rstrip('/')}{FILTERED}", (date, job)) for date, job in jobs if job.filter is not None]
    return [*((job.output, (date, job)) for date, job in jobs), *filtered]
