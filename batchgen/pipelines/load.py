"""A `PipelineSpec` from YAML, checked as far as it can be without a run: every mistake with its file and line.

What is checked beyond the fields: that the stages fit together, that every template variable is known, that each job is a
job spec once a date is in it, and that no two jobs, of any two dates or pipelines, write to one folder.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import islice, takewhile
from pathlib import PurePosixPath
from typing import Any

import yaml
from pydantic import ValidationError

from batchgen.errors import SpecError
from batchgen.pipelines.graph import GraphError, StageJob, find_overlap, list_outputs, make_date_values, make_jobs
from batchgen.pipelines.publish import DATES, LATEST
from batchgen.pipelines.spec import PipelineSpec
from batchgen.pipelines.template import Path, TemplateError, render
from batchgen.spec import JobSpec
from batchgen.specs.load import YAML_ERRORS, describe, is_local, make_spec
from batchgen.specs.validate import check_spec
from batchgen.storage import Storage, read_text

# Paths in a job's tree.
_JOB_PATHS = {"input": ("paths", "length_prior", "reuse_from"), "output": ("path", "lock_url")}
# How far ahead outputs are compared: a year, so that both changes of daylight saving are in it, or so many dates.
AHEAD, MAX_AHEAD = timedelta(days=370), 9000


@dataclass(frozen=True, slots=True)
class Source:
    """Where a tree came from: `lines` has the line (from 1) of each path in it, and the file where another was read in."""

    file: str
    lines: dict[Path, tuple[str, int]]

    def locate(self, path: Path, line: int = 0) -> str:
        """'file line 7' of a path, or of the nearest one around it. `line`: further down in that value."""
        while path and path not in self.lines:
            path = path[:-1]
        file, first = self.lines.get(path, (self.file, 1))
        return f"{file} line {first + line}"


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A spec, and where it was written."""

    spec: PipelineSpec
    source: Source


def load_pipelines(urls: Sequence[str], now: datetime) -> list[Pipeline]:
    """All of them, checked. Raises SpecError, InputError."""
    pipelines = [load_pipeline(url, now) for url in urls]
    for number, pipeline in enumerate(pipelines):
        for other in pipelines[:number]:
            if (other.spec.name, other.spec.state) == (pipeline.spec.name, pipeline.spec.state):
                where = pipeline.source.locate(("name",))
                raise SpecError(f"{where}: {other.source.file} has the name '{other.spec.name}', too; choose another")
    _check_between(pipelines, now)
    return pipelines


def load_pipeline(url: str, now: datetime) -> Pipeline:
    """One of them, checked. Raises SpecError, InputError."""
    tree, source = parse_source(read_text(url), url)
    for number, stage in enumerate(tree["stages"] if isinstance(tree.get("stages"), list) else []):
        if isinstance(stage, dict) and isinstance(stage.get("job"), str):
            stage["job"] = _read_job(url, stage["job"], ("stages", number, "job"), source)
    try:
        spec = PipelineSpec.model_validate(tree)
    except ValidationError as error:
        path = tuple(error.errors(include_url=False, include_input=False)[0]["loc"])
        raise SpecError(f"{source.locate(path)}: {describe(error, PipelineSpec)}") from error
    pipeline = Pipeline(with_absolute_paths(spec), source)
    check(pipeline, now)
    return pipeline


def with_absolute_paths(spec: PipelineSpec) -> PipelineSpec:
    """Local paths are the caller's: runs are at work elsewhere. A path that a template variable begins is one already."""
    publish = spec.publish and Storage(spec.publish).root
    stages = tuple(stage.model_copy(update={"job": _with_absolute_job(stage.job)}) for stage in spec.stages)
    waits = tuple(
        wait.model_copy(update={"marker": _absolute(wait.marker), "stable": _absolute(wait.stable)})
        for wait in spec.wait_for
    )
    own = {"state": Storage(spec.state).root, "publish": publish}
    return spec.model_copy(update={**own, "stages": stages, "wait_for": waits})


def _with_absolute_job(job: dict[str, Any]) -> dict[str, Any]:
    """What can be made so of an unchecked tree."""
    changed = dict(job)
    for section, names in _JOB_PATHS.items():
        if isinstance(job.get(section), dict):
            found = {name: _absolute(job[section][name]) for name in names if name in job[section]}
            changed[section] = {**job[section], **found}
    return changed


def _absolute(value: Any) -> Any:
    if isinstance(value, list):
        return [_absolute(item) for item in value]
    if not isinstance(value, str) or not is_local(value) or value.lstrip().startswith(("/", "~", "{{")):
        return value
    return os.path.abspath(value)  # noqa: PTH100 - resolve() follows links


# ---- text and lines --------------------------------------------------------------------------------------------------


def parse_source(text: str, file: str) -> tuple[dict[str, Any], Source]:
    """Plain values, and where each stands. Raises SpecError."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        tree = yaml.safe_load(text)
    except YAML_ERRORS as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise SpecError(
            f'{file}{where}: not valid YAML; mend the syntax there, and quote text with "{{{{ }}}}"'
        ) from error
    if not isinstance(tree, dict) or node is None:
        raise SpecError(f"{file}: must be a mapping with name, state, schedule and stages")
    return tree, Source(file, {path: (file, line) for path, line in _walk(node, ())})


def _walk(node: yaml.Node, path: Path) -> Iterator[tuple[Path, int]]:
    """(path, line counted from 1) of every value; of a block of text, of its first line."""
    is_block = isinstance(node, yaml.ScalarNode) and node.style in ("|", ">")
    yield path, node.start_mark.line + 1 + is_block
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield (*path, str(key.value)), key.start_mark.line + 1
            yield from _walk(value, (*path, str(key.value)))
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            yield from _walk(value, (*path, number))


def _read_job(pipeline_url: str, url: str, path: Path, source: Source) -> dict[str, Any]:
    """A job that stands in a file of its own, beside the pipeline's."""
    if is_local(url) and not url.startswith(("/", "~")):
        folder = os.path.dirname(pipeline_url) if is_local(pipeline_url) else str(PurePosixPath(pipeline_url).parent)  # noqa: PTH120
        url = f"{folder}/{url}" if is_local(pipeline_url) and folder else url
    tree, lines = parse_source(read_text(url), url)
    source.lines.update({(*path, *below): where for below, where in lines.lines.items()})
    return tree


# ---- checks ----------------------------------------------------------------------------------------------------------


def check(pipeline: Pipeline, now: datetime) -> None:
    """Raises SpecError for what can't work on any date."""
    spec, source = pipeline.spec, pipeline.source
    date = spec.schedule.calendar.find_next(now) or now
    previous_of = {job.name: job.output for job in _make_jobs(pipeline, date - timedelta(days=1), None, outputs=True)}
    for previous in (None, previous_of):
        specs: dict[str, JobSpec] = {}
        for job in _make_jobs(pipeline, date, previous):
            specs[job.name] = _check_job(pipeline, job)
            _check_filter(pipeline, job, specs)
    for number, wait in enumerate(spec.wait_for):
        for name in ("marker", "stable"):
            _render_at(source, getattr(wait, name), make_date_values(spec, date), ("wait_for", number, name))
    outputs = list_outputs(spec, list_ahead(spec, now))
    overlap = find_overlap(outputs)
    if overlap is not None:
        _refuse_overlap(pipeline, *overlap)


def _make_jobs(
    pipeline: Pipeline, date: datetime, previous: dict[str, str] | None, *, outputs: bool = False
) -> list[StageJob]:
    try:
        return list(make_jobs(pipeline.spec, date, previous, only_outputs=outputs))
    except TemplateError as error:
        raise SpecError(f"{pipeline.source.locate(error.path, error.line)}: {error}") from None
    except GraphError as error:
        raise SpecError(f"{pipeline.source.locate(error.path)}: {error}") from None


def _render_at(source: Source, text: str | None, values: dict[str, str | None], path: Path) -> None:
    try:
        render(text, values, path)
    except TemplateError as error:
        raise SpecError(f"{source.locate(error.path, error.line)}: {error}") from None


def _check_job(pipeline: Pipeline, job: StageJob) -> JobSpec:
    path: Path = ("stages", pipeline.spec.stages.index(job.stage), "job")
    tree = with_limits(job.tree, None, pipeline.spec.max_gpu_hours)
    try:
        JobSpec.model_validate(tree)
    except ValidationError as error:
        location = tuple(error.errors(include_url=False, include_input=False)[0]["loc"])
        if location[:1] == ("engine",):  # pydantic names the kind of engine after it
            location = ("engine", *location[2:])
        raise SpecError(f"{pipeline.source.locate((*path, *location))}: {describe(error)}") from error
    try:
        spec = make_spec(tree, source=f"the job of stage '{job.stage.name}'")
        check_spec(spec)
    except SpecError as error:
        raise SpecError(f"{pipeline.source.locate(path)}: {error}") from error
    return spec


def _check_filter(pipeline: Pipeline, job: StageJob, specs: Mapping[str, JobSpec]) -> None:
    read = job.stage.input
    if read is None or read.filter is None:
        return
    from batchgen.pipelines.filters import check_filter

    source = specs["/".join([read.stage, *job.partition.values()])]
    try:
        check_filter(read.filter, source)
    except ValueError as error:
        path: Path = ("stages", pipeline.spec.stages.index(job.stage), "input", "filter")
        raise SpecError(f"{pipeline.source.locate(path)}: {error}") from error


def with_limits(tree: dict[str, Any], deadline: str | None, max_gpu_hours: float | None) -> dict[str, Any]:
    """The job under a run's limits, where its own are not tighter."""
    cluster = dict(tree.get("cluster") or {})
    if deadline is not None and not _is_before(cluster.get("deadline"), deadline):
        cluster["deadline"] = deadline
    if max_gpu_hours is not None:
        own = cluster.get("max_gpu_hours")
        cluster["max_gpu_hours"] = min(max_gpu_hours, own) if isinstance(own, int | float) else max_gpu_hours
    return {**tree, "cluster": cluster} if cluster else tree


def _is_before(own: Any, deadline: str) -> bool:
    """Of a job's own deadline, unchecked: YAML makes a date of one that has no quotes. What is no time is left for the spec
    to refuse."""
    if own is None:
        return False
    try:
        instant = own if isinstance(own, datetime) else datetime.fromisoformat(str(own))
        return instant < datetime.fromisoformat(deadline)
    except (ValueError, TypeError):  # no time, or one without its UTC offset
        return True


def list_ahead(spec: PipelineSpec, now: datetime) -> list[datetime]:
    """The logical dates of the next year, or as many as are looked at."""
    dates = spec.schedule.calendar.iterate_after(now)
    return list(islice(takewhile(lambda date: date < now + AHEAD, dates), MAX_AHEAD))


def _refuse_overlap(pipeline: Pipeline, one: tuple[datetime, StageJob], other: tuple[datetime, StageJob]) -> None:
    (date, job), (other_date, other_job) = one, other
    number = pipeline.spec.stages.index(other_job.stage)
    where = pipeline.source.locate(("stages", number, "job", "output", "path"))
    if date != other_date:
        mend = "put {{ logical_date }} in it, or {{ logical_time }} where a day has several runs"
        raise SpecError(
            f"{where}: the runs of {date:%Y-%m-%d %H:%M} and {other_date:%Y-%m-%d %H:%M} UTC would write to one "
            f"folder, {other_job.output}; {mend}"
        )
    raise SpecError(
        f"{where}: {job.name} and {other_job.name} would write to one folder ({job.output} and {other_job.output}); give "
        "each its own, none inside another"
    )


def _check_between(pipelines: Sequence[Pipeline], now: datetime) -> None:
    """No pipeline's output, state or publication may lie in another's output."""
    places: list[tuple[str, tuple[Pipeline, Path]]] = []
    for pipeline in pipelines:
        spec = pipeline.spec
        dates = list_ahead(spec, now)[:50]
        for output, (_, job) in list_outputs(spec, dates):
            path: Path = ("stages", spec.stages.index(job.stage), "job", "output", "path")
            places.append((Storage(output).root, (pipeline, path)))
        places.append((f"{spec.state}/{spec.name}", (pipeline, ("state",))))
        if spec.publish is not None:
            places += [(f"{spec.publish}/{name}", (pipeline, ("publish",))) for name in (LATEST, DATES)]
    overlap = find_overlap(places)
    if overlap is not None:
        (one, path), (other, other_path) = overlap
        where, there = other.source.locate(other_path), one.source.locate(path)
        raise SpecError(f"{where}: lies in the same folder as what is written by {there}; give each its own")
