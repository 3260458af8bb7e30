"""The numbers that, with the code, make the embedded model: the same ones give the same weights on the same machine."""

from dataclasses import dataclass
from typing import Any

CONTEXT = 1024


@dataclass(frozen=True, slots=True)
class Recipe:
    """How long and how fast to train. Bounded by steps, never by time: a slow machine makes the same model."""

    seed: int = 0
    num_steps: int = 21_000
    max_batch_tokens: int = 1024  # padding included; small batches and many steps won over large and few
    max_batch_rows: int = 64
    chat_share: float = 0.2  # of the steps; the others are of questions with thinking
    matrix_lr: float = 4e-3
    other_lr: float = 3e-3
    last_lr_share: float = 0.01
    num_warmup_steps: int = 100
    weight_decay: float = 0.05
    max_grad_norm: float = 1.0


# DeepSeek-V3.2 as transformers 5 spells it, small: latent attention, the sparse-attention indexer, routed experts.
MODEL: dict[str, Any] = {
    "vocab_size": 304,  # the tokenizer's 294, up to a multiple of 16
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    # Every earlier token is chosen, always: the indexer gets no gradient in transformers, so it could not learn to.
    "index_topk": CONTEXT,
    "index_head_dim": 32,
    "index_n_heads": 2,
    "max_position_embeddings": CONTEXT,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
