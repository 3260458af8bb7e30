"""Loading a Hugging Face causal LM: weights on their device, and what the checkpoint says of itself.

Every way in which that fails is a SpecError that names the field to change, but for what the machine lacks at that
moment (memory), which is EngineDied. Torch and transformers are imported by the functions.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from batchgen.engines.hf_tokenizer import resolve_model, unloadable
from batchgen.errors import EngineDied, InputError, SpecError, StorageError
from batchgen.preflight.checkpoint import QUANT_CONFIG
from batchgen.spec import ModelSpec
from batchgen.specs.engine import TransformersEngineSpec
from batchgen.staging.staging import stage_weights

CUDA_CACHE_SHARE = 0.6
CPU_CACHE_SHARE = 0.25
MAX_CPU_CACHE_BYTES = 4 * 2**30


def load_model(model: ModelSpec, engine: TransformersEngineSpec) -> Any:
    """The weights on their device, ready to infer."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    device = pick_device(engine.device)
    try:
        model = stage_weights(model)
    except StorageError as error:
        raise EngineDied(str(error)) from error
    if device.startswith("cuda"):
        # cuDNN's attention makes a plan for each new shape, and in a decode loop every step has a new one: measured on
        # an H100 with a 1B Llama, 128 rows, two thirds of all time went there.
        torch.backends.cuda.enable_cudnn_sdp(False)
    options: dict[str, Any] = {"dtype": pick_dtype(engine.dtype, device)}
    if device == "cpu":
        options["experts_implementation"] = "eager"  # on a CPU the batched kernels were measured 5 to 20 times slower
    try:
        with quiet_progress():
            if (folder := find_nvfp4(resolve_model(model))) is not None:
                from batchgen.engines.nvfp4_model import load_nvfp4_model

                vendor = load_nvfp4_model(folder, engine.nvfp4, options)
            else:
                vendor = AutoModelForCausalLM.from_pretrained(resolve_model(model), revision=model.revision, **options)
        return vendor.to(device).eval()
    except InputError as error:
        raise SpecError(f"model.path: {error}") from error
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise unloadable(model, "weights", error) from error
    except (RuntimeError, torch.OutOfMemoryError) as error:
        raise EngineDied(f"loading {model.path} failed: {type(error).__name__}: {str(error)[:300]}") from error


def find_nvfp4(source: str) -> Path | None:
    """The folder, when it holds an NVFP4 checkpoint of nvidia-modelopt's."""
    try:
        config = json.loads((Path(source) / QUANT_CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:  # no quantization, or a hub id
        return None
    algorithm = (config.get("quantization") or {}).get("quant_algo") if isinstance(config, dict) else None
    if algorithm != "NVFP4":
        raise ValueError(f"{QUANT_CONFIG} says {algorithm}, and NVFP4 is the one quantization that is read here")
    return Path(source)


def pick_device(device: str) -> str:
    """The torch device of the spec's word. Raises SpecError when this machine has none such."""
    import torch

    num_gpus = torch.cuda.device_count()
    if device == "auto":
        return "cuda" if num_gpus else "cpu"
    if device not in {"cpu", "cuda" if num_gpus else "cpu", *(f"cuda:{index}" for index in range(num_gpus))}:
        raise SpecError(f"engine.device: {device} is not on this machine, where torch sees {num_gpus} GPUs; try 'auto'")
    return device


def pick_dtype(dtype: str, device: str) -> str:
    return "float32" if dtype == "auto" and device == "cpu" else dtype


def find_cache_bytes(engine: TransformersEngineSpec, device: Any) -> int:
    """What the KV cache may take, bytes: the spec's word, else a share of what is free once the weights are loaded. Not
    all of it: a prefill's scores and one layer's copy, made when rows join, need room too."""
    import torch

    if engine.cache_gib is not None:
        return int(engine.cache_gib * 2**30)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * CUDA_CACHE_SHARE)
    return int(min(MAX_CPU_CACHE_BYTES, read_free_bytes() * CPU_CACHE_SHARE))


def read_free_bytes() -> int:
    """Memory of this machine that can be had, the page cache's included, and within this container's limit."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    try:
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
    except OSError:  # no container, or one of the old kind
        return free
    return free if limit == "max" else min(free, max(0, int(limit) - int(used)))


def find_max_model_len(model: ModelSpec, config: Any) -> int:
    """Prompt plus completion, tokens: what the spec says, within what the model can."""
    own: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    if own is None and model.max_model_len is None:
        raise SpecError(f"model.max_model_len: {model.path} does not say its limit; give one")
    if own is not None and (model.max_model_len or 0) > own:
        raise SpecError(f"model.max_model_len: {model.max_model_len} is more than the {own} of {model.path}; lower it")
    return model.max_model_len or own or 0


def list_eos_ids(model: Any, tokenizer_eos: int | None) -> frozenset[int]:
    """All end-of-text tokens that the checkpoint names anywhere: chat models often name a second one in one place."""
    named = [getattr(model.config, "eos_token_id", None), model.generation_config.eos_token_id, tokenizer_eos]
    ids = [each if isinstance(each, list) else [each] for each in named]
    return frozenset(token_id for each in ids for token_id in each if token_id is not None)


@contextmanager
def quiet_progress() -> Iterator[None]:
    """No progress bars in an actor's log."""
    from transformers.utils import logging as vendor_logging

    was_on = vendor_logging.is_progress_bar_enabled()
    vendor_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            vendor_logging.enable_progress_bar()
