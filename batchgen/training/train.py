"""The training loop: batches in, weights out. One CPU thread, float32, a fixed number of steps.

Deterministic: the same recipe gives the same weights, bit for bit, on the same processor and build of torch. Sets
torch's thread count and its default seed.
"""

import math
import random
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

from batchgen.training.muon import Muon
from batchgen.training.recipe import MODEL, Recipe
from batchgen.training.rows import TrainingRow, make_batches

NOT_LEARNED = -100
REPORT_EVERY_STEPS = 100


def train(recipe: Recipe, report: Callable[[int, float], None]) -> Any:
    """A new model, trained. `report` hears the step and the mean loss (nats a token) since it last heard."""
    import torch

    torch.set_num_threads(1)  # two threads were no faster, and far slower beside any other busy process
    torch.manual_seed(recipe.seed)
    model = create_model()
    optimizer = Optimizer(model, recipe)
    losses: list[float] = []
    batches = make_batches(recipe, random.Random(recipe.seed))
    for step, batch in enumerate(islice(batches, recipe.num_steps), start=1):
        loss = find_loss(model, batch)
        loss.backward()
        optimizer.step(find_lr_share(recipe, step))
        losses.append(loss.item())
        if step % REPORT_EVERY_STEPS == 0 or step == recipe.num_steps:
            report(step, sum(losses) / len(losses))
            losses.clear()
    return model.eval()


def create_model() -> Any:
    """A DeepseekV32ForCausalLM with random weights from torch's default generator."""
    from transformers import DeepseekV32Config, DeepseekV32ForCausalLM

    # On a CPU the batched kernels for experts were measured 5 to 20 times slower.
    model = DeepseekV32ForCausalLM(DeepseekV32Config(**MODEL, experts_implementation="eager")).train()
    for layer in model.model.layers:
        layer.self_attn.indexer.forward = choose_all
    return model


def choose_all(hidden: Any, *_: Any, **__: Any) -> Any:
    """The indexer's answer when `index_topk` covers the context, without its scores and its sort: a third of a step."""
    import torch

    num_rows, num_tokens = hidden.shape[:2]
    return torch.arange(num_tokens).expand(num_rows, num_tokens, num_tokens)


def find_loss(model: Any, batch: Sequence[TrainingRow]) -> Any:
    """Mean cross-entropy over the completions' tokens. Padded on the right: nothing that counts can see the padding."""
    import torch

    width = max(row.num_tokens for row in batch)
    ids = torch.full((len(batch), width), MODEL["pad_token_id"])
    targets = torch.full((len(batch), width), NOT_LEARNED)
    for number, row in enumerate(batch):
        ids[number, : row.num_tokens] = torch.tensor(row.prompt + row.completion)
        targets[number, len(row.prompt) : row.num_tokens] = torch.tensor(row.completion)
    hidden = model.model(input_ids=ids, attention_mask=None, use_cache=False).last_hidden_state[:, :-1]
    is_learned = targets[:, 1:] != NOT_LEARNED
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[is_learned]), targets[:, 1:][is_learned])


def find_lr_share(recipe: Recipe, step: int) -> float:
    """Share of the full learning rate: a short rise, then a cosine down to `last_lr_share`."""
    fall = 0.5 * (1 + math.cos(math.pi * step / recipe.num_steps))
    return min(1.0, step / recipe.num_warmup_steps) * (recipe.last_lr_share + (1 - recipe.last_lr_share) * fall)


class Optimizer:
    """Muon for the matrices inside the layers; AdamW for embeddings, output head, routers and norms."""

    def __init__(self, model: Any, recipe: Recipe) -> None:
        import torch

        # The indexer gets no gradient in transformers; its weights stay as they were drawn.
        named = [(name, each) for name, each in model.named_parameters() if "indexer" not in name]
        matrices = [each for name, each in named if is_inner_matrix(name, each)]
        others = [each for name, each in named if not is_inner_matrix(name, each)]
        self._recipe = recipe
        self._parameters = [each for _, each in named]
        self._muon = Muon(matrices, weight_decay=recipe.weight_decay)
        groups = [
            {"params": [each for each in others if each.dim() > 1], "weight_decay": recipe.weight_decay},
            {"params": [each for each in others if each.dim() == 1], "weight_decay": 0.0},
        ]
        self._adam = torch.optim.AdamW(groups, lr=recipe.other_lr, betas=(0.9, 0.98), eps=1e-9, fused=True)

    def step(self, lr_share: float) -> None:
        """One step on the gradients that are there, which are gone afterwards."""
        import torch

        torch.nn.utils.clip_grad_norm_(self._parameters, self._recipe.max_grad_norm)
        for group in self._adam.param_groups:
            group["lr"] = self._recipe.other_lr * lr_share
        self._adam.step()
        self._muon.step(self._recipe.matrix_lr * lr_share)
        for parameter in self._parameters:
            parameter.grad = None


def is_inner_matrix(name: str, parameter: Any) -> bool:
    is_edge = "embed_tokens" in name or "lm_head" in name or name.endswith("mlp.gate.weight")
    return parameter.dim() > 1 and not is_edge
