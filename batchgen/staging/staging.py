"""Brings a checkpoint to this node's own disk: once a node, however many workers start.

From a folder at any fsspec URL or on a mounted disk, by our own parallel ranged reads (see `stage_fetch`); a hub id by
`huggingface_hub` into its cache. One process copies, under `flock` on a file beside the copy, which the kernel drops
when that process dies; the others wait, see how far it is, and find the copy done. A copy appears under its name whole,
by a rename, with `_STAGED.json` beside the weights. Killed at any instant, it goes on from what is there.

A copy that is there costs a listing of its source and a look at the files' sizes; only `verify` reads it again.
"""

import asyncio
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from batchgen.errors import InputError, NotFound, SpecError
from batchgen.paths import expand_home
from batchgen.preflight.checkpoint import INDEX, parse_index
from batchgen.spec import ModelSpec
from batchgen.staging.fetch import Fetcher
from batchgen.staging.hub import download, find_cached
from batchgen.staging.lock import OnProgress, StageProgress, Tell, make_log_progress, stage_lock
from batchgen.staging.plan import (
    MARKER,
    SourceFile,
    StagePlan,
    What,
    check_space,
    choose_files,
    list_sum_files,
    parse_sums,
)
from batchgen.storage import Storage
from batchgen.stores.base import mapped_os_errors

DEFAULT_FOLDER = "~/.cache/batchgen/models"
STAGING = ".staging"
NUM_LOOKS = 16


@dataclass(frozen=True, slots=True)
class StageOptions:
    """`num_threads` parts of `part_bytes` are in memory at a time. `find_free`: bytes free on the disk of a folder."""

    num_threads: int = 16
    part_bytes: int = 64 * 2**20
    poll_s: float = 0.5
    find_free: Callable[[Path], int] = lambda folder: shutil.disk_usage(folder).free


DEFAULT_OPTIONS = StageOptions()


def is_staged_first(model: ModelSpec) -> bool:
    """Is it to be copied to this node before it is loaded?"""
    return model.path != "embedded" and (model.is_url or model.stage_dir is not None)


async def stage_model(model: ModelSpec, on_progress: OnProgress | None = None) -> Path:
    """The folder on this node with the model's files, whatever `model.path` names. Cancelling stops the copying, and what
    was copied stays. Raises SpecError (no such model), StorageError (disk full, store down)."""
    stop = threading.Event()
    try:
        return await asyncio.to_thread(stage, model, on_progress=on_progress, stop=stop)
    finally:
        stop.set()


def stage_weights(model: ModelSpec) -> ModelSpec:
    """The model to load: the copy on this node where the spec asks for one, else as it is."""
    return _as_local(model, "model")


def stage_tokenizer(model: ModelSpec) -> ModelSpec:
    """The same for whoever needs the tokenizer alone: of a URL's files only the small ones are copied."""
    return _as_local(model, "tokenizer") if model.is_url else model


def _as_local(model: ModelSpec, what: What) -> ModelSpec:
    if not is_staged_first(model):
        return model
    return model.model_copy(update={"path": str(stage(model, what)), "revision": None, "stage_dir": None})


def stage(
    model: ModelSpec,
    what: What = "model",
    *,
    verify: bool = False,
    on_progress: OnProgress | None = None,
    stop: threading.Event | None = None,
    options: StageOptions = DEFAULT_OPTIONS,
) -> Path:
    """As `stage_model`, blocking. A local folder without `stage_dir` is where it is."""
    stop, on_progress = stop or threading.Event(), on_progress or make_log_progress(_say)
    if model.path == "embedded":
        return Path(str(files("batchgen") / "embedded"))
    local = expand_home(model.path)
    if local.is_dir() and model.stage_dir is None:
        return local
    parent = expand_home(model.stage_dir or DEFAULT_FOLDER)
    if not model.is_url and not local.is_dir():
        if local.is_absolute() or model.path.startswith((".", "~")) or model.path.count("/") > 1:
            raise SpecError(f"model.path: {model.path} is not a folder on this machine; correct it")
        return _stage_hub(model, parent, options, on_progress, stop)
    plan = make_plan(model.path, what)
    final = parent / plan.folder
    if _is_there(final, plan) and not verify:
        return final
    with mapped_os_errors(str(parent), "write"):
        parent.mkdir(parents=True, exist_ok=True)
    with stage_lock(parent / f"{plan.key}.lock", plan.source, options.poll_s, on_progress, stop) as tell:
        if verify or not _is_there(final, plan):
            _copy(plan, final, options, verify, lambda done: _show(plan, done, tell, on_progress), stop)
    return final


def find_copy(model: ModelSpec) -> Path | None:
    """What a start would load without fetching anything: the packaged model, a folder, a copy that is up to date, the hub's
    cache. StorageError where the source of a copy can't be listed, SpecError where it holds no model."""
    local = expand_home(model.path)
    if model.path == "embedded" or (local.is_dir() and model.stage_dir is None):
        return Path(str(files("batchgen") / "embedded")) if model.path == "embedded" else local
    parent = expand_home(model.stage_dir or DEFAULT_FOLDER)
    if model.is_url or local.is_dir():
        plan = make_plan(model.path)
        return parent / plan.folder if _is_there(parent / plan.folder, plan) else None
    return find_cached(model)


def make_plan(source: str, what: What = "model") -> StagePlan:
    """From a listing, the checksums that lie beside the files, and what the store says of each. Raises SpecError for a
    folder without a whole checkpoint."""
    storage = Storage(source)
    try:
        listing = {info.path: info for info in storage.list_files()}
        chosen = choose_files(listing, what)
        if not chosen:
            raise SpecError(f"model.path: there are no files of a checkpoint at {source}; correct it")
        sums: dict[str, str] = {}
        for path in list_sum_files(listing):
            sums.update(parse_sums(path, storage.read_bytes(path).decode("utf-8", errors="replace")))
        if what == "model" and INDEX in listing:
            _check_index(storage, listing)
        with ThreadPoolExecutor(NUM_LOOKS, "look") as pool:  # a listing doesn't know checksums
            known = {info.path: info for info in pool.map(storage.info, chosen) if info is not None}
    except InputError as error:  # of the URL itself
        raise SpecError(f"model.path: {error}") from error
    files = [SourceFile(path, info.num_bytes, info.version, info.md5, sums.get(path)) for path, info in known.items()]
    return StagePlan(source, what, tuple(sorted(files, key=lambda file: file.path)))


def _check_index(storage: Storage, paths: Iterable[str]) -> None:
    try:
        missing = sorted(parse_index(storage.read_bytes(INDEX).decode()) - set(paths))
    except (ValueError, NotFound) as error:
        raise SpecError(f"model.path: {storage.url(INDEX)} {error}; copy the checkpoint there again") from error
    if missing:
        raise SpecError(
            f"model.path: {storage.root} is not whole: {len(missing)} files that its index names are missing, the first "
            f"is {missing[0]}; copy the checkpoint there again"
        )


def _copy(
    plan: StagePlan,
    final: Path,
    options: StageOptions,
    verify: bool,
    on_bytes: Callable[[int], None],
    stop: threading.Event,
) -> None:
    """The lock is held."""
    folder = final.with_name(final.name + STAGING)
    with mapped_os_errors(str(folder), "write"):
        for leftover in final.parent.glob(f"{plan.key}-*{STAGING}"):
            if leftover != folder:
                shutil.rmtree(leftover)  # of a version that nobody will ask for any more
        if final.exists() and not folder.exists():
            final.rename(folder)  # something of it is missing, or shall be looked for: mended as a copy that broke off
        folder.mkdir(exist_ok=True)
        (folder / MARKER).unlink(missing_ok=True)
    parts = {"num_threads": options.num_threads, "part_bytes": options.part_bytes}
    fetcher = Fetcher(plan, folder, **parts, stop=stop, on_bytes=on_bytes)
    if verify:
        fetcher.drop_rotten()
    older = [str(path) for path in final.parent.glob(f"{plan.key}-*") if path.is_dir() and path != folder]
    num_there = sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())
    num_there = min(num_there, plan.num_bytes)
    check_space(plan, folder=str(final.parent), num_there=num_there, num_free=options.find_free(folder), older=older)
    fetcher.run()
    with mapped_os_errors(str(folder), "write"):
        with (folder / MARKER).open("w", encoding="utf-8") as marker:
            json.dump(plan.marker(), marker, indent=1)
            marker.flush()
            os.fsync(marker.fileno())
        if final.exists():
            shutil.rmtree(final)  # a damaged one, which lay beside a copy that had been begun
        folder.rename(final)


def _is_there(final: Path, plan: StagePlan) -> bool:
    """Every file with its size, and the marker of this very listing."""
    try:
        marker = json.loads((final / MARKER).read_text(encoding="utf-8"))
        has_sizes = all((final / file.path).stat().st_size == file.num_bytes for file in plan.files)
    except (OSError, ValueError):
        return False
    return has_sizes and marker == json.loads(json.dumps(plan.marker()))


def _stage_hub(
    model: ModelSpec, parent: Path, options: StageOptions, on_progress: OnProgress, stop: threading.Event
) -> Path:
    """The hub's client resumes on its own; the lock keeps a node's workers from asking eight times over."""
    key = StagePlan(f"{model.path} {model.revision}", "model", ()).key
    with mapped_os_errors(str(parent), "write"):
        parent.mkdir(parents=True, exist_ok=True)
    with stage_lock(parent / f"{key}.lock", model.path, options.poll_s, on_progress, stop):
        on_progress(StageProgress(model.path, None, None))
        return download(model, options.num_threads)


def _show(plan: StagePlan, done: int, tell: Tell, on_progress: OnProgress) -> None:
    tell(done, plan.num_bytes)
    on_progress(StageProgress(plan.source, plan.num_bytes, done))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
