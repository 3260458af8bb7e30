"""What one request wants of its tokens: its state while it is decoded, the penalties, the draw, and where it ends.

Pure but for the rows it is given. Imports torch. A draw takes its uniform numbers from the row's own generator, as many as
the row's own logits make it take, and nothing from its neighbours. The order of the filters is temperature, top_k, top_p,
min_p; ties go to the lower token id.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from batchgen.records import SamplingParams, TokenLogprob
from batchgen.worker.stops import Decode, decode_tail

# After this many draws in vain a row's vocabulary is sorted. With top_p 0.95 one in twenty is in vain.
MAX_DRAWS = 8
TINY = 1e-30


@dataclass(slots=True, eq=False)
class Row:
    """One request while it is decoded. `is_cancelled` may be set by any thread; all else is the decode thread's.

    `out` holds every generated token; `kept` is `out` without the end-of-text or stop token that ended it, and
    `logprobs` goes with `kept`. A stop string's tokens stay in `out` and are cut from `text`. `finish_reason` is
    'stop', 'length' or 'failed': the model's numbers were not finite."""

    token_ids: tuple[int, ...]
    sampling: SamplingParams
    max_tokens: int
    end_ids: frozenset[int]
    generator: Any
    out: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    is_cancelled: bool = False

    @property
    def kept(self) -> list[int]:
        return self.out[:-1] if self.out and self.out[-1] in self.end_ids else self.out

    @property
    def is_done(self) -> bool:
        return self.finish_reason is not None or self.is_cancelled


def make_row(token_ids: tuple[int, ...], sampling: SamplingParams, max_tokens: int, eos_ids: frozenset[int]) -> Row:
    """A row that has not begun. One that always takes the likeliest token has no generator."""
    generator = make_generator(sampling.seed) if sampling.temperature > 0 else None
    return Row(token_ids, sampling, max_tokens, eos_ids | frozenset(sampling.stop_token_ids), generator)


def make_generator(seed: int | None) -> Any:
    """Without a seed it takes fresh entropy."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed((seed ^ seed >> 32) & 0xFFFFFFFF)  # it heeds no higher bit
    return generator


def accept(rows: Sequence[Row], logits: Any, decode: Decode) -> None:
    """Gives each row one token from its line of `logits` [rows, vocabulary], float32, and ends those that are done."""
    is_sane = torch.isfinite(logits.amax(-1)).tolist()
    logprobs = list_logprobs(logits, rows)
    for index, token_id in enumerate(draw(penalise(logits, rows), rows)):
        row = rows[index]
        if not is_sane[index]:
            row.finish_reason = "failed"
            continue
        row.out.append(token_id)
        if index in logprobs and token_id not in row.end_ids:
            row.logprobs.append(make_logprob(token_id, logprobs[index], row.sampling.logprobs or 0))
        end_if_last(row, decode)


# ---- the draw --------------------------------------------------------------------------------------------------------


def penalise(logits: Any, rows: Sequence[Row]) -> Any:
    """The logits after each row's penalties; the given ones stay as they are."""
    penalised = [index for index, row in enumerate(rows) if has_penalty(row.sampling)]
    if not penalised:
        return logits
    logits = logits.clone()
    for index in penalised:
        repeat_penalty(logits[index], rows[index])
        count_penalty(logits[index], rows[index])
    return logits


def has_penalty(sampling: SamplingParams) -> bool:
    return bool(
        sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty not in (None, 1.0)
    )


def repeat_penalty(scores: Any, row: Row) -> None:
    """Hugging Face's: over prompt and answer, a positive score is divided, a negative one multiplied. In place."""
    penalty = row.sampling.repetition_penalty
    if penalty is not None:
        seen = torch.tensor(sorted({*row.token_ids, *row.out}), device=scores.device)
        scores[seen] = torch.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)


def count_penalty(scores: Any, row: Row) -> None:
    """OpenAI's: over the answer alone, once for being there and once for each time. In place."""
    if row.out:
        counts = torch.bincount(torch.tensor(row.out), minlength=scores.shape[0]).to(scores.device)
        scores -= counts * (row.sampling.frequency_penalty or 0.0)
        scores -= (counts > 0) * (row.sampling.presence_penalty or 0.0)


def draw(logits: Any, rows: Sequence[Row]) -> list[int]:
    """One token id a row; rows whose logits are not finite get some id."""
    tokens = logits.argmax(-1)
    sampled = [index for index, row in enumerate(rows) if row.sampling.temperature > 0]
    if sampled:
        chosen = torch.tensor(sampled, device=logits.device)
        tokens[chosen] = draw_sampled(logits[chosen], [rows[index] for index in sampled])
    ids: list[int] = tokens.tolist()
    return ids


def draw_sampled(logits: Any, rows: Sequence[Row]) -> Any:
    """One token id a row, [rows].

    Nothing is sorted, for sorting a whole vocabulary costs more than a small model's layers: a token is drawn from all of
    them and drawn again while top_k or top_p would not have kept it, which gives the filtered distribution exactly. A
    filter that keeps so little that this takes long is a rare case, and for it we sort."""
    weights = make_weights(logits, [row.sampling.temperature for row in rows])
    tokens = torch.zeros(len(rows), dtype=torch.long, device=logits.device)
    left = list(range(len(rows)))
    odds = make_odds(weights, rows)
    for _ in range(MAX_DRAWS):
        drawn, is_kept = try_draw(odds, [rows[index] for index in left])
        tokens[torch.tensor(left, device=logits.device)] = drawn
        again = [number for number, kept in enumerate(is_kept.tolist()) if not kept]
        if not again:
            return tokens
        left = [left[number] for number in again]
        odds = odds.select(again)
    tokens[torch.tensor(left, device=logits.device)] = draw_sorted(weights[left], [rows[index] for index in left])
    return tokens


def make_weights(logits: Any, temperatures: list[float]) -> Any:
    """What each token weighs in the draw, 1 for the likeliest, [rows, vocabulary]. The best score is taken off first, or
    a tiny temperature would overflow."""
    scores = logits - logits.amax(-1, keepdim=True)
    return (scores / column(temperatures, logits.device).float().clamp(min=TINY)).exp()


@dataclass(frozen=True, slots=True)
class Odds:
    """What a draw is made from. `among` [rows, vocabulary]: weights after top_k (ties of the last one included); `sums`
    the running sum of those that min_p keeps too; `mass` [rows, 1] the weight that top_p takes its share of. Sums are
    float64: a float32 sum over a large vocabulary loses its tail."""

    among: Any
    sums: Any
    mass: Any

    def select(self, chosen: list[int]) -> "Odds":
        return Odds(self.among[chosen], self.sums[chosen], self.mass[chosen])


def make_odds(weights: Any, rows: Sequence[Row]) -> Odds:
    among = weights
    mass = None
    limits = [row.sampling.top_k or weights.shape[1] for row in rows]
    if min(limits) < weights.shape[1]:
        best = weights.topk(max(limit for limit in limits if limit < weights.shape[1]), dim=-1).values
        among, mass = keep_best(weights, best, limits)
    kept = among
    if any(row.sampling.min_p for row in rows):
        kept = among * (among >= column([row.sampling.min_p or 0.0 for row in rows], weights.device))
    sums = kept.cumsum(dim=-1, dtype=torch.float64)
    if mass is None:
        mass = sums[:, -1:] if kept is among else among.sum(-1, keepdim=True, dtype=torch.float64)
    return Odds(among, sums, mass)


def keep_best(weights: Any, best: Any, limits: list[int]) -> tuple[Any, Any]:
    """(weights with zero below each row's top_k, the weight of exactly that many). `best` falls along a row; a limit
    beyond it is none."""
    is_limited = torch.tensor([limit <= best.shape[1] for limit in limits], device=weights.device)[:, None]
    last = torch.tensor([min(limit, best.shape[1]) - 1 for limit in limits], device=weights.device)[:, None]
    among = weights * ((weights >= best.gather(1, last)) | ~is_limited)
    mass = best.double().cumsum(-1).gather(1, last)
    return among, torch.where(is_limited, mass, weights.sum(-1, keepdim=True, dtype=torch.float64))


def try_draw(odds: Odds, rows: Sequence[Row]) -> tuple[Any, Any]:
    """(a token id for each row, whether its filters keep it), both [rows]."""
    size = odds.among.shape[1]
    uniform = torch.cat([torch.rand(1, generator=row.generator, dtype=torch.float64) for row in rows])
    goal = uniform.to(odds.sums.device)[:, None] * odds.sums[:, -1:]
    drawn = torch.searchsorted(odds.sums, goal, right=True).clamp(max=size - 1)
    if all(row.sampling.top_p >= 1.0 and row.sampling.top_k is None for row in rows):
        return drawn[:, 0], torch.ones(len(rows), dtype=torch.bool)
    weight = odds.among.gather(1, drawn)
    is_lower = torch.arange(size, device=drawn.device)[None, :] < drawn
    is_ahead = (odds.among > weight) | ((odds.among == weight) & is_lower)
    ahead = (odds.among * is_ahead).sum(-1, keepdim=True, dtype=torch.float64)
    is_kept = ahead < column([row.sampling.top_p for row in rows], ahead.device) * odds.mass
    is_kept &= is_ahead.sum(-1, keepdim=True) < column([row.sampling.top_k or size for row in rows], ahead.device)
    return drawn[:, 0], (is_kept | ~odds.mass.isfinite())[:, 0]


def draw_sorted(weights: Any, rows: Sequence[Row]) -> Any:
    """One token id a row, [rows], by sorting the vocabulary: as sure as it is slow."""
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    shares = ordered.double() / ordered.sum(-1, keepdim=True, dtype=torch.float64)
    shares = shares * keep_likeliest(shares, rows)
    sums = shares.cumsum(dim=-1)
    uniform = torch.cat([torch.rand(1, generator=row.generator, dtype=torch.float64) for row in rows])
    place = (sums <= uniform.to(weights.device)[:, None] * sums[:, -1:]).sum(dim=-1, keepdim=True)
    return order.gather(1, place.clamp(max=order.shape[1] - 1))[:, 0]


def keep_likeliest(shares: Any, rows: Sequence[Row]) -> Any:
    """True where top_k, top_p and min_p all keep the token. `shares` [rows, vocabulary] falls along a row."""
    size = shares.shape[1]
    top_k = column([row.sampling.top_k or size for row in rows], shares.device)
    top_p = column([row.sampling.top_p for row in rows], shares.device)
    min_p = column([row.sampling.min_p or 0.0 for row in rows], shares.device)
    is_kept = torch.arange(size, device=shares.device)[None, :] < top_k
    among_k = shares * is_kept
    before = among_k.cumsum(dim=-1) - among_k
    is_kept &= before < top_p * among_k.sum(dim=-1, keepdim=True)
    return is_kept & (shares >= min_p * shares[:, :1])


def column(values: list[Any], device: Any) -> Any:
    return torch.tensor(values, dtype=torch.float64, device=device)[:, None]


def list_logprobs(logits: Any, rows: Sequence[Row]) -> dict[int, Any]:
    """Index of each row that asked -> its natural-log distribution, before penalties, temperature and filters."""
    wanted = [index for index, row in enumerate(rows) if row.sampling.logprobs is not None]
    return {index: torch.log_softmax(logits[index], dim=-1) for index in wanted}


def make_logprob(token_id: int, table: Any, num_top: int) -> TokenLogprob:
    top = table.topk(min(num_top, table.shape[0]))
    pairs = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    return TokenLogprob(token_id, float(table[token_id]), pairs)


# ---- the end ---------------------------------------------------------------------------------------------------------


def end_if_last(row: Row, decode: Decode) -> None:
    """Sets `finish_reason` and `text` when the row's newest token is its last one."""
    if row.out[-1] in row.end_ids:
        reason = "stop"
    elif meets_stop(row, decode) or len(row.out) >= row.max_tokens:
        reason = "length"  # unless the whole text, looked at below, holds a stop string
    else:
        return
    text = decode(row.kept)
    end = find_stop(text, row.sampling.stop)
    row.text = text if end is None else text[:end]
    row.finish_reason = reason if end is None else "stop"


def meets_stop(row: Row, decode: Decode) -> bool:
    """Whether a stop string was completed. Looks at the last tokens first, so that a long answer costs no more a token
    than a short one; what seems to be there is looked for in the whole text, because a cut may fall inside a
    character."""
    stop = row.sampling.stop
    if not stop:
        return False
    num_bytes = max(len(text.encode()) for text in stop) + 4  # 4 more cover a character cut at the front
    return find_stop(decode_tail(row.out, num_bytes, decode), stop) is not None and (
        find_stop(decode(row.out), stop) is not None
    )


def find_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the first stop string begins."""
    places = [text.find(each) for each in stop if each]
    return min((place for place in places if place >= 0), default=None)
