"""The embedded model does its sums; its questions repeat, are right and split cleanly; its training trains."""

import json
import math
import random
import re
import subprocess
import sys
from importlib.resources import files
from itertools import islice
from pathlib import Path

import pytest

from batchgen.demo import make_questions
from batchgen.demo_questions import CHAT_MIX, THINKING_MIX, Question, is_held_out, make_question, name_step
from batchgen.training.accuracy import Examinee, is_right, list_questions, measure
from batchgen.training.recipe import CONTEXT, Recipe
from batchgen.training.rows import RowMaker, cut, make_batches
from batchgen.training.train import train

EMBEDDED = Path(str(files("batchgen") / "embedded"))
SCRIPT = Path(__file__).parent.parent / "jobs" / "train_demo_model.py"
STEP = re.compile(r"(?=(?:^|=)(\d+)([+-])(\d+)=(\d+))")


def draw(num: int, mix: dict[str, float], *, held_out: bool | None, seed: int = 3) -> list[Question]:
    rng = random.Random(seed)
    return [make_question(rng, mix, held_out=held_out) for _ in range(num)]


# ---- the model -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def examinee() -> Examinee:
    return Examinee(EMBEDDED)


def test_it_answers_held_out_sums_at_once(examinee: Examinee) -> None:
    replies = examinee.ask(list_questions(400, thinking=False, held_out=True), thinking=False, temperature=0.0)
    assert (measure(replies).share or 0) >= 0.98, [reply for reply in replies if not reply.is_right]
    assert max(reply.num_tokens for reply in replies) <= 4


def test_it_thinks_held_out_questions_through_however_long(examinee: Examinee) -> None:
    replies = examinee.ask(list_questions(200, thinking=True, held_out=True), thinking=True, temperature=0.0)
    assert (measure(replies).share or 0) >= 0.98, [reply for reply in replies if not reply.is_right]
    lengths = sorted(reply.num_tokens for reply in replies)
    assert lengths[0] < 12
    assert max(reply.num_tokens for reply in replies if reply.is_right) >= 300
    assert lengths[len(lengths) // 2] * 5 < lengths[-1], "the tail is what this model is for"


def test_its_files_are_small_and_portable() -> None:
    assert sum(file.stat().st_size for file in EMBEDDED.iterdir()) < 1_000_000
    config = json.loads((EMBEDDED / "config.json").read_text(encoding="utf-8"))
    assert (config["architectures"], config["dtype"]) == (["DeepseekV32ForCausalLM"], "bfloat16")
    assert "layer_types" not in config
    assert config["index_topk"] >= config["max_position_embeddings"] == CONTEXT
    tokenizer = json.loads((EMBEDDED / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.parametrize(
    ("text", "thinking", "right"),
    [
        ("42", False, True),
        ("17+25=42</think>42", True, True),
        ("17+25=42</think>43", True, False),
        ("42", True, False),
        ("</think>42", False, False),
        ("1</think>2</think>42", True, False),
        ("", False, False),
    ],
)
def test_only_the_answer_after_one_closed_thinking_counts(text: str, thinking: bool, right: bool) -> None:
    assert is_right(Question("sum", "25+17", "17 + 25 = ?", "17+25=42", "42"), text, thinking) is right


# ---- the questions ---------------------------------------------------------------------------------------------------


def test_the_same_seed_asks_the_same() -> None:
    assert draw(300, THINKING_MIX, held_out=None) == draw(300, THINKING_MIX, held_out=None)
    assert draw(300, THINKING_MIX, held_out=None) != draw(300, THINKING_MIX, held_out=None, seed=4)
    assert make_questions(5, 50) == make_questions(5, 50)
    kinds = {question.kind for question in draw(300, THINKING_MIX, held_out=None)}
    assert kinds == set(THINKING_MIX) > set(CHAT_MIX)


def test_the_split_is_for_ever() -> None:
    """The weights that ship were trained on this very split: another hash would measure them on what they have seen."""
    held = [f"{a}+{b}" for a in range(100) for b in range(a + 1) if is_held_out(name_step(a, "+", b))]
    assert (len(held), held[:3]) == (344, ["3+3", "7+1", "8+0"])
    assert is_held_out(name_step(3, "+", 90)) == is_held_out(name_step(90, "+", 3))


@pytest.mark.parametrize("held_out", [True, False])
def test_every_working_is_right(held_out: bool) -> None:
    for question in draw(3000, THINKING_MIX, held_out=held_out):
        steps = STEP.findall(question.working)
        assert all(int(c) == (int(a) + int(b) if sign == "+" else int(a) - int(b)) for a, sign, b, c in steps)
        if question.kind in {"sum", "difference", "chain"}:
            assert len(steps) == len(re.findall("[+-]", question.working))
        if question.kind == "product":
            a, b = map(int, question.key.split("*"))
            assert question.working.split() == [f"{b - n}:{a * (n + 1)}" for n in range(b)]
        if question.kind == "gcd":
            pairs = [tuple(map(int, pair.split())) for pair in question.working.split("; ")]
            assert {math.gcd(*pair) for pair in pairs} == {int(question.answer)}
            assert pairs[-1][0] == pairs[-1][1]
        assert re.search(r"\d+$", question.working)[0] == question.answer  # type: ignore[index]


def test_nothing_held_out_is_trained_on_not_even_as_a_step() -> None:
    for question in [*draw(3000, THINKING_MIX, held_out=False), *draw(2000, CHAT_MIX, held_out=False)]:
        assert not is_held_out(question.key)
        steps = STEP.findall(question.working)
        assert not any(is_held_out(name_step(int(a), sign, int(b))) for a, sign, b, _ in steps)


def test_lengths_have_a_long_tail_that_fits_the_model() -> None:
    rows = RowMaker().make_rows(draw(5000, THINKING_MIX, held_out=None), thinking=True)
    assert max(row.num_tokens for row in rows) <= CONTEXT
    lengths = sorted(len(row.completion) for row in rows)
    median, high, longest = lengths[2500], lengths[4950], lengths[-1]
    assert lengths[0] <= 10
    assert 20 <= median <= 60
    assert high >= 5 * median
    assert longest >= 500


# ---- the training ----------------------------------------------------------------------------------------------------


def test_batches_hold_each_row_once_and_little_padding() -> None:
    recipe = Recipe(max_batch_tokens=700, max_batch_rows=8)
    rows = RowMaker().make_rows(draw(200, THINKING_MIX, held_out=False), thinking=True)
    batches = list(cut(rows, recipe))
    assert sorted(map(id, rows)) == sorted(id(row) for batch in batches for row in batch)
    for batch in batches:
        padded = len(batch) * max(row.num_tokens for row in batch)
        assert len(batch) <= 8
        assert padded <= 700 or len(batch) == 1


def test_rows_are_what_the_engine_would_send() -> None:
    from batchgen.engines.hf_tokenizer import HFTokenizer
    from batchgen.spec import ModelSpec

    tokenizer = HFTokenizer(ModelSpec())
    batch = next(batch for batch in make_batches(Recipe(), random.Random(0)) if len(batch) > 1)
    for row in batch:
        text = tokenizer.decode(row.prompt).removesuffix("<think>").removesuffix("</think>")
        thinking = row.prompt[-1] == 5
        assert tokenizer.encode_chat([{"role": "user", "content": text}], thinking=thinking) == row.prompt
        assert row.completion[-1] == tokenizer.eos_id
    assert len(list(islice(make_batches(Recipe(), random.Random(0)), 20))) == 20


def test_training_lowers_the_loss_and_repeats() -> None:
    heard: list[list[tuple[int, float]]] = [[], []]
    for losses in heard:
        train(Recipe(num_steps=3, num_warmup_steps=1), lambda step, loss, losses=losses: losses.append((step, loss)))  # type: ignore[misc]
    assert heard[0] == heard[1]
    longer: list[float] = []
    train(Recipe(num_steps=80, num_warmup_steps=10), lambda _, loss: longer.append(loss))
    assert longer[-1] < 3.6 < heard[0][-1][1]


def test_the_script_writes_a_model_that_loads(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--steps", "2", "--questions", "0", "--out", str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["recipe"]["num_steps"] == 2
    names = {file.name for file in EMBEDDED.iterdir()} - {"MODEL_CARD.md"}
    assert {file.name for file in (tmp_path / "model").iterdir()} == names
    assert "layer_types" not in json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    Examinee(tmp_path / "model")
