"""The decode loop over the embedded model, without threads: neighbours change nothing, limits and penalties hold."""

import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from batchgen.engines import decode
from batchgen.engines.decode import ADMIT_EVERY_STEPS, MAX_SCORE_BYTES, DecodeBatch, probe
from batchgen.engines.hf_model import load_model
from batchgen.engines.hf_tokenizer import HFTokenizer
from batchgen.engines.sampling import Row, make_row
from batchgen.records import SamplingParams
from batchgen.spec import ModelSpec
from batchgen.specs.engine import TransformersEngineSpec

EOS = frozenset({1})


@pytest.fixture(scope="module")
def tokenizer() -> HFTokenizer:
    return HFTokenizer(ModelSpec())


@pytest.fixture(scope="module")
def model() -> Any:
    torch.set_num_threads(1)
    return load_model(ModelSpec(), TransformersEngineSpec(kind="transformers"))


def run(batch: DecodeBatch, rows: Sequence[Row]) -> None:
    """Until every row has ended, with the engine's own order of prefills and steps."""
    waiting = deque(rows)
    while waiting or batch.rows:
        waiting.extendleft(batch.preempt())
        group = batch.pick(waiting)
        if group:
            batch.admit(group)
        else:
            batch.step()


def make_batch(
    model: Any, tokenizer: HFTokenizer, max_rows: int = 64, can_join: bool = True, max_cells: int = 1 << 30
) -> DecodeBatch:
    return DecodeBatch(model, tokenizer.decode, max_rows=max_rows, max_cells=max_cells, can_join=can_join)


def one(model: Any, tokenizer: HFTokenizer, text: str = "What is 17 + 25?", **sampling: Any) -> Row:
    """The row of one question, decoded alone."""
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 60, **sampling})
    ids = tokenizer.encode_chat([{"role": "user", "content": text}], thinking=params.thinking)
    row = make_row(tuple(ids), params, params.max_tokens, EOS)
    run(make_batch(model, tokenizer), [row])
    return row


def wild_rows(count: int) -> list[Row]:
    """Prompts of noise at a high temperature: lengths from 1 to 200 tokens in, 1 to 80 out, no two alike."""
    rng = random.Random(5)
    rows = []
    for seed in range(count):
        ids = tuple(rng.randrange(7, 294) for _ in range(rng.randint(1, 200)))
        params = SamplingParams(
            temperature=rng.choice([0.0, 1.0, 1.5]),
            top_p=rng.choice([0.5, 0.95, 1.0]),
            top_k=rng.choice([None, 40]),
            repetition_penalty=rng.choice([None, 1.3]),
            logprobs=rng.choice([None, 2]),
            seed=seed,
        )
        rows.append(make_row(ids, params, rng.randint(1, 80), EOS))
    return rows


# ---- neighbours ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("max_rows", "can_join"), [(8, True), (64, True), (64, False)])
def test_a_row_says_the_same_alone_and_in_any_company(
    model: Any, tokenizer: HFTokenizer, max_rows: int, can_join: bool
) -> None:
    alone, together = wild_rows(40), wild_rows(40)
    run(make_batch(model, tokenizer, max_rows=1), alone)
    run(make_batch(model, tokenizer, max_rows, can_join), together)
    assert [(row.out, row.text, row.finish_reason) for row in alone] == [
        (row.out, row.text, row.finish_reason) for row in together
    ]


def test_rows_that_join_a_running_batch_do_not_widen_it_for_ever(model: Any, tokenizer: HFTokenizer) -> None:
    batch = make_batch(model, tokenizer, max_rows=4)
    rows = [make_row((0, 3, 25, 4, 6), SamplingParams(seed=seed), 5 + seed % 7, frozenset()) for seed in range(60)]
    waiting, widest = deque(rows), 0
    while waiting or batch.rows:
        waiting.extendleft(batch.preempt())
        group = batch.pick(waiting)
        _ = batch.admit(group) if group else batch.step()
        widest = max(widest, 0 if batch._mask is None else batch._mask.shape[1])
    assert widest <= 5 + 11
    assert [len(row.out) for row in rows] == [5 + seed % 7 for seed in range(60)]
    assert batch.num_tokens == sum(len(row.out) for row in rows)


def test_a_sliding_window_model_takes_rows_only_between_batches(tokenizer: HFTokenizer) -> None:
    torch.manual_seed(0)
    from transformers import Gemma2Config, Gemma2ForCausalLM  # two seconds, for this test alone

    config = Gemma2Config(
        vocab_size=304,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=8,
    )
    sliding = Gemma2ForCausalLM(config).eval()
    assert not probe(sliding)[0]
    alone, together = wild_rows(6), wild_rows(6)
    run(make_batch(sliding, tokenizer, 1, can_join=False), alone)
    run(make_batch(sliding, tokenizer, 4, can_join=False), together)
    assert [row.out for row in alone] == [row.out for row in together]


def test_the_embedded_model_lets_rows_join(model: Any) -> None:
    assert probe(model)


def test_numbers_that_are_none_fail_their_row_alone(model: Any, tokenizer: HFTokenizer) -> None:
    """A stand-in for the model turns the logits of every prompt that holds token 300 into NaN."""
    bad, good = make_row((300,), SamplingParams(seed=1), 5, EOS), make_row((7, 8), SamplingParams(seed=1), 5, EOS)
    expected = make_row((7, 8), SamplingParams(seed=1), 5, EOS)

    def forward(input_ids: Any, **rest: Any) -> Any:
        answer = model(input_ids=input_ids, **rest)
        answer.logits[(input_ids == 300).any(-1)] = math.nan
        return answer

    poisoned: Any = Poisoned(forward, model.device, model.config)
    run(make_batch(poisoned, tokenizer), [bad, good])
    run(make_batch(model, tokenizer), [expected])
    assert (bad.finish_reason, bad.out) == ("failed", [])
    assert good.out == expected.out


class Poisoned(SimpleNamespace):
    def __init__(self, forward: Callable[..., Any], device: Any, config: Any) -> None:
        super().__init__(forward=forward, device=device, config=config)

    def __call__(self, **given: Any) -> Any:
        return self.forward(**given)


# ---- admission -------------------------------------------------------------------------------------------------------


def test_newcomers_wait_a_few_steps_when_few_slots_are_free(model: Any, tokenizer: HFTokenizer) -> None:
    batch = make_batch(model, tokenizer, max_rows=8)
    batch.admit([make_row((7, 8), SamplingParams(), 50, frozenset()) for _ in range(7)])
    waiting = deque([make_row((7, 8), SamplingParams(), 50, frozenset())])
    for _ in range(ADMIT_EVERY_STEPS):
        assert batch.pick(waiting) == []
        batch.step()
    assert len(batch.pick(waiting)) == 1


def test_one_prefill_takes_no_more_than_its_scores_allow(model: Any, tokenizer: HFTokenizer) -> None:
    long = tuple([7] * 1000)
    waiting = deque(make_row(long, SamplingParams(), 1, EOS) for _ in range(40))
    num_heads = max(model.config.num_attention_heads, model.config.index_n_heads)
    assert len(make_batch(model, tokenizer).pick(waiting)) == MAX_SCORE_BYTES // (4 * num_heads) // 1000**2
    giant = deque([make_row(tuple([7] * 10_000), SamplingParams(), 1, EOS)])
    assert len(make_batch(model, tokenizer).pick(giant)) == 1


def test_a_prompt_whose_scores_are_too_many_is_prefilled_in_parts(
    model: Any, tokenizer: HFTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside shorter ones, which are nothing but padding in the first parts."""
    whole, parts = wild_rows(12), wild_rows(12)
    for row in (whole[3], parts[3]):
        row.token_ids = row.token_ids[:1] + row.token_ids[1:] * 12
    run(make_batch(model, tokenizer), whole)
    monkeypatch.setattr(decode, "MIN_PREFILL_TOKENS", 1)
    batch = make_batch(model, tokenizer)
    widths: list[int] = []
    width = max(len(row.token_ids) for row in parts)
    batch._max_scores = len(parts) * width * 16
    real = decode.forward

    def forward(model: Any, ids: Any, mask: Any, cache: Any) -> Any:
        widths.append(ids.shape[1])
        return real(model, ids, mask, cache)

    monkeypatch.setattr(decode, "forward", forward)
    batch.admit(parts)
    assert max(widths) == 16
    assert sum(widths) == width
    run(batch, [])
    assert [row.out for row in parts] == [row.out for row in whole]


def test_the_cancelled_are_neither_taken_in_nor_kept(model: Any, tokenizer: HFTokenizer) -> None:
    batch = make_batch(model, tokenizer)
    rows = [make_row((7, 8), SamplingParams(), 50, frozenset()) for _ in range(3)]
    rows[0].is_cancelled = True
    batch.admit(batch.pick(deque(rows)))
    assert batch.rows == rows[1:]
    rows[1].is_cancelled = True
    assert batch.step() == [rows[1]]
    assert batch.rows == rows[2:]


# ---- what a request asks ---------------------------------------------------------------------------------------------


def test_eos_ends_a_row_and_is_not_kept(model: Any, tokenizer: HFTokenizer) -> None:
    row = one(model, tokenizer)
    assert (row.text, row.finish_reason) == ("42", "stop")
    assert row.out == [*row.kept, 1]


def test_max_tokens_ends_a_row(model: Any, tokenizer: HFTokenizer) -> None:
    row = one(model, tokenizer, max_tokens=1)
    assert (row.text, row.finish_reason, len(row.out)) == ("4", "length", 1)


def test_a_stop_token_ends_a_row_and_is_not_kept(model: Any, tokenizer: HFTokenizer) -> None:
    full = one(model, tokenizer)
    row = one(model, tokenizer, stop_token_ids=(full.out[1],))
    assert (row.text, row.finish_reason, len(row.out)) == ("4", "stop", 2)


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        (("25",), "17+"),
        (("=4",), "17+25"),
        (("never", "</think>"), "17+25=42"),
        (("5=42", "+2"), "17"),
        (("", "=42"), "17+25"),
        (("never",), "17+25=42</think>42"),
    ],
)
def test_a_stop_string_ends_a_row_and_is_not_in_its_text(
    model: Any, tokenizer: HFTokenizer, stop: tuple[str, ...], text: str
) -> None:
    row = one(model, tokenizer, thinking=True, stop=stop)
    assert (row.text, row.finish_reason) == (text, "stop")


def test_a_stop_string_at_the_last_token_still_counts(model: Any, tokenizer: HFTokenizer) -> None:
    row = one(model, tokenizer, stop=("2",), max_tokens=2)
    assert (row.text, row.finish_reason) == ("4", "stop")


def test_a_stop_string_of_several_bytes_a_character(tokenizer: HFTokenizer) -> None:
    """The answer is spelled by a stand-in for the model, one byte-level token after the other."""
    spelled = tokenizer.encode("ab漢字🙂cd")[1:]
    script = Scripted(spelled)
    row = make_row((7,), SamplingParams(temperature=0.0, stop=("字🙂",)), 50, EOS)
    run(DecodeBatch(script, tokenizer.decode, max_rows=1, max_cells=1 << 20, can_join=False), [row])
    assert (row.text, row.finish_reason) == ("ab漢", "stop")
    assert row.out == spelled[: len(row.out)]
    assert len(row.out) < len(spelled)


class Scripted:
    """Says what it is told, whatever it is asked."""

    device = torch.device("cpu")
    config = SimpleNamespace(get_text_config=SimpleNamespace)

    def __init__(self, token_ids: list[int]) -> None:
        self._left = list(token_ids)

    def __call__(self, **_: Any) -> Any:
        logits = torch.zeros(1, 1, 304)
        logits[0, 0, self._left.pop(0)] = 10.0
        return SimpleNamespace(logits=logits, past_key_values=None)


def test_logprobs_are_those_of_the_models_own_distribution(model: Any, tokenizer: HFTokenizer) -> None:
    row = one(model, tokenizer, logprobs=20, temperature=2.0, top_k=3, repetition_penalty=1.5, seed=3)
    assert [each.token_id for each in row.logprobs] == row.kept
    for each in row.logprobs:
        values = [value for _, value in each.top]
        assert len(values) == 20
        assert values == sorted(values, reverse=True)
        assert 0.0 < sum(math.exp(value) for value in values) <= 1.0 + 1e-5
        assert each.logprob <= values[0] + 1e-6
    first = one(model, tokenizer, logprobs=20).logprobs[0]
    assert sum(math.exp(value) for _, value in first.top) == pytest.approx(1.0, abs=1e-3)
    assert first.top[0] == (first.token_id, first.logprob)


def test_logprobs_zero_gives_the_chosen_alone(model: Any, tokenizer: HFTokenizer) -> None:
    row = one(model, tokenizer, logprobs=0)
    assert [each.top for each in row.logprobs] == [(), ()]
    assert one(model, tokenizer).logprobs == []


def test_penalties_change_what_is_said(model: Any, tokenizer: HFTokenizer) -> None:
    def babble(**penalty: float) -> list[int]:
        row = make_row((22, 23), SamplingParams(temperature=0.0, **penalty), 60, frozenset())
        run(make_batch(model, tokenizer), [row])
        return row.out

    plain = babble()
    assert babble(repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0) == plain
    for penalty in ({"repetition_penalty": 1.8}, {"presence_penalty": 2.0}, {"frequency_penalty": 2.0}):
        assert len(set(babble(**penalty))) > len(set(plain))


def test_without_a_seed_two_runs_differ_and_with_one_they_do_not(model: Any, tokenizer: HFTokenizer) -> None:
    def say(seed: int | None) -> list[int]:
        row = make_row((9, 10), SamplingParams(temperature=3.0, top_p=1.0, seed=seed), 40, frozenset())
        run(make_batch(model, tokenizer), [row])
        return row.out

    assert say(None) != say(None)
    assert say(11) == say(11) != say(12)
    assert len(say(2**63 - 1)) == 40


def test_a_stop_string_across_tokens_that_show_as_nothing(tokenizer: HFTokenizer) -> None:
    hidden = tokenizer.encode("<｜User｜>")[1:]
    script = Scripted([*tokenizer.encode("xa")[1:], *hidden * 40, *tokenizer.encode("bcd")[1:]])
    row = make_row((7,), SamplingParams(temperature=0.0, stop=("ab",)), 90, EOS)
    run(DecodeBatch(script, tokenizer.decode, max_rows=1, max_cells=1 << 20, can_join=False), [row])
    assert (row.text, row.finish_reason) == ("x", "stop")


@pytest.mark.parametrize("can_join", [True, False])
def test_a_tight_cache_preempts_and_changes_nothing(model: Any, tokenizer: HFTokenizer, can_join: bool) -> None:
    """Rows that leave for want of room come back with their tokens, their draws and their penalties."""
    free, tight = wild_rows(24), wild_rows(24)
    for row in (*free, *tight):
        row.token_ids, row.max_tokens, row.end_ids = row.token_ids[:20], row.max_tokens + 60, frozenset()
    run(make_batch(model, tokenizer, max_rows=24), free)
    max_cells = 3 * max(len(row.token_ids) + row.max_tokens for row in tight)
    batch = make_batch(model, tokenizer, max_rows=24, max_cells=max_cells, can_join=can_join)
    waiting, widest = deque(tight), 0
    while waiting or batch.rows:
        waiting.extendleft(batch.preempt())
        group = batch.pick(waiting)
        _ = batch.admit(group) if group else batch.step()
        widest = max(widest, count_cells(batch))
    assert [row.out for row in tight] == [row.out for row in free]
    assert [row.text for row in tight] == [row.text for row in free]
    assert widest <= max_cells
    assert batch.num_preempted > 0


def count_cells(batch: DecodeBatch) -> int:
    return 0 if batch._mask is None else int(batch._mask.numel())


def test_one_row_alone_is_never_preempted(model: Any, tokenizer: HFTokenizer) -> None:
    (row,) = wild_rows(1)
    batch = make_batch(model, tokenizer, max_cells=len(row.token_ids) + row.max_tokens)
    run(batch, [row])
    assert row.is_done
    assert batch.num_preempted == 0
