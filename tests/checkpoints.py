"""Small checkpoints in the formats of real ones: safetensors written by hand, an index, NVFP4's files."""

import json
import random
import struct
from typing import Any

CONFIG = {
    "architectures": ["DeepseekV32ForCausalLM"],
    "num_hidden_layers": 61,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "index_head_dim": 128,
    "max_position_embeddings": 163840,
}


def make_safetensors(tensors: dict[str, tuple[str, int]], seed: int = 0) -> bytes:
    """`tensors`: name -> (dtype, bytes)."""
    header, at = {}, 0
    for name, (dtype, num_bytes) in tensors.items():
        header[name] = {"dtype": dtype, "shape": [num_bytes], "data_offsets": [at, at + num_bytes]}
        at += num_bytes
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + random.Random(seed).randbytes(at)


def make_files(num_shards: int = 2, num_bytes: int = 200_000) -> dict[str, bytes]:
    """A plain checkpoint in several files."""
    names = [f"model-{number + 1:05}-of-{num_shards:05}.safetensors" for number in range(num_shards)]
    shards = {
        name: make_safetensors({f"model.layers.{number}.mlp.up_proj.weight": ("BF16", num_bytes)}, number)
        for number, name in enumerate(names)
    }
    weight_map = {f"model.layers.{number}.mlp.up_proj.weight": name for number, name in enumerate(names)}
    return {
        **shards,
        "config.json": json.dumps(CONFIG).encode(),
        "model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode(),
        "tokenizer.json": b"{}",
        "tokenizer_config.json": b"{}",
        "empty.txt": b"",
    }


def make_nvfp4_files(exclude: list[str] | None = None, **quantization: Any) -> dict[str, bytes]:
    """As NVIDIA's recipe leaves a layer: experts and o_proj packed, the rest plain and excluded by name."""
    tensors: dict[str, tuple[str, int]] = {
        "lm_head.weight": ("BF16", 4000),
        "model.embed_tokens.weight": ("BF16", 4000),
    }
    packed = [
        "self_attn.o_proj",
        *(f"mlp.experts.{n}.{p}" for n in range(2) for p in ("gate_proj", "up_proj", "down_proj")),
    ]
    for module in packed:
        name = f"model.layers.0.{module}"
        tensors |= {f"{name}.weight": ("U8", 1000), f"{name}.weight_scale": ("F8_E4M3", 125)}
        tensors |= {f"{name}.weight_scale_2": ("F32", 4), f"{name}.input_scale": ("F32", 4)}
    for module in ("self_attn.q_a_proj", "self_attn.indexer.wk", "mlp.gate", "input_layernorm"):
        tensors[f"model.layers.0.{module}.weight"] = ("BF16", 100)
    excluded = ["lm_head", "model.embed_tokens", "model.layers.0.mlp.gate", "*self_attn.q_a_proj*", "*indexer*"]
    quant = {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16}
    quant_config = {
        "producer": {"name": "modelopt", "version": "0.41.0"},
        "quantization": {**quant, "exclude_modules": excluded if exclude is None else exclude, **quantization},
    }
    return {
        "model.safetensors": make_safetensors(tensors),
        "config.json": json.dumps(CONFIG).encode(),
        "hf_quant_config.json": json.dumps(quant_config).encode(),
        "tokenizer.json": b"{}",
        "tokenizer_config.json": b"{}",
    }
