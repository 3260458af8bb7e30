"""The input files of a job: found, looked at, compared with those that were planned. Reads footers and keys, no rows."""

from collections.abc import Sequence

import pyarrow as pa

from batchgen.errors import InputError
from batchgen.names import make_data_path
from batchgen.plan import list_changes
from batchgen.prompt import list_prompt_columns
from batchgen.read import read_footers
from batchgen.records import InputFile
from batchgen.spec import JobSpec
from batchgen.specs.validate import check_footer, check_unique, make_passthrough_schema
from batchgen.storage import FileInfo, Storage, is_input, list_inputs

MAX_NAMED = 5


def find_inputs(spec: JobSpec) -> list[FileInfo]:
    """All input files, each once, in the order of input.paths and by name below each."""
    output = Storage(spec.output.path)
    for url in spec.input.paths:
        if is_input(url, output.url(make_data_path(0))):
            raise InputError(f"output.path: {output.root} lies inside the input {url}; choose a folder outside")
    found = {info.path: info for url in spec.input.paths for info in list_inputs(url)}
    inside = next((path for path in found if path.startswith(f"{output.root.rstrip('/')}/")), None)
    if inside is not None:
        raise InputError(f"{inside}: lies inside output.path; choose an output folder outside the input")
    return list(found.values())


def inspect_inputs(
    spec: JobSpec, found: Sequence[FileInfo]
) -> tuple[list[InputFile], pa.Schema, bool | None, dict[str, tuple[int, ...]]]:
    """(files, passthrough schema, was custom_id checked, bytes of the prompts in each row group by file). Raises
    InputError."""
    footers = read_footers(found, list_prompt_columns(spec.prompt))
    for footer in footers:
        check_footer(footer, spec)
    files = [footer.file for footer in footers]
    sizes = {footer.file.path: footer.row_group_bytes for footer in footers if footer.row_group_bytes is not None}
    return files, make_passthrough_schema(footers, spec), check_unique(files, spec), sizes


def check_frozen(files: Sequence[InputFile], found: Sequence[FileInfo]) -> list[str]:
    """Warnings about new files. Raises InputError for planned files that are gone or changed."""
    missing, changed, new = list_changes(files, [(info.path, info.version) for info in found])
    if missing:
        raise InputError(f"{_name(missing)}: was planned and is gone; restore it, or start a new output.path")
    if changed:
        raise InputError(f"{_name(changed)}: was changed since it was planned; restore it, or start a new output.path")
    return [f"{len(new)} new input files are not part of this job: {_name(new)}"] if new else []


def _name(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - MAX_NAMED} more" if len(paths) > MAX_NAMED else ""
    return ", ".join(paths[:MAX_NAMED]) + more
