"""What can be known to be wrong before any engine starts: columns, types, duplicate keys, the first rendered prompt.

Each refusal is one sentence with the file, the column or field, and the mend. What only single rows show (a null prompt,
malformed messages) is not refused here: it becomes that row's error.
"""

import difflib
import json
from collections.abc import Callable, Sequence
from itertools import islice

import pyarrow as pa
import pyarrow.compute as pc

from batchgen.engines import check_supported
from batchgen.engines.base import Tokenizer
from batchgen.errors import BadRow, InputError, SpecError
from batchgen.prompt import list_columns, list_prompt_columns, list_row_columns, make_prompt, make_row_sampling
from batchgen.read import Footer, Unreadable, decode_rows, iter_batches, iter_shard
from batchgen.records import InputFile, Prompt, Shard
from batchgen.spec import JobSpec
from batchgen.worker.prepare import check_thinking, check_tools
from batchgen.write import list_reserved_names

MAX_UNIQUE_ROWS = 10_000_000
# Keys are small: so many of them are decoded at a time.
KEY_ROWS = 8192
# Batches of rows among which the first prompt is looked for.
FIRST_BATCHES = 16

types = pa.types
TypeCheck = Callable[[pa.DataType], bool]


def is_text(kind: pa.DataType) -> bool:
    """Text, or bytes that are taken as UTF-8."""
    if types.is_dictionary(kind):
        return is_text(kind.value_type)
    checks: tuple[TypeCheck, ...] = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    return any(check(kind) for check in checks) or kind in (pa.string_view(), pa.binary_view())


def is_list(kind: pa.DataType) -> bool:
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def is_messages(kind: pa.DataType) -> bool:
    """A list of structs with role and content, or JSON text."""
    if is_list(kind) and types.is_struct(kind.value_type):
        parts = {field.name: field.type for field in kind.value_type}
        return {"role", "content"} <= parts.keys() and all(
            is_text(parts[name]) or types.is_null(parts[name]) for name in ("role", "content")
        )
    return is_text(kind)


def is_tools(kind: pa.DataType) -> bool:
    """A list of structs, or JSON text."""
    return bool(is_list(kind) and types.is_struct(kind.value_type)) or is_text(kind)


def is_token_ids(kind: pa.DataType) -> bool:
    return is_list(kind) and bool(types.is_integer(kind.value_type))


def is_key(kind: pa.DataType) -> bool:
    return is_text(kind) or bool(types.is_integer(kind))


def is_number(kind: pa.DataType) -> bool:
    return bool(types.is_integer(kind) or types.is_floating(kind))


def is_sampling(kind: pa.DataType) -> bool:
    return bool(types.is_struct(kind)) or is_text(kind)


def is_scalar(kind: pa.DataType) -> bool:
    """What a template can print."""
    return not types.is_nested(kind) or is_text(kind)


def list_checks(spec: JobSpec) -> list[tuple[str, str, TypeCheck, str]]:
    """(spec field, column, check of its type, what it must be) for each column with a meaning."""
    prompt = spec.prompt
    checks: list[tuple[str, str | None, TypeCheck, str]] = [
        ("prompt.column", prompt.column, is_text, "text"),
        (
            "prompt.messages",
            prompt.messages,
            is_messages,
            "a list of structs with role and content as text, or JSON text",
        ),
        ("prompt.prompt_token_ids", prompt.prompt_token_ids, is_token_ids, "a list of integers"),
        ("prompt.sampling", prompt.sampling, is_sampling, "a struct or JSON text"),
        ("prompt.tools", prompt.tools, is_tools, "a list of structs or JSON text"),
        ("input.custom_id", spec.input.custom_id, is_key, "text or integers"),
        ("input.length_hint", spec.input.length_hint, is_number, "a number"),
        ("input.length_template", spec.input.length_template, is_key, "text or integers"),
    ]
    if prompt.template is not None:
        columns = list_prompt_columns(prompt)
        checks += [("prompt.template", name, is_scalar, "text, a number, a boolean or a date") for name in columns]
    checks += [("input.passthrough", name, lambda _: True, "") for name in spec.input.passthrough]
    return [(field, column, check, wanted) for field, column, check, wanted in checks if column is not None]


def check_spec(spec: JobSpec) -> None:
    """What the spec alone shows to be impossible. Raises SpecError."""
    check_supported(spec)
    list_columns(spec)
    for name in spec.input.passthrough:
        if name in list_reserved_names():
            raise SpecError(
                f"input.passthrough: '{name}' is a column that batchgen writes itself; leave it out, or rename it there"
            )
    if len(set(spec.input.passthrough)) != len(spec.input.passthrough):
        raise SpecError("input.passthrough: names a column twice; name each once")
    if "://" in spec.output.path and spec.output.path.startswith("memory:") and spec.cluster.pool == "ray":
        raise SpecError("output.path: memory:// lives in one process; use cluster.pool: inline or another store")


def check_footer(footer: Footer, spec: JobSpec) -> None:
    """Are all columns there, with types that can work? Raises InputError."""
    for field, column, check, wanted in list_checks(spec):
        names = footer.schema.names
        if names.count(column) > 1:
            raise InputError(
                f"{footer.file.path}: has {names.count(column)} columns named '{column}'; rename all but one"
            )
        if column not in names:
            close = difflib.get_close_matches(column, names, n=1)
            mend = f"did you mean '{close[0]}'?" if close else f"it has: {', '.join(names[:20])}"
            raise InputError(f"{footer.file.path}: has no column '{column}' ({field}); {mend}")
        kind = footer.schema.field(column).type
        if not check(kind) and not types.is_null(kind):  # what an empty or all-null column is written as
            raise InputError(f"{footer.file.path}: column '{column}' ({field}) is {kind}; it must be {wanted}")
    if footer.is_signed:
        check_decrypted(footer.file, spec)


def check_decrypted(file: InputFile, spec: JobSpec) -> None:
    """Can the columns that we need be read, of a file of which some are encrypted? Raises InputError."""
    try:
        next(iter_batches(Shard(0, file, 0, file.num_rows), list_columns(spec)), None)
    except InputError as error:
        raise InputError(f"{file.path}: has encrypted columns, which are not supported; decrypt it first") from error


def make_passthrough_schema(footers: Sequence[Footer], spec: JobSpec) -> pa.Schema:
    """One type for each passthrough column over all files, to which every value of theirs goes unchanged. Raises
    InputError where there is none."""
    fields = [_merge_column(footers, name) for name in spec.input.passthrough]
    return pa.schema([field.with_nullable(True).remove_metadata() for field in fields])


def _merge_column(footers: Sequence[Footer], name: str) -> pa.Field:
    merged, origin = pa.field(name, pa.null()), ""
    for footer in footers:
        field = footer.schema.field(name)
        kind = promote(merged.type, field.type)
        if kind is None:
            raise InputError(
                f"{footer.file.path}: passthrough column '{name}' is {field.type}, another type than in {origin} "
                f"({merged.type}); write them with one type or leave it out of input.passthrough"
            )
        if kind != merged.type or not origin:
            merged, origin = field.with_type(kind), footer.file.path
    return merged


# From narrow to wide; each holds all values of those before it.
WIDENINGS = (
    (pa.int8(), pa.int16(), pa.int32(), pa.int64()),
    (pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()),
    (pa.float16(), pa.float32(), pa.float64()),
    (pa.string_view(), pa.string(), pa.large_string()),
    (pa.binary_view(), pa.binary(), pa.large_binary()),
)


def promote(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """The type that holds every value of both unchanged; None where there is none."""
    if one == other or types.is_null(other):
        return one
    if types.is_null(one):
        return other
    if types.is_dictionary(one) or types.is_dictionary(other):
        return promote(*(kind.value_type if types.is_dictionary(kind) else kind for kind in (one, other)))
    for kinds in WIDENINGS:
        if one in kinds and other in kinds:
            return max(one, other, key=kinds.index)
    return _promote_nested(one, other)


def _promote_nested(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    if types.is_decimal128(one) and types.is_decimal128(other) and one.scale == other.scale:
        return max(one, other, key=lambda kind: kind.precision)
    plain_lists = (types.is_list, types.is_large_list)
    if any(is_one(one) for is_one in plain_lists) and any(is_one(other) for is_one in plain_lists):
        item = promote(one.value_type, other.value_type)
        is_large = types.is_large_list(one) or types.is_large_list(other)
        return item and (pa.large_list(item) if is_large else pa.list_(item))
    if types.is_struct(one) and types.is_struct(other) and [f.name for f in one] == [f.name for f in other]:
        kinds = [promote(mine.type, theirs.type) for mine, theirs in zip(one, other, strict=True)]
        return None if None in kinds else pa.struct([(f.name, kind) for f, kind in zip(one, kinds, strict=True)])
    return None


def check_unique(files: Sequence[InputFile], spec: JobSpec) -> bool | None:
    """True when custom_id was checked, None when it was not (made by us, switched off, or too many rows for auto).
    Raises InputError for a key that is there more than once; null is a key like any other."""
    column, mode = spec.input.custom_id, spec.input.check_unique
    num_rows = sum(file.num_rows for file in files)
    if column is None or mode == "never" or (mode == "auto" and num_rows > MAX_UNIQUE_ROWS):
        return None
    keys = pa.chunked_array([_read_keys(file, column) for file in files], pa.large_binary())
    unique = pc.unique(keys)
    if len(unique) < len(keys):
        counts = keys.value_counts()
        twice = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")[0]
        key = twice.as_py()
        shown = "null" if key is None else repr(key.decode(errors="replace"))
        where = _locate(files, keys, twice)
        raise InputError(
            f"{where}: custom_id {shown} (column '{column}') is there more than once; make it unique, or set "
            "input.check_unique: never"
        )
    return True


def _read_keys(file: InputFile, column: str) -> pa.Array:
    whole = Shard(0, file, 0, file.num_rows)
    parts = [batch.column(column) for _, batch in iter_batches(whole, [column], max_rows=KEY_ROWS)]
    chunks = pa.chunked_array(parts) if parts else pa.chunked_array([], pa.large_binary())
    if types.is_dictionary(chunks.type):
        chunks = chunks.cast(chunks.type.value_type)
    if types.is_integer(chunks.type):
        chunks = chunks.cast(pa.large_string())
    return chunks.cast(pa.large_binary()).combine_chunks()


def _locate(files: Sequence[InputFile], keys: pa.ChunkedArray, key: pa.Scalar) -> str:
    """File and row of the second time a key appears."""
    same = pc.is_null(keys) if not key.is_valid else pc.fill_null(pc.equal(keys, key), False)
    position = pc.indices_nonzero(same)[1].as_py()
    for file in files:
        if position < file.num_rows:
            return f"{file.path} row {position}"
        position -= file.num_rows
    raise AssertionError("the key was counted, so it is in a file")


def render_first(shards: Sequence[Shard], spec: JobSpec, tokenizer: Tokenizer | None) -> tuple[str, int | None]:
    """(text, tokens) of the first prompt of the job that renders; without a tokenizer, what the server is sent and None.
    Raises InputError when none of the first rows makes a prompt, SpecError when the model can't do what the job asks."""
    check_thinking(spec, tokenizer)
    check_tools(spec, tokenizer)
    columns, reason = list_row_columns(spec), ""
    for _, rows in islice(iter_shard(shards[0], list_columns(spec)), FIRST_BATCHES):
        if isinstance(rows, Unreadable):
            reason = reason or rows.reason
            continue
        for row in decode_rows(rows, columns):
            try:
                prompt, sampling = make_prompt(row, spec.prompt), make_row_sampling(row, spec)
                return _render(prompt, tokenizer, sampling.thinking)
            except BadRow as error:
                reason = reason or str(error)
    raise InputError(f"{shards[0].file.path}: none of its first rows makes a prompt; the first one: {reason}")


def _render(prompt: Prompt, tokenizer: Tokenizer | None, thinking: bool) -> tuple[str, int | None]:
    messages, tools = prompt.messages, prompt.tools
    if tokenizer is None:
        sent = {"messages": messages, "tools": tools} if tools else messages or prompt.token_ids
        return prompt.text or json.dumps(sent, ensure_ascii=False, indent=1, default=str), None
    if prompt.token_ids is not None:
        return tokenizer.decode(prompt.token_ids), len(prompt.token_ids)
    if messages is not None:
        rendered = tokenizer.render_chat(messages, thinking=thinking, tools=tools)
        return rendered, len(tokenizer.encode_chat(messages, thinking=thinking, tools=tools))
    assert prompt.text is not None
    return prompt.text, len(tokenizer.encode(prompt.text))
