"""A model by its hub id, through `huggingface_hub` and its cache, which resumes on its own. The one place that imports it.

Holds for its releases 0.36 (with transformers 4.57) to 2. The caller holds the lock of the node.
"""

import errno
from pathlib import Path

from batchgen.errors import SpecError, StorageError
from batchgen.paths import expand_home
from batchgen.preflight.checkpoint import INDEX, parse_index
from batchgen.spec import ModelSpec
from batchgen.staging.fetch import check_safetensors
from batchgen.stores.base import make_error

# Twins of the safetensors in formats that no engine here reads.
SKIPPED = ["*.pth", "*.pt", "*.h5", "*.msgpack", "*.gguf", "*.onnx", "original/*", "onnx/*"]
FULL = {errno.ENOSPC, errno.EDQUOT}


def download(model: ModelSpec, num_threads: int) -> Path:
    """The snapshot, whole. SpecError when the hub doesn't give it, StorageError for a full disk or a broken file."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # What the hub's client raises of its own is an OSError; what it lets through has a base in common with its HTTP error.
    failures: tuple[type[BaseException], ...] = (OSError, HFValidationError, *HfHubHTTPError.__bases__)
    try:
        found = snapshot_download(
            model.path,
            revision=model.revision,
            cache_dir=find_cache_dir(model),
            ignore_patterns=SKIPPED,
            max_workers=num_threads,
        )
    except failures as error:
        if isinstance(error, OSError) and error.errno in FULL:
            raise make_error("write", find_cache_dir(model) or "the hub's cache", error) from error
        raise SpecError(
            f"model.path: {model.path} can't be had from the hub ({type(error).__name__}); give a folder, a URL, or a hub "
            "id and revision that this machine can reach"
        ) from error
    for path in sorted(Path(found).rglob("*.safetensors")):
        try:
            check_safetensors(path)
        except ValueError as error:
            raise StorageError(f"{path} {error}; delete it there and start again") from error
    return Path(found)


def find_cached(model: ModelSpec) -> Path | None:
    """The snapshot's folder when its weights are all in the cache; asks no hub."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cache = find_cache_dir(model)
        found = try_to_load_from_cache(model.path, "config.json", cache_dir=cache, revision=model.revision)
    except HFValidationError:
        return None
    folder = Path(found).parent if isinstance(found, str) else None
    return folder if folder is not None and _has_weights(folder) else None


def find_cache_dir(model: ModelSpec) -> str | None:
    """None: where the hub's client keeps it."""
    return None if model.stage_dir is None else str(expand_home(model.stage_dir))


def _has_weights(folder: Path) -> bool:
    """The cache holds what was asked for so far: often the tokenizer alone, or half of the weights."""
    try:
        names = parse_index((folder / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return any(folder.glob("*.safetensors"))
    return all((folder / name).is_file() for name in names)
