"""One quantization from spec to checked checkpoint, resumable: measure, pack, check, upload, report.

Each step leaves its result where the next run finds it: what was measured in `work_dir`, the packed folder there under
its name once it is whole, files of the output one by one, and the report last. A folder with a report of the same
quantization is done; one of another is refused, and so is any other checkpoint: a claim put there before the first file
says whose the files are, and of which packing.
"""

import json
import mmap
import secrets
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from batchgen import __version__
from batchgen.errors import InputError, OutputError, SpecError
from batchgen.manifest import read_json
from batchgen.paths import expand_home
from batchgen.plan import make_plan
from batchgen.preflight.checkpoint import QUANT_CONFIG
from batchgen.preflight.checkpoint_facts import read_tensors
from batchgen.prompt import list_columns
from batchgen.quantize.spec import QuantizeSpec
from batchgen.read import Unreadable, iter_shard
from batchgen.records import Request
from batchgen.specs.inputs import find_inputs, inspect_inputs
from batchgen.staging.staging import stage_weights
from batchgen.storage import Storage
from batchgen.worker.prepare import Preparer

REPORT = "quantize_report.json"
CLAIM = "quantize_started.json"
PACKED, MEASURED, PACKING = "checkpoint", "measured.json", "packing"
# Written by nobody but the source: tokenizer, chat template, generation defaults.
COPIED = ("tokenizer", "special_tokens_map", "chat_template", "generation_config", "vocab", "merges", "encoding")
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Places:
    """`source`: the checkpoint on this machine. `work`: this quantization's own folder."""

    source: Path
    work: Path
    output: Storage


def quantize(spec: QuantizeSpec, say: Say) -> dict[str, Any]:
    """The report. Raises Refusal for what can't work, StorageError; then start it again and it goes on."""
    check_installed()
    output = Storage(spec.output.path)
    if (done := find_report(output, spec)) is not None:
        say("nothing left to do: the checkpoint is there and was checked")
        return done
    source = find_source(spec)
    work = expand_home(spec.work_dir) / spec.fingerprint()
    work.mkdir(parents=True, exist_ok=True)
    places = Places(source, work, output)
    if not (work / PACKED).is_dir():
        pack_checkpoint(spec, places, say)
    report = {"fingerprint": spec.fingerprint(), "batchgen": __version__, **check_folders(source, work / PACKED, say)}
    if report["faults"]:
        raise OutputError(f"{work / PACKED}: {report['faults'][0]}; remove that folder and run it again")
    upload(work / PACKED, output, make_claim(spec, work), say)
    output.put(REPORT, json.dumps(report, indent=1).encode())
    output.delete(CLAIM)
    shutil.rmtree(work)
    return report


def check_installed() -> None:
    """Raises SpecError: before the model is loaded."""
    for module in ("torch", "transformers", "modelopt"):
        if find_spec(module) is None:
            raise SpecError(f"{module} is not installed; pip install 'batchgen[quantize]'")


def find_report(output: Storage, spec: QuantizeSpec) -> dict[str, Any] | None:
    """The report of this very quantization. Raises OutputError when the folder holds another one, or something else."""
    if output.info(REPORT) is None:
        claim = read_json(output, CLAIM)
        strays = [info.path for info in output.list_files() if is_of_checkpoint(info.path)]
        if strays and (claim is None or claim.get("fingerprint") != spec.fingerprint()):
            raise OutputError(f"{output.root}: holds {strays[0]} of another checkpoint; choose an empty output.path")
        return None
    report: dict[str, Any] = json.loads(output.read_bytes(REPORT))
    if report["fingerprint"] != spec.fingerprint():
        raise OutputError(f"{output.root}: holds the checkpoint of another quantization; choose another output.path")
    return report


def is_of_checkpoint(path: str) -> bool:
    return path.endswith((".safetensors", ".bin")) or path in ("config.json", QUANT_CONFIG)


def find_source(spec: QuantizeSpec) -> Path:
    """The model's folder on this machine. Raises SpecError, and InputError for a checkpoint that isn't whole."""
    from batchgen.engines.hf_tokenizer import resolve_model

    folder = Path(resolve_model(stage_weights(spec.model)))
    if not folder.is_dir():
        raise SpecError(f"model.path: {spec.model.path} is no folder here; stage it first (batchgen stage)")
    if (folder / QUANT_CONFIG).exists():
        raise InputError(f"model.path: {folder} has a {QUANT_CONFIG}, it is quantized already; give its source")
    read_tensors(str(folder))
    return folder


def read_prompts(spec: QuantizeSpec) -> list[tuple[int, ...]]:
    """Token ids of the first calibration rows that make a prompt, cut. Raises InputError where there are too few."""
    from batchgen.engines.hf_tokenizer import HFTokenizer

    job = spec.as_job()
    files, *_ = inspect_inputs(job, find_inputs(job))
    preparer, calibration = Preparer(job, HFTokenizer(job.model), None), spec.calibration

    def iter_prompts() -> Iterable[tuple[int, ...]]:
        for shard in make_plan(job, files).shards:
            for first_row, rows in iter_shard(shard, list_columns(job)):
                if not isinstance(rows, Unreadable):
                    numbers = range(first_row, first_row + rows.num_rows)
                    made = preparer.prepare(rows, shard.file.path, numbers)
                    yield from (each.ids[: calibration.max_prompt_tokens] for each in made if isinstance(each, Request))

    found = list(islice(iter_prompts(), calibration.num_rows))
    if len(found) < calibration.num_rows:
        raise InputError(
            f"input.paths: {len(found)} rows make a prompt, and calibration.num_rows asks for {calibration.num_rows}; give "
            "more rows or ask for fewer"
        )
    return found


def pack_checkpoint(spec: QuantizeSpec, places: Places, say: Say) -> None:
    """`work/checkpoint`, whole, by a rename."""
    from batchgen.quantize.calibrate import batch_rows, calibrate, export, read_measured, write_measured

    prompts = read_prompts(spec)
    model, measured = load_plain(places.source, spec), read_measured(places.work / MEASURED)
    if measured.num_rows:
        say(f"{measured.num_rows} of {len(prompts)} calibration rows were measured before")
    last_saved = measured.num_rows

    def save(now: Any) -> None:
        nonlocal last_saved
        if now.num_rows - last_saved >= spec.calibration.save_interval_rows or now.num_rows == len(prompts):
            write_measured(places.work / MEASURED, now)
            last_saved = now.num_rows
            say(f"measured {now.num_rows} of {len(prompts)} rows")

    model = calibrate(model, batch_rows(prompts, spec.calibration.max_batch_rows), measured, save)
    unfinished = places.work / f"{PACKED}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    export(model, unfinished)
    finish_configs(unfinished, places.source, spec.output.kv_cache)
    (places.work / PACKING).write_text(secrets.token_hex(16), encoding="utf-8")
    unfinished.rename(places.work / PACKED)


def load_plain(folder: Path, spec: QuantizeSpec) -> Any:
    """In bfloat16, as calibration wants it; over all GPUs where there are some. Raises SpecError."""
    import torch
    from transformers import AutoModelForCausalLM

    from batchgen.engines.hf_model import quiet_progress
    from batchgen.engines.hf_tokenizer import unloadable

    options: dict[str, Any] = {"device_map": "auto"} if torch.cuda.is_available() else {}
    if not options:
        torch.set_num_threads(1)  # a second one was measured to slow small models
        options = {"experts_implementation": "eager"}
    try:
        with quiet_progress():
            model, told = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.bfloat16, output_loading_info=True, **options
            )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise unloadable(spec.model, "weights", error) from error
    if missing := sorted(told["missing_keys"]):  # transformers would draw them at random
        raise InputError(
            f"model.path: {folder} lacks {len(missing)} of the model's tensors, first {missing[0]}; copy the checkpoint "
            "there again"
        )
    return model.eval()


def finish_configs(folder: Path, source: Path, kv_cache: str) -> None:
    """Make the exported folder one that every reader takes."""
    from batchgen.training.save import write_portable_config

    write_portable_config(folder / "config.json")
    path = folder / QUANT_CONFIG
    quant_config = json.loads(path.read_text(encoding="utf-8"))
    if kv_cache == "fp8":
        quant_config["quantization"]["kv_cache_quant_algo"] = "FP8"
    path.write_text(json.dumps(quant_config, indent=2) + "\n", encoding="utf-8")
    for file in source.iterdir():
        if file.name.startswith(COPIED):  # DeepSeek's encoding is a folder
            copy = shutil.copytree if file.is_dir() else shutil.copyfile
            copy(file, folder / file.name)


def check_folders(source: Path, packed: Path, say: Say) -> dict[str, Any]:
    """The comparison of both, for a report. Raises InputError for a folder that is no whole checkpoint."""
    from batchgen.quantize.check import Comparison, LayerError, compare_tensors, measure
    from batchgen.quantize.folder import open_folder

    config, source_tensors = read_tensors(str(source))
    _, packed_tensors = read_tensors(str(packed))
    num_layers = int(config["num_hidden_layers"])
    faults = compare_tensors(source_tensors, packed_tensors, num_layers)
    layers: list[LayerError] = []
    if not faults:
        with open_folder(source) as one, open_folder(packed) as other:
            layers, faults = measure(one, other, num_layers)
    sizes = (sum(tensor.num_bytes for tensor in tensors) for tensors in (source_tensors, packed_tensors))
    report = Comparison(tuple(faults), tuple(layers), *sizes).as_json()
    say(f"checked {len(layers)} packed weights: {len(faults)} faults, {report['ratio']:.3f} times smaller")
    return report


def make_claim(spec: QuantizeSpec, work: Path) -> dict[str, str]:
    """Whose the output is. `packing`: two runs that pack anew may differ in an activation's scale, at equal sizes."""
    return {"fingerprint": spec.fingerprint(), "packing": (work / PACKING).read_text(encoding="utf-8")}


def upload(folder: Path, output: Storage, claim: dict[str, str], say: Say) -> None:
    """Files of this packing that are not there yet in their full size, the configs last: without them nobody takes the
    weights."""
    is_ours = read_json(output, CLAIM) == claim
    there = {info.path: info.num_bytes for info in output.list_files()} if is_ours else {}
    output.put(CLAIM, json.dumps(claim).encode())
    found = (file for file in folder.rglob("*") if file.is_file())
    for file in sorted(found, key=lambda file: (file.suffix == ".json", file.name)):
        name, num_bytes = file.relative_to(folder).as_posix(), file.stat().st_size
        if there.get(name) == num_bytes:
            continue
        if num_bytes:
            with file.open("rb") as source, mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ) as data:
                output.put(name, memoryview(data))
        else:  # which can't be mapped
            output.put(name, b"")
        say(f"wrote {name}, {num_bytes:,} bytes")
