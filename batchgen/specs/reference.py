"""The reference of a spec, made from the models: every section and field with its type, default and description. Pure."""

import json
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from batchgen.spec import JobSpec
from batchgen.specs.engine import BUILT_IN

HEAD = """# A spec, field by field

Made from the models by `batchgen schema --markdown`: don't edit. A field without a default is required. Units stand in
brackets. Unknown fields are refused. Any field can be overridden with `--set section.field=value`.
"""


def make_reference() -> str:
    """The whole page as Markdown."""
    return HEAD + "".join(_describe_section(path, model) for path, model in list_sections())


def list_sections() -> Iterator[tuple[str, type[BaseModel]]]:
    """(path in the YAML, model), in the order of the spec; `engine` once for each kind."""
    for name, field in JobSpec.model_fields.items():
        if name == "engine":
            for kind, section in BUILT_IN.items():
                yield from _list_nested(f"engine, kind: {kind}", section)
            continue
        for model in _list_models(field.annotation):
            yield from _list_nested(name, model)


def _list_nested(path: str, model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    yield path, model
    for name, field in model.model_fields.items():
        for inner in _list_models(field.annotation):
            yield from _list_nested(f"{path}.{name}", inner)


def _list_models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        if issubclass(annotation, BaseModel):
            yield annotation
        return
    for argument in typing.get_args(annotation):
        yield from _list_models(argument)


def _describe_section(path: str, model: type[BaseModel]) -> str:
    said = " ".join((model.__doc__ or "").split())
    rows = "".join(_describe_field(name, field) for name, field in model.model_fields.items())
    return f"\n## {path}\n\n{said}\n\n| field | type | default | what |\n|---|---|---|---|\n{rows}"


def _describe_field(name: str, field: FieldInfo) -> str:
    cells = (f"`{name}`", describe_type(field.annotation), _describe_default(field), field.description or "")
    return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |\n"


def _describe_default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None or value is PydanticUndefined:
        return "-"
    if isinstance(value, BaseModel):
        return "see below"
    return f"`{json.dumps(value, default=str)}`"


def describe_type(annotation: Any) -> str:
    """For people who write YAML."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return describe_type(arguments[0])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe_type(part) for part in arguments if part is not type(None)))
    if origin in (tuple, list, frozenset, set):
        return f"list of {describe_type(arguments[0])}"
    if origin is not None:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return {str: "text", int: "integer", float: "number", bool: "true or false"}.get(
        annotation, getattr(annotation, "__name__", "any value").strip("_")
    )
