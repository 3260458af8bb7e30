"""A `PipelineSpec` from YAML, checked as far as it can be without a run: every mistake with its file and line."""

import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import PurePosixPath
from typing import Any

from pydantic import ValidationError

from batchgen.errors import SpecError
from batchgen.pipelines.check import check, check_between
from batchgen.pipelines.source import Pipeline, Source, parse_source
from batchgen.pipelines.spec import PipelineSpec
from batchgen.pipelines.template import Path
from batchgen.specs.load import describe, is_local, sort_errors
from batchgen.storage import Storage, read_text

# Paths in a job's tree.
_JOB_PATHS = {"input": ("paths", "length_prior", "reuse_from"), "output": ("path", "lock_url")}


def load_pipelines(urls: Sequence[str], now: datetime) -> list[Pipeline]:
    """All of them, checked. Raises SpecError, InputError."""
    pipelines = [load_pipeline(url, now) for url in urls]
    for number, pipeline in enumerate(pipelines):
        for other in pipelines[:number]:
            if other.spec.name == pipeline.spec.name:  # wherever their states lie: submission ids are made of it
                where = pipeline.source.locate(("name",))
                raise SpecError(f"{where}: {other.source.file} has the name '{other.spec.name}', too; choose another")
    check_between(pipelines, now)
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
        path = tuple(sort_errors(error)[0]["loc"])
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


def _read_job(pipeline_url: str, url: str, path: Path, source: Source) -> dict[str, Any]:
    """A job that stands in a file of its own, beside the pipeline's."""
    if is_local(url) and not url.startswith(("/", "~")):
        folder = os.path.dirname(pipeline_url) if is_local(pipeline_url) else str(PurePosixPath(pipeline_url).parent)  # noqa: PTH120
        url = f"{folder}/{url}" if is_local(pipeline_url) and folder else url
    tree, lines = parse_source(read_text(url), url)
    source.lines.update({(*path, *below): where for below, where in lines.lines.items()})
    return tree
