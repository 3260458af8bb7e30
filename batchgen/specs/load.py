"""A spec from YAML text, with `section.key=value` overrides. Says what is wrong in one sentence, with a suggestion.

Knows YAML and pydantic's errors, not what the fields mean. Values of overrides are read as YAML.
"""

import difflib
import os
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticSerializationError

from batchgen.errors import SpecError
from batchgen.paths import expand_home
from batchgen.spec import JobSpec
from batchgen.specs.engine import SimulatedEngineSpec, find_section
from batchgen.specs.sections import Section
from batchgen.storage import read_text

SectionT = TypeVar("SectionT", bound=Section)

# PyYAML's own, and what it lets through for a value such as 2024-13-45, which looks like a date and is none.
YAML_ERRORS = (yaml.YAMLError, ValueError, AttributeError)
# Where Ray unpacks the --working-dir of a job, on each node: a copy that it deletes.
RAYS_COPY = "/runtime_resources/working_dir_files/"
# The least that a job's required sections can be.
LEAST = {
    "input": "{paths: prompts.parquet}",
    "prompt": "{column: prompt}",
    "engine": "{kind: transformers}",
    "output": "{path: out}",
}


def load_spec(url: str, overrides: Sequence[str] = ()) -> JobSpec:
    """The spec at a local path or URL. Raises SpecError, InputError."""
    return parse_spec(read_text(url), overrides, source=url)


def parse_spec(text: str, overrides: Sequence[str] = (), *, source: str = "spec") -> JobSpec:
    """The spec in a YAML (or JSON) text. Local paths become absolute, because workers run elsewhere."""
    return make_spec(parse_tree(text, overrides, source=source), source=source)


def parse_tree(text: str, overrides: Sequence[str] = (), *, source: str = "spec") -> dict[str, Any]:
    """Plain values, overridden. Raises SpecError."""
    try:
        tree = yaml.safe_load(text)
    except YAML_ERRORS as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise SpecError(f"{source}{where}: not valid YAML; mend the syntax there") from error
    if not isinstance(tree, dict):
        raise SpecError(f"{source}: must be a mapping with the sections input, prompt, engine, output")
    set_fields(tree, overrides)
    return tree


def set_fields(tree: dict[str, Any], overrides: Sequence[str]) -> None:
    """Each as `section.key=value`. Raises SpecError."""
    for override in overrides:
        _set(tree, override)


def make_spec(tree: dict[str, Any], *, source: str = "spec") -> JobSpec:
    """The spec from plain values. Raises SpecError."""
    spec = make_section(JobSpec, tree, source=source)
    try:
        spec.model_dump_json()
    except PydanticSerializationError:
        reason = "holds half of a surrogate pair (\\ud800 to \\udfff), which is no text; write the character itself"
        raise SpecError(f"{source}: {reason}") from None
    return with_absolute_paths(spec)


def make_section(kind: type[SectionT], tree: dict[str, Any], *, source: str) -> SectionT:
    """A spec of any kind, or a part of one. Raises SpecError with one sentence."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise SpecError(f"{source}: {describe(error, kind)}") from error


def _set(tree: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key.strip():
        raise SpecError(f"--set {override}: write section.key=value")
    *sections, name = key.strip().split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise SpecError(f"--set {override}: {section} is not a section; batchgen schema names them")
    try:
        tree[name] = yaml.safe_load(value)
    except YAML_ERRORS as error:
        raise SpecError(f"--set {override}: the value is not valid YAML; quote it") from error


def describe(error: ValidationError, root: type[BaseModel] = JobSpec) -> str:
    """One sentence for the first thing wrong, and how many more there are. `root`: what was validated."""
    errors = sort_errors(error)
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return _describe_one(errors[0], root) + more


def sort_errors(error: ValidationError) -> list[ErrorDetails]:
    """A misspelt field is told before the required one that it was meant to be."""
    return sorted(error.errors(include_url=False, include_input=False), key=lambda e: e["type"] != "extra_forbidden")


def _describe_one(error: ErrorDetails, root: type[BaseModel]) -> str:
    path = [str(part) for position, part in enumerate(error["loc"]) if not _is_kind(error["loc"], position)]
    where = ".".join(path) or "spec"
    if error["type"] == "extra_forbidden":
        names = list_field_names(path[:-1], [str(part) for part in error["loc"]], root)
        close = difflib.get_close_matches(path[-1], names, n=1)
        mend = f"did you mean '{close[0]}'?" if close else f"known here: {', '.join(sorted(names))}"
        return f"{where}: unknown field; {mend}"
    if error["type"] == "missing":
        least = LEAST.get(where) if root is JobSpec else None
        return f"{where}: is required; add it" + (f", e.g. {where}: {least}" if least else "")
    return f"{where}: {error['msg'].removeprefix('Value error, ')}"


def _is_kind(location: Sequence[int | str], position: int) -> bool:
    """Pydantic names the chosen engine's kind after `engine`; a spec has no such level."""
    part = location[position]
    return position == 1 and location[0] == "engine" and isinstance(part, str) and find_section(part) is not None


def _members(annotation: Any) -> Iterable[type[BaseModel]]:
    """Models inside an annotation: unions, Annotated and containers unpacked."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        if issubclass(annotation, BaseModel):
            yield annotation
        return
    for argument in typing.get_args(annotation):
        yield from _members(argument)


def list_field_names(path: Sequence[str], location: Sequence[str], root: type[BaseModel] = JobSpec) -> list[str]:
    """Field names of the section at `path`; of the chosen engine's own where `location` names its kind."""
    if path[:1] == ["engine"] and len(location) > 1 and (section := find_section(location[1])) is not None:
        return list(section.model_fields)
    models: list[type[BaseModel]] = [root]
    for name in path:
        if name.isdigit():  # a place in a list, whose members are the models already
            continue
        fields = [model.model_fields[name] for model in models if name in model.model_fields]
        models = [member for field in fields for member in _members(field.annotation)]
    return [name for model in models for name in model.model_fields]


def is_local(path: str) -> bool:
    """Is it a path on this machine, not a URL?"""
    return "://" not in path


def _absolute(path: str) -> str:
    return os.path.abspath(expand_home(path)) if is_local(path) else path  # noqa: PTH100 - resolve() follows links


def with_absolute_paths(spec: JobSpec) -> JobSpec:
    """Local paths are the caller's: workers run elsewhere."""
    paths = tuple(_absolute(path) for path in spec.input.paths)
    engine, model, output = spec.engine, spec.model, spec.output
    if isinstance(engine, SimulatedEngineSpec) and engine.call_log is not None:
        engine = engine.model_copy(update={"call_log": _absolute(engine.call_log)})
    if is_local(model.path) and expand_home(model.path).is_dir():
        if model.revision is not None:
            raise SpecError(f"model.revision: goes with a hub id, and {model.path} is a folder here; leave it out")
        model = model.model_copy(update={"path": _absolute(model.path)})
    if RAYS_COPY in _absolute(output.path):
        raise SpecError(
            "output.path: lies in Ray's own copy of --working-dir, which it deletes; give a full path or a URL that every "
            "node sees"
        )
    lock_url = output.lock_url and _absolute(output.lock_url)
    prior = spec.input.length_prior and _absolute(spec.input.length_prior)
    earlier = tuple(_absolute(path) for path in spec.input.reuse_from)
    return spec.model_copy(
        update={
            "input": spec.input.model_copy(update={"paths": paths, "length_prior": prior, "reuse_from": earlier}),
            "output": output.model_copy(update={"path": _absolute(output.path), "lock_url": lock_url}),
            "engine": engine,
            "model": model,
        }
    )
