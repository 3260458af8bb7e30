"""SciCode's test_data.h5: what the tests of each step compare with, as Python values.

The file's layout is the reference's (`scicode/parse/parse.py`): step/testN holds one value or a tuple of them; a value is a
dataset, a list, a sparse matrix or a dict. h5py reads it here, outside the sandbox.
"""

import io
from collections.abc import Mapping
from typing import Any

from batchgen.errors import InputError
from batchgen.storage import list_inputs, open_input


def read_targets(url: str, counts: Mapping[str, int]) -> dict[str, list[Any]]:
    """By step number, a target for each of its tests. Raises InputError for a file that lacks one."""
    import h5py

    info, *others = list_inputs(url)
    if others:
        raise InputError(f"{url}: is {1 + len(others)} files; give SciCode's test_data.h5")
    with open_input(info.path, info.version) as source:
        data = io.BytesIO(source.read())
    try:
        with h5py.File(data, "r") as file:
            return {step: [_read_test(file, step, number + 1) for number in range(num)] for step, num in counts.items()}
    except KeyError as error:
        raise InputError(f"{url}: lacks the targets of a step: {error.args[0]}; give SciCode's test_data.h5") from error
    except OSError as error:
        raise InputError(f"{url}: is not HDF5; give SciCode's test_data.h5") from error


def _read_test(file: Any, step: str, number: int) -> Any:
    name = f"{step}/test{number}"
    if name not in file:
        raise KeyError(name)
    values = [_read_value(file[name][key]) for key in file[name]]
    return values[0] if len(values) == 1 else tuple(values)


def _read_value(node: Any) -> Any:
    if not hasattr(node, "keys"):
        return _read_cell(node)
    if "list" in node:
        return [_read_cell(node["list"][key]) for key in node["list"]]
    if "sparse_matrix" in node:
        return _read_matrix(node["sparse_matrix"])
    return {_read_key(key): _read_entry(value) for key, value in node.items()}


def _read_entry(node: Any) -> Any:
    return _read_matrix(node["sparse_matrix"]) if hasattr(node, "keys") else _read_cell(node)


def _read_cell(node: Any) -> Any:
    value = node[()]
    return value.decode() if isinstance(value, bytes) else value


def _read_key(key: str) -> float | str:
    try:
        return float(key)
    except ValueError:
        return key


def _read_matrix(node: Any) -> Any:
    from scipy import sparse

    data, shape = node["data"][()], tuple(node["shape"][()])
    if "row" in node:
        return sparse.coo_matrix((data, (node["row"][()], node["col"][()])), shape=shape)
    parts = (data, node["indices"][()], node["indptr"][()])
    if "blocksize" in node:
        return sparse.bsr_matrix(parts, shape=shape, blocksize=tuple(node["blocksize"][()]))
    return sparse.csr_matrix(parts, shape=shape)
