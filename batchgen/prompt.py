"""A row of the input becomes a prompt and its sampling parameters. Pure: no tokenizer, no files, no Arrow.

A row is a dict of Python values, one for each column in `list_columns`; a cell that could not be decoded arrives as
`BadCell`. Whatever is wrong with a row raises `BadRow` with a reason that names the column and never quotes its content.
"""

import hashlib
import json
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from batchgen.errors import BadRow, SpecError
from batchgen.records import Guided, Prompt, RowId, SamplingParams
from batchgen.spec import JobSpec, PromptSpec
from batchgen.specs.sampling import SamplingSpec


@dataclass(frozen=True, slots=True)
class BadCell:
    """A cell that has no Python value; `reason` says why, e.g. 'is not valid UTF-8'."""

    reason: str
    error_type: str = "invalid_utf8"


class Integers(list[int]):
    """A cell of a column that can hold nothing but lists of integers, none of them null: nobody need look at each."""


Row = Mapping[str, Any]


def list_template_columns(template: str) -> tuple[str, ...]:
    """Column names in braces, in order of appearance. Raises SpecError for anything but plain names."""
    names: dict[str, None] = {}
    try:
        for _, name, format_spec, conversion in string.Formatter().parse(template):
            if name is None:
                continue
            if not name or format_spec or conversion:
                raise SpecError("prompt.template: write plain column names in braces, {{ and }} for literal braces")
            names[name] = None
    except ValueError as error:
        raise SpecError(f"prompt.template: {error}; write {{{{ and }}}} for literal braces") from error
    if not names:
        raise SpecError("prompt.template: names no column, so every row would ask the same; put one in braces")
    return tuple(names)


def list_prompt_columns(prompt: PromptSpec) -> tuple[str, ...]:
    """Columns that the prompt itself is made of."""
    if prompt.template is not None:
        return list_template_columns(prompt.template)
    return tuple(name for name in (prompt.column, prompt.messages, prompt.prompt_token_ids) if name is not None)


def list_row_columns(spec: JobSpec) -> tuple[str, ...]:
    """Columns read as Python values: the prompt's, custom_id, per-row sampling, tools, what lengths are expected by. Each
    once, in that order."""
    own = (spec.input.custom_id, spec.prompt.sampling, spec.prompt.tools)
    names = [*list_prompt_columns(spec.prompt), *own, spec.input.length_hint, spec.input.length_template]
    return tuple(dict.fromkeys(name for name in names if name is not None))


def list_columns(spec: JobSpec) -> tuple[str, ...]:
    """All columns the job reads, passthrough included."""
    return tuple(dict.fromkeys([*list_row_columns(spec), *spec.input.passthrough]))


def get_cell(row: Row, column: str) -> Any:
    """The cell's value, None when null. Raises BadRow when it can't be decoded."""
    value = row[column]
    if isinstance(value, BadCell):
        raise BadRow(value.error_type, f"column '{column}' {value.reason}")
    return value


def make_custom_id(row: Row, column: str | None, source_file: str, source_row: int) -> str | None:
    """The user's key as text, or one made from file and row number. None where the key is null or undecodable."""
    if column is None:
        return f"{source_file}:{source_row}"
    value = row[column]
    return None if value is None or isinstance(value, BadCell) else str(value)


def _make_text(row: Row, prompt: PromptSpec) -> str:
    if prompt.template is None:
        assert prompt.column is not None
        return _get_text(row, prompt.column)
    values = {name: _get_text(row, name, may_be_empty=True) for name in list_template_columns(prompt.template)}
    parts = string.Formatter().parse(prompt.template)
    return "".join(literal + (values[name] if name is not None else "") for literal, name, _, _ in parts)


def _get_text(row: Row, column: str, *, may_be_empty: bool = False) -> str:
    value = get_cell(row, column)
    if value is None:
        raise BadRow("null_prompt", f"column '{column}' is null")
    text = value if isinstance(value, str) else str(value)
    if not text and not may_be_empty:
        raise BadRow("empty_prompt", f"column '{column}' is empty")
    return text


def _parse_json(value: str, column: str, error_type: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRow(error_type, f"column '{column}' is not valid JSON") from error


def make_messages(value: Any, column: str) -> tuple[dict[str, Any], ...]:
    """A chat from a list of structs or its JSON text; null fields are left out."""
    if value is None:
        raise BadRow("null_prompt", f"column '{column}' is null")
    if isinstance(value, str):
        value = _parse_json(value, column, "bad_messages")
    if not isinstance(value, list) or not value:
        raise BadRow("bad_messages", f"column '{column}' must be a non-empty list of messages")
    return tuple(_make_message(message, number, column) for number, message in enumerate(value))


def _make_message(message: Any, number: int, column: str) -> dict[str, Any]:
    where = f"column '{column}', message {number}"
    if not isinstance(message, dict):
        raise BadRow("bad_messages", f"{where}: must be a struct with role and content")
    fields = {name: value for name, value in message.items() if value is not None}
    role, content = fields.get("role"), fields.get("content")
    if not isinstance(role, str) or not role:
        raise BadRow("bad_messages", f"{where}: role must be text")
    if not isinstance(content, str) and not (content is None and "tool_calls" in fields):
        raise BadRow("bad_messages", f"{where}: content must be text")
    _check_encodable(fields, where, "bad_messages")
    return fields


def _check_encodable(fields: dict[str, Any], where: str, error_type: str) -> None:
    """JSON escapes can smuggle in half of a surrogate pair, which no tokenizer and no UTF-8 file takes."""
    # Most messages; to write one as JSON takes 6 us.
    if all(isinstance(text, str) and text.isascii() for pair in fields.items() for text in pair):
        return
    try:
        json.dumps(fields, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise BadRow("invalid_utf8", f"{where}: holds a lone surrogate") from None
    except (RecursionError, TypeError):  # a key that is no text
        raise BadRow(error_type, f"{where}: is nested too deeply, or no JSON") from None


def make_tools(value: Any, column: str) -> tuple[dict[str, Any], ...] | None:
    """OpenAI's tool definitions from a list of structs or its JSON text; None where there are none. A struct's null
    fields are left out, for all structs of a column have the same fields; in JSON a null is meant."""
    value = _parse_json(value, column, "bad_tools") if isinstance(value, str) else drop_nulls(value)
    if value is None or value == []:
        return None
    if not isinstance(value, list):
        raise BadRow("bad_tools", f"column '{column}' must be a list of tool definitions")
    return tuple(_make_tool(tool, f"column '{column}', tool {number}") for number, tool in enumerate(value))


def _make_tool(tool: Any, where: str) -> dict[str, Any]:
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or tool.get("type") != "function":
        raise BadRow("bad_tools", f"{where}: must be a struct with type 'function' and a function")
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise BadRow("bad_tools", f"{where}: its function must have a name")
    parameters = function.get("parameters")
    if isinstance(parameters, str):  # a column of structs has one type for all, which two schemas don't
        parameters = _parse_json(parameters, where.partition("'")[2].partition("'")[0], "bad_tools")
        function = {**function, "parameters": parameters}
    if not isinstance(parameters, dict | None):
        raise BadRow("bad_tools", f"{where}: the parameters of its function must be a JSON schema")
    made = {**tool, "function": function}
    _check_encodable(made, where, "bad_tools")
    return made


def drop_nulls(value: Any) -> Any:
    """The value without the null fields of its structs."""
    if isinstance(value, dict):
        return {name: drop_nulls(field) for name, field in value.items() if field is not None}
    return [drop_nulls(item) for item in value] if isinstance(value, list) else value


def _make_token_ids(value: Any, column: str) -> tuple[int, ...]:
    if value is None:
        raise BadRow("null_prompt", f"column '{column}' is null")
    if isinstance(value, list) and not value:
        raise BadRow("empty_prompt", f"column '{column}' is empty")
    is_integers = isinstance(value, Integers) or (isinstance(value, list) and set(map(type, value)) == {int})
    if not is_integers or min(value) < 0:
        raise BadRow("bad_token_ids", f"column '{column}' must be a list of non-negative integers without nulls")
    return tuple(value)


def make_prompt(row: Row, prompt: PromptSpec) -> Prompt:
    """What the row asks. Raises BadRow."""
    tools = None if prompt.tools is None else make_tools(get_cell(row, prompt.tools), prompt.tools)
    if prompt.messages is not None:
        return Prompt(messages=make_messages(get_cell(row, prompt.messages), prompt.messages), tools=tools)
    if prompt.prompt_token_ids is not None:
        return Prompt(token_ids=_make_token_ids(get_cell(row, prompt.prompt_token_ids), prompt.prompt_token_ids))
    text = _make_text(row, prompt)
    if not text:
        raise BadRow("empty_prompt", "the template renders to nothing")
    if not prompt.chat:
        return Prompt(text=text)
    system = ({"role": "system", "content": prompt.system},) if prompt.system is not None else ()
    return Prompt(messages=(*system, {"role": "user", "content": text}), tools=tools)


def make_sampling_params(sampling: SamplingSpec) -> SamplingParams:
    """The job's parameters for every row that overrides nothing."""
    guided = None if sampling.guided is None else Guided(**sampling.guided.model_dump())
    return SamplingParams(**sampling.model_dump(exclude={"n", "guided"}), guided=guided)


def make_row_sampling(row: Row, spec: JobSpec, refused: frozenset[str] = frozenset()) -> SamplingParams:
    """The row's own parameters: the job's, overridden by its sampling column. `refused` names the fields that the engine
    can't honour. Raises BadRow."""
    column = spec.prompt.sampling
    value = get_cell(row, column) if column is not None else None
    if column is None or value is None:
        return make_sampling_params(spec.sampling)
    overrides = _parse_json(value, column, "bad_sampling") if isinstance(value, str) else value
    if not isinstance(overrides, dict):
        raise BadRow("bad_sampling", f"column '{column}' must be a struct or a JSON object")
    given = {name: field for name, field in overrides.items() if field is not None}
    if isinstance(value, dict) and "guided" in given:
        given["guided"] = drop_nulls(given["guided"])
    for name in sorted(given.keys() & (refused | {"n"})):
        raise BadRow("bad_sampling", f"column '{column}': {name} can't be set for a row")
    try:
        sampling = SamplingSpec.model_validate({**spec.sampling.model_dump(), **given})
    except ValidationError as error:
        raise BadRow("bad_sampling", f"column '{column}': {_describe(error)}") from None
    if sampling.guided is not None and sampling.guided.form not in spec.engine.guided_forms:
        reason = f"guided.{sampling.guided.form} can't be honoured by the engine '{spec.engine.kind}'"
        raise BadRow("bad_sampling", f"column '{column}': {reason}")
    return make_sampling_params(sampling)


def _describe(error: ValidationError) -> str:
    """The first thing wrong with a row's sampling. Names fields of ours only: an unknown key is the row's own text."""
    first = error.errors(include_input=False, include_url=False)[0]
    if first["type"] == "extra_forbidden" or not first["loc"]:
        return f"has a field that is none of {', '.join(SamplingSpec.model_fields)}"
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg'].removeprefix('Value error, ')}"


def make_seed(seed: int | None, row_id: RowId) -> int | None:
    """The request's own seed, below 2**63: the same row and sample always gets the same one. None stays None."""
    if seed is None:
        return None
    text = f"{seed}\0{row_id.source_file}\0{row_id.source_row}\0{row_id.sample_index}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1
