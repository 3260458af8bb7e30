"""Reads what a checkpoint says of itself, wherever it lies, without its weights: the listing, small JSON files, and the
headers of the safetensors files, many at a time. 415 GB in 160 files cost some 320 small reads."""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from batchgen.errors import InputError, StorageError
from batchgen.preflight.checkpoint import (
    INDEX,
    LENGTH_BYTES,
    QUANT_CONFIG,
    CheckpointFacts,
    Modules,
    Tensor,
    parse_header,
    parse_index,
    read_length,
)
from batchgen.storage import FileInfo, Storage

NUM_THREADS = 16


def read_checkpoint(url: str) -> CheckpointFacts:
    """Of a local folder or any fsspec URL. StorageError where it can't be listed."""
    storage = Storage(url)
    listing = {info.path: info for info in storage.list_files()}
    faults: list[str] = []
    config = _read_json(storage, "config.json", listing, faults)
    quant_config = _read_json(storage, QUANT_CONFIG, listing, faults)
    modules = Modules()
    for found in _read_headers(storage, listing):
        if isinstance(found, str):
            faults.append(found)
        else:
            modules.add(found)
    return CheckpointFacts(
        source=storage.root,
        sizes={path: info.num_bytes for path, info in listing.items()},
        config=config or {},
        quant_config=quant_config,
        indexed=_read_index(storage, listing, faults),
        faults=tuple(faults),
        packed=frozenset(modules.packed),
        plain=modules.plain,
        num_shared_bytes=modules.num_shared_bytes,
        num_expert_bytes=modules.num_expert_bytes,
    )


def read_tensors(url: str) -> tuple[dict[str, Any], list[Tensor]]:
    """(config, tensors of all weight files) of a checkpoint; no tensors where there is nothing but a config. Raises
    InputError for a folder without a config or with a broken file, StorageError where it can't be read."""
    storage = Storage(url)
    listing = {info.path: info for info in storage.list_files()}
    faults: list[str] = []
    config = _read_json(storage, "config.json", listing, faults)
    headers = _read_headers(storage, listing)
    indexed = _read_index(storage, listing, faults) or frozenset()
    faults += [f"{name} is missing, which the index names" for name in sorted(indexed - listing.keys())]
    faults += [found for found in headers if isinstance(found, str)]
    if config is None or faults:
        what = faults[0] if faults else "has no config.json"
        raise InputError(f"{storage.root}: {what}; copy the checkpoint there again")
    return config, [tensor for found in headers if not isinstance(found, str) for tensor in found]


def _read_headers(storage: Storage, listing: Mapping[str, FileInfo]) -> list[list[Tensor] | str]:
    """The tensors of each weight file, or a sentence on what is wrong with it."""
    with ThreadPoolExecutor(NUM_THREADS, "headers") as pool:
        weights = [info for path, info in listing.items() if path.endswith(".safetensors") and "/" not in path]
        return list(pool.map(lambda info: _read_header(storage, info), weights))


def _read_header(storage: Storage, info: FileInfo) -> list[Tensor] | str:
    """The file's tensors, or a sentence on what is wrong with it."""
    try:
        length = read_length(_read_range(storage, info, 0, LENGTH_BYTES))
        return parse_header(_read_range(storage, info, LENGTH_BYTES, length), info.num_bytes)
    except ValueError as error:
        return f"{info.path} {error}"
    except StorageError as error:
        return str(error)


def _read_range(storage: Storage, info: FileInfo, start: int, num_bytes: int) -> bytes:
    """What there is of it: a store refuses a range that begins behind the end."""
    num_bytes = min(num_bytes, info.num_bytes - start)
    return storage.read_range(info.path, start, num_bytes, info.version) if num_bytes > 0 else b""


def _read_json(
    storage: Storage, path: str, listing: Mapping[str, FileInfo], faults: list[str]
) -> dict[str, Any] | None:
    if path not in listing:
        return None
    try:
        value = json.loads(storage.read_bytes(path))
    except ValueError:
        value = None
    if not isinstance(value, dict):
        faults.append(f"{path} is no JSON object")
        return None
    return value


def _read_index(storage: Storage, listing: Mapping[str, FileInfo], faults: list[str]) -> frozenset[str] | None:
    if INDEX not in listing:
        return None
    try:
        return parse_index(storage.read_bytes(INDEX).decode("utf-8", errors="replace"))
    except ValueError as error:
        faults.append(f"{INDEX} {error}")
        return None
