"""The batched decode loop: prompts in, tokens out, over any Hugging Face causal LM. Imports torch and nothing of
transformers; knows no thread, queue or clock, and belongs to one thread.

`DecodeBatch` holds the rows that are decoded together, left-padded. `admit` prefills rows and lets them join what is
running; `step` gives each row one more token. Both return the rows that ended, which have left the batch. The cache never
holds more than `max_cells` tokens, padding counted: rows are admitted by that, and when growing answers reach it, the row
with the least to lose leaves and comes back later, its tokens kept and prefilled again.

Invariants: the cache is as wide as the mask, and the mask as the longest live row; a row's tokens come from its own
logits and its own random generator, so its neighbours decide nothing. (Matrix products of another batch size may round
another way. In float32 on a CPU that was never seen to change a token; bfloat16 on a GPU may. And the library's indexer of
DeepSeek-V3.2 gives many tokens the same score of zero: in a context beyond `index_topk` tokens, which of these are attended
to depends on the padding, and so on the neighbours.)
"""

from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from batchgen.engines.sampling import Row, accept
from batchgen.worker.stops import Decode

# Attention scores of one prefill that may exist at a time, of all heads. Fused kernels need none of it; others, and
# DeepSeek-V3.2's indexer, write them all out.
MAX_SCORE_BYTES = 512 * 2**20
# Below this many tokens at a time a prefill is not cut, whatever it takes.
MIN_PREFILL_TOKENS = 64
# A newcomer waits for at most this many steps when only few slots are free: each prefill stops the others for a step.
ADMIT_EVERY_STEPS = 8
# Room that a newcomer leaves for everybody's next tokens, or admission and preemption would chase each other.
HEADROOM_TOKENS = 32
# The tensors of a cache layer that rows can be moved in and out of, with the axis that counts tokens.
CACHE_AXES = {"keys": -2, "values": -2, "indexer_keys": 1}


class DecodeBatch:
    """`decode` turns token ids into text. `can_join`: the model's cache is a plain one, so that rows may join a running
    batch; else (sliding windows, state spaces) new rows wait until the batch is empty. See `can_join_cache`. A row that
    needs more than `max_cells` on its own must not be given."""

    def __init__(self, model: Any, decode: Decode, *, max_rows: int, max_cells: int, can_join: bool) -> None:
        self._model = model
        self._decode = decode
        self.max_rows = max_rows
        self.max_cells = max_cells
        self.max_prefill: int | None = None
        self._can_join = can_join
        self._max_scores = MAX_SCORE_BYTES // (4 * count_heads(model))
        self._cache: Any = None
        self._mask: Any = None
        self._steps_since_admission = 0
        self.rows: list[Row] = []
        self.num_tokens = 0
        self.num_preempted = 0

    def make_like(self) -> "DecodeBatch":
        """An empty batch over the same model."""
        return DecodeBatch(
            self._model, self._decode, max_rows=self.max_rows, max_cells=self.max_cells, can_join=self._can_join
        )

    def pick(self, waiting: deque[Row]) -> list[Row]:
        """Takes from the front of `waiting` the rows to admit now: none, or one prefill's worth."""
        group: list[Row] = []
        longest = 0
        while waiting and (group or self._is_time_to_admit()) and len(self.rows) + len(group) < self.max_rows:
            longest = max(longest, len(waiting[0].token_ids) + len(waiting[0].out))
            if group and self._is_too_much(len(group) + 1, longest):
                break
            if (self.rows or group) and not self._has_room(len(group) + 1, longest):
                break
            row = waiting.popleft()
            if not row.is_cancelled:
                group.append(row)
        return group

    def admit(self, group: list[Row]) -> list[Row]:
        """Prefills the rows, gives each its first token (its next, if it was preempted) and takes them in."""
        known = [[*row.token_ids, *row.out] for row in group]
        width = max(len(tokens) for tokens in known)
        ids = [[0] * (width - len(tokens)) + tokens for tokens in known]
        mask = [[0] * (width - len(tokens)) + [1] * len(tokens) for tokens in known]
        with torch.inference_mode():
            mask_tensor = self._tensor(mask)
            logits, cache = self._prefill(self._tensor(ids), mask_tensor)
            self._accept(group, logits)
            self._join(group, cache, mask_tensor)
            self._steps_since_admission = 0
            return self._drop_done()

    def _prefill(self, ids: Any, mask: Any) -> tuple[Any, Any]:
        """Logits of the last position and the cache. A prompt whose scores would take too much memory goes in parts."""
        num_rows, width = ids.shape
        most = max(MIN_PREFILL_TOKENS, self._max_scores // (num_rows * width)) if self._can_join else width
        logits = cache = None
        for start in range(0, width, most):
            end = min(width, start + most)
            logits, cache = forward(self._model, ids[:, start:end], mask[:, :end], cache)
        return logits, cache

    def preempt(self) -> list[Row]:
        """Rows that leave, unfinished, because the next step would not fit: those with the fewest tokens generated. To be
        admitted again, before all others."""
        left: list[Row] = []
        while len(self.rows) > 1 and len(self.rows) * (self._width() + 1) > self.max_cells:
            index = min(range(len(self.rows)), key=lambda each: len(self.rows[each].out))
            left.append(self.rows[index])
            with torch.inference_mode():
                self._keep([each for each in range(len(self.rows)) if each != index])
        self.num_preempted += len(left)
        return left

    def step(self) -> list[Row]:
        """One more token for each row. A no-op on an empty batch."""
        self._steps_since_admission += 1
        with torch.inference_mode():
            ended = self._drop_done()  # who was cancelled since the last step
            if self.rows:
                ids = self._tensor([[row.out[-1]] for row in self.rows])
                self._mask = torch.nn.functional.pad(self._mask, (0, 1), value=1)
                logits, self._cache = forward(self._model, ids, self._mask, self._cache)
                self._accept(self.rows, logits)
                ended += self._drop_done()
            return ended

    def _is_time_to_admit(self) -> bool:
        if not self.rows:
            return True
        num_free = self.max_rows - len(self.rows)
        return self._can_join and (4 * num_free >= self.max_rows or self._steps_since_admission >= ADMIT_EVERY_STEPS)

    def _is_too_much(self, num_rows: int, longest: int) -> bool:
        """For one prefill. Where rows can't join later, those that are left out would wait for the whole batch."""
        is_long = self.max_prefill is not None and self._can_join and num_rows * longest > self.max_prefill
        return is_long or num_rows * longest**2 > self._max_scores

    def _width(self) -> int:
        return 0 if self._mask is None else int(self._mask.shape[1])

    def _has_room(self, num_new: int, longest: int) -> bool:
        width = max(self._width(), longest) + HEADROOM_TOKENS
        return (len(self.rows) + num_new) * width <= self.max_cells

    def _tensor(self, values: list[list[int]]) -> Any:
        return torch.tensor(values, dtype=torch.long, device=self._model.device)

    def _accept(self, rows: list[Row], logits: Any) -> None:
        num_before = sum(len(row.out) for row in rows)
        accept(rows, logits.float(), self._decode)
        self.num_tokens += sum(len(row.out) for row in rows) - num_before

    def _join(self, group: list[Row], cache: Any, mask: Any) -> None:
        if self.rows:
            width = max(self._mask.shape[1], mask.shape[1])
            join_caches(self._cache, cache, width)
            mask = torch.cat([widen(self._mask, 1, width), widen(mask, 1, width)])
        else:
            self._cache = cache
        self._mask = mask
        self.rows = self.rows + group

    def _drop_done(self) -> list[Row]:
        live = [index for index, row in enumerate(self.rows) if not row.is_done]
        if len(live) == len(self.rows):
            return []
        ended = [row for row in self.rows if row.is_done]
        self._keep(live)
        return ended

    def _keep(self, live: list[int]) -> None:
        """Drops all rows but these from batch and cache."""
        self.rows = [self.rows[index] for index in live]
        if not live:
            self._cache = self._mask = None
            return
        chosen = torch.tensor(live, device=self._mask.device)
        self._cache.batch_select_indices(chosen)
        self._mask = self._mask[chosen]
        self._trim()

    def _trim(self) -> None:
        """Cuts the columns that are padding to every row, or the batch would widen for ever while others join it."""
        excess = self._mask.shape[1] - int(self._mask.sum(-1).max())
        if excess and self._can_join:
            self._mask = self._mask[:, excess:]
            map_cache(self._cache, lambda tensor, axis: tensor.narrow(axis, excess, tensor.shape[axis] - excess))


def forward(model: Any, ids: Any, mask: Any, cache: Any) -> tuple[Any, Any]:
    """Logits of the last position [rows, vocabulary], and the cache. `mask` [rows, cached + new] is 0 on padding."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    answer = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return answer.logits[:, -1], answer.past_key_values


def count_heads(model: Any) -> int:
    """Heads that score every token against every other: the attention's or, where it has more, the indexer's."""
    config = model.config.get_text_config()
    named = [getattr(config, name, None) for name in ("num_attention_heads", "index_n_heads")]
    return max((each for each in named if isinstance(each, int)), default=1)


# ---- the cache -------------------------------------------------------------------------------------------------------


def can_join_cache(cache: Any, width: int) -> bool:
    """Whether every layer of this cache is nothing but tensors we know, `width` tokens wide."""
    for layer in cache.layers:
        tensors = {name: value for name, value in vars(layer).items() if torch.is_tensor(value)}
        if getattr(layer, "is_sliding", False) or not tensors or not tensors.keys() <= CACHE_AXES.keys():
            return False
        if any(value.shape[CACHE_AXES[name]] != width for name, value in tensors.items()):
            return False
    return True


def map_cache(cache: Any, change: Callable[[Any, int], Any]) -> None:
    """Replaces each tensor of the cache by `change(tensor, axis)`."""
    for layer in cache.layers:
        for name, axis in CACHE_AXES.items():
            if torch.is_tensor(getattr(layer, name, None)):
                setattr(layer, name, change(getattr(layer, name), axis))


def join_caches(cache: Any, other: Any, width: int) -> None:
    """Appends the rows of `other` to `cache`, both widened to `width`. Zeros, not noise: a masked NaN is still one."""
    for layer, other_layer in zip(cache.layers, other.layers, strict=True):
        for name, axis in CACHE_AXES.items():
            if torch.is_tensor(getattr(layer, name, None)):
                both = [widen(getattr(each, name), axis, width) for each in (layer, other_layer)]
                setattr(layer, name, torch.cat(both))


def widen(tensor: Any, axis: int, width: int) -> Any:
    """Zeros put before the tensor's first token, up to `width`."""
    missing = width - tensor.shape[axis]
    if not missing:
        return tensor
    shape = list(tensor.shape)
    shape[axis] = missing
    return torch.cat([tensor.new_zeros(shape), tensor], dim=axis)


def count_bytes(cache: Any) -> int:
    """Memory of the tensors that we know of a cache."""
    named: list[Any] = [getattr(layer, name, None) for layer in cache.layers for name in CACHE_AXES]
    return sum(tensor.numel() * tensor.element_size() for tensor in named if torch.is_tensor(tensor))


def probe(model: Any) -> tuple[bool, int]:
    """(may rows join a running batch, cache bytes a token), from running the model on two rows of two tokens.
    AttributeError: its cache can't drop rows."""
    with torch.inference_mode():
        ids = torch.zeros((2, 2), dtype=torch.long, device=model.device)
        _, cache = forward(model, ids, torch.ones_like(ids), None)
        can_join, cell_bytes = can_join_cache(cache, 2), max(1, count_bytes(cache) // ids.numel())
        cache.batch_select_indices(torch.tensor([0], device=model.device))
        return can_join, cell_bytes
