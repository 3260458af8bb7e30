"""What is wrong with a pipeline although each of its fields is right, found without a run, with its file and line.

That the stages fit together, that every template variable is known, that each job is a job spec once a date is in it, and
that no two jobs, of any two dates or pipelines, write to one folder. Each check raises SpecError.
"""

import re
from bisect import bisect_right
from collections.abc import Container, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from itertools import islice, takewhile

from pydantic import ValidationError

from batchgen.errors import SpecError
from batchgen.pipelines.graph import (
    GraphError,
    StageJob,
    check_names,
    find_needs,
    find_overlap,
    list_outputs,
    make_date_values,
    make_job_name,
    make_jobs,
)
from batchgen.pipelines.limits import with_limits
from batchgen.pipelines.partitions import list_partitions
from batchgen.pipelines.publish import DATES, LATEST
from batchgen.pipelines.source import Pipeline, Source
from batchgen.pipelines.spec import PipelineSpec
from batchgen.pipelines.template import Path, TemplateError, render
from batchgen.spec import JobSpec
from batchgen.specs.load import describe, make_spec, sort_errors
from batchgen.specs.validate import check_spec
from batchgen.storage import Storage

# How far ahead outputs are compared: a year, so that both changes of daylight saving are in it, or so many dates (fewer of
# many partitions).
AHEAD, MAX_AHEAD, MIN_AHEAD = timedelta(days=370), 9000, 25


def check(pipeline: Pipeline, now: datetime) -> None:
    """Raises SpecError for what can't work on any date."""
    spec, source = pipeline.spec, pipeline.source
    try:
        check_names(spec)
    except GraphError as error:
        raise SpecError(f"{source.locate(error.path)}: {error}") from None
    date = spec.schedule.calendar.find_next(now) or now
    previous_of = {job.name: job.output for job in _make_jobs(pipeline, date - timedelta(days=1), None, outputs=True)}
    for previous in (None, previous_of):
        jobs, specs, filters = _make_jobs(pipeline, date, previous), dict[str, JobSpec](), set[tuple[str, str | None]]()
        for job in jobs:
            specs[job.name] = _check_job(pipeline, job)
            if (job.stage.name, job.filter) not in filters:  # often the same in each of a thousand partitions
                _check_filter(pipeline, job, specs)
                filters.add((job.stage.name, job.filter))
        _check_inputs(pipeline, specs)
    values = make_date_values(spec, date, next(iter(list_partitions(spec).values())))
    for number, wait in enumerate(spec.wait_for):
        for name in ("marker", "stable"):
            _render_at(source, getattr(wait, name), values, ("wait_for", number, name))
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
        location = tuple(sort_errors(error)[0]["loc"])
        if location[:1] == ("engine",):  # pydantic names the kind of engine after it
            location = ("engine", *location[2:])
        raise SpecError(f"{pipeline.source.locate((*path, *location))}: {describe(error)}") from error
    try:
        spec = make_spec(tree, source=f"the job of stage '{job.stage.name}'")
        check_spec(spec)
    except SpecError as error:
        raise SpecError(f"{pipeline.source.locate(path)}: {error}") from error
    return spec


def _check_inputs(pipeline: Pipeline, specs: Mapping[str, JobSpec]) -> None:
    """No job may read what it writes itself, nor what another one writes without saying so: they may run in any order."""
    stages = pipeline.spec.stages
    needs = {stage.name: find_needs(pipeline.spec, number).keys() for number, stage in enumerate(stages)}
    outputs = {f"{Storage(spec.output.path).root.rstrip('/')}/": name for name, spec in specs.items()}
    ordered = sorted(outputs)
    for reader, spec in specs.items():
        stage, _, partition = reader.partition("/")
        for path in spec.input.paths:
            for writer in (outputs[output] for output in _find_read(path, outputs, ordered)):
                written, _, its_partition = writer.partition("/")
                if written not in needs[stage] or partition != its_partition:
                    number = next(number for number, known in enumerate(stages) if known.name == stage)
                    where = pipeline.source.locate(("stages", number, "job", "input", "paths"))
                    raise SpecError(f"{where}: {_describe_read(path, reader, writer, specs[writer].output.path)}")


def _find_read(path: str, outputs: Container[str], ordered: Sequence[str]) -> Iterator[str]:
    """Outputs in which a path lies, or around which it is a folder."""
    is_glob = any(char in path for char in "*?[")
    read = f"{path if is_glob else Storage(path).root}".rstrip("/") + "/"
    yield from (read[: found.end()] for found in re.finditer("/", read) if read[: found.end()] in outputs)
    if not is_glob:
        inside = ordered[bisect_right(ordered, read) :]
        yield from takewhile(lambda output: output.startswith(read), inside)


def _describe_read(path: str, reader: str, writer: str, output: str) -> str:
    if reader == writer:
        return f"{reader} would read what it writes ({path} and {output}); part them"
    stage = writer.partition("/")[0]
    return (
        f"{reader} would read what {writer} writes ({path} and {output}); part them, or say so with `input: {{stage: "
        f"{stage}}}` beside the job or {{{{ stages.{stage}.data }}}}, within a partition"
    )


def _check_filter(pipeline: Pipeline, job: StageJob, specs: Mapping[str, JobSpec]) -> None:
    read = job.stage.input
    if read is None or job.filter is None:
        return
    from batchgen.pipelines.filters import check_filter

    source = specs[make_job_name(read.stage, job.partition)]
    try:
        check_filter(job.filter, source)
    except ValueError as error:
        path: Path = ("stages", pipeline.spec.stages.index(job.stage), "input", "filter")
        raise SpecError(f"{pipeline.source.locate(path)}: {error}") from error


def list_ahead(spec: PipelineSpec, now: datetime) -> list[datetime]:
    """The logical dates of the next year, or as many as are looked at."""
    dates = spec.schedule.calendar.iterate_after(now)
    max_dates = max(MIN_AHEAD, MAX_AHEAD // len(list_partitions(spec)))
    return list(islice(takewhile(lambda date: date < now + AHEAD, dates), max_dates))


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


def check_between(pipelines: Sequence[Pipeline], now: datetime) -> None:
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
