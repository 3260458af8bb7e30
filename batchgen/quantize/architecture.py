"""The tensors of a DeepSeek-V3.2 checkpoint from its config alone, as they lie on disk: names, shapes, types. Pure.

Names and shapes are those of the published code (deepseek-ai/DeepSeek-V3.2-Exp, inference/) and of transformers 5.23;
FP8 weights carry a float32 scale for each 128 x 128 block. Checked against the embedded model's file.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

from batchgen.preflight.checkpoint import Tensor
from batchgen.quantize.recipe import FP8_SCALE, make_tensor

ARCHITECTURE = "DeepseekV32ForCausalLM"
FP8_BLOCK = 128


@dataclass(frozen=True, slots=True)
class Shape:
    """A config's numbers, in its own words."""

    hidden_size: int
    num_hidden_layers: int
    first_k_dense_replace: int
    num_attention_heads: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    n_shared_experts: int
    vocab_size: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    index_n_heads: int
    index_head_dim: int
    num_nextn_predict_layers: int = 0


def read_shape(config: Mapping[str, Any]) -> Shape:
    """Raises ValueError, a clause, for the config of another architecture or one that lacks a number."""
    named = config.get("architectures") or ["none"]
    found = ", ".join(map(str, named)) if isinstance(named, list) else str(named)
    if found != ARCHITECTURE:
        raise ValueError(f"is of architecture {found}; sizes are known for {ARCHITECTURE} only")
    names = {name: config.get(name, 0 if name == "num_nextn_predict_layers" else None) for name in Shape.__slots__}
    missing = [name for name, value in names.items() if not isinstance(value, int)]
    if missing:
        raise ValueError(f"lacks {missing[0]}")
    return Shape(**names)


def list_tensors(shape: Shape, *, is_fp8: bool) -> Iterator[Tensor]:
    """`is_fp8`: as DeepSeek publishes it, else all in BF16. Norms and the router are BF16 in both, its bias float32."""
    yield make_tensor("model.embed_tokens.weight", "BF16", (shape.vocab_size, shape.hidden_size))
    for layer in range(shape.num_hidden_layers):
        yield from _list_layer(shape, layer, is_fp8)
    for layer in range(shape.num_hidden_layers, shape.num_hidden_layers + shape.num_nextn_predict_layers):
        yield from _list_layer(shape, layer, is_fp8)
        yield from _list_ahead(shape, f"model.layers.{layer}")
    yield make_tensor("model.norm.weight", "BF16", (shape.hidden_size,))
    yield make_tensor("lm_head.weight", "BF16", (shape.vocab_size, shape.hidden_size))


def _list_layer(shape: Shape, layer: int, is_fp8: bool) -> Iterator[Tensor]:
    prefix = f"model.layers.{layer}"
    for module, rows, columns in _list_matrices(shape, layer):
        yield from _make_linear(f"{prefix}.{module}", rows, columns, is_fp8)
    for module, size in (
        ("input_layernorm", shape.hidden_size),
        ("post_attention_layernorm", shape.hidden_size),
        ("self_attn.q_a_layernorm", shape.q_lora_rank),
        ("self_attn.kv_a_layernorm", shape.kv_lora_rank),
        ("self_attn.indexer.k_norm", shape.index_head_dim),
    ):
        yield make_tensor(f"{prefix}.{module}.weight", "BF16", (size,))
    yield make_tensor(f"{prefix}.self_attn.indexer.k_norm.bias", "BF16", (shape.index_head_dim,))
    heads = (shape.index_n_heads, shape.hidden_size)
    yield make_tensor(f"{prefix}.self_attn.indexer.weights_proj.weight", "BF16", heads)
    if layer >= shape.first_k_dense_replace:
        yield make_tensor(f"{prefix}.mlp.gate.weight", "BF16", (shape.n_routed_experts, shape.hidden_size))
        yield make_tensor(f"{prefix}.mlp.gate.e_score_correction_bias", "F32", (shape.n_routed_experts,))


def _list_matrices(shape: Shape, layer: int) -> Iterator[tuple[str, int, int]]:
    """(module, rows, columns) of a layer's linear modules."""
    heads, hidden = shape.num_attention_heads, shape.hidden_size
    qk = shape.qk_nope_head_dim + shape.qk_rope_head_dim
    yield "self_attn.q_a_proj", shape.q_lora_rank, hidden
    yield "self_attn.q_b_proj", heads * qk, shape.q_lora_rank
    yield "self_attn.kv_a_proj_with_mqa", shape.kv_lora_rank + shape.qk_rope_head_dim, hidden
    yield "self_attn.kv_b_proj", heads * (shape.qk_nope_head_dim + shape.v_head_dim), shape.kv_lora_rank
    yield "self_attn.o_proj", hidden, heads * shape.v_head_dim
    yield "self_attn.indexer.wq_b", shape.index_n_heads * shape.index_head_dim, shape.q_lora_rank
    yield "self_attn.indexer.wk", shape.index_head_dim, hidden
    if layer < shape.first_k_dense_replace:
        yield from _list_mlp("mlp", shape.intermediate_size, hidden)
        return
    for expert in range(shape.n_routed_experts):
        yield from _list_mlp(f"mlp.experts.{expert}", shape.moe_intermediate_size, hidden)
    yield from _list_mlp("mlp.shared_experts", shape.moe_intermediate_size * shape.n_shared_experts, hidden)


def _list_mlp(module: str, width: int, hidden: int) -> Iterator[tuple[str, int, int]]:
    yield f"{module}.gate_proj", width, hidden
    yield f"{module}.up_proj", width, hidden
    yield f"{module}.down_proj", hidden, width


def _list_ahead(shape: Shape, prefix: str) -> Iterator[Tensor]:
    """What a multi-token-prediction layer has beside a layer's own: it carries the embeddings and the head again."""
    hidden, vocab = shape.hidden_size, shape.vocab_size
    yield make_tensor(f"{prefix}.eh_proj.weight", "BF16", (hidden, 2 * hidden))
    yield make_tensor(f"{prefix}.embed_tokens.weight", "BF16", (vocab, hidden))
    yield make_tensor(f"{prefix}.shared_head.head.weight", "BF16", (vocab, hidden))
    for module in ("enorm", "hnorm", "shared_head.norm"):
        yield make_tensor(f"{prefix}.{module}.weight", "BF16", (hidden,))


def _make_linear(module: str, rows: int, columns: int, is_fp8: bool) -> Iterator[Tensor]:
    yield make_tensor(f"{module}.weight", "F8_E4M3" if is_fp8 else "BF16", (rows, columns))
    if is_fp8:
        blocks = (ceil(rows / FP8_BLOCK), ceil(columns / FP8_BLOCK))
        yield make_tensor(f"{module}{FP8_SCALE}", "F32", blocks)
