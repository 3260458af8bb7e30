"""Training rows as token ids, endlessly: questions, their workings and answers, packed into batches of like length.

Needs the embedded model's tokenizer, not torch. Rows are made 2048 at a time, enough to find others of like length.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from batchgen.demo_questions import CHAT_MIX, THINKING_MIX, Question, make_question
from batchgen.spec import ModelSpec
from batchgen.training.recipe import Recipe

ROWS_AT_A_TIME = 2048
MARK = "\n"  # stands for the question in a rendered chat; no question and no part of the template around it holds one


@dataclass(frozen=True, slots=True)
class TrainingRow:
    """`prompt` is read, `completion` (with its end-of-text token) is learned."""

    prompt: list[int]
    completion: list[int]

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.completion)


class RowMaker:
    """Questions in, rows out, in the chat format that the embedded model's own template writes."""

    def __init__(self) -> None:
        from batchgen.engines.hf_tokenizer import HFTokenizer, load_vendor

        tokenizer = HFTokenizer(ModelSpec())
        self._vendor = load_vendor(ModelSpec())
        chat = [{"role": "user", "content": MARK}]
        self._frames = {thinking: tokenizer.render_chat(chat, thinking=thinking) for thinking in (False, True)}

    def make_rows(self, questions: Sequence[Question], *, thinking: bool) -> list[TrainingRow]:
        prompts = [self._frames[thinking].replace(MARK, question.text) for question in questions]
        completions = [write_completion(question, thinking=thinking) + self._vendor.eos_token for question in questions]
        pairs = zip(self._encode(prompts), self._encode(completions), strict=True)
        return [TrainingRow(prompt, completion) for prompt, completion in pairs]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self._vendor(texts, add_special_tokens=False)["input_ids"]
        return ids


def write_completion(question: Question, *, thinking: bool) -> str:
    """What the model should write, but for the end-of-text token."""
    return f"{question.working}</think>{question.answer}" if thinking else question.answer


def make_batches(recipe: Recipe, rng: random.Random) -> Iterator[list[TrainingRow]]:
    """Batches without end; each is of chats or of questions with thinking, never of both."""
    maker = RowMaker()
    sources = {thinking: make_batches_of(maker, recipe, rng, thinking=thinking) for thinking in (False, True)}
    while True:
        yield next(sources[rng.random() >= recipe.chat_share])


def make_batches_of(
    maker: RowMaker, recipe: Recipe, rng: random.Random, *, thinking: bool
) -> Iterator[list[TrainingRow]]:
    mix = THINKING_MIX if thinking else CHAT_MIX
    while True:
        questions = [make_question(rng, mix, held_out=False) for _ in range(ROWS_AT_A_TIME)]
        batches = list(cut(maker.make_rows(questions, thinking=thinking), recipe))
        rng.shuffle(batches)
        yield from batches


def cut(rows: list[TrainingRow], recipe: Recipe) -> Iterator[list[TrainingRow]]:
    """Each row once, with others of its length, so that little is spent on padding."""
    batch: list[TrainingRow] = []
    for row in sorted(rows, key=lambda row: row.num_tokens):
        is_over = row.num_tokens * (len(batch) + 1) > recipe.max_batch_tokens
        if batch and (is_over or len(batch) == recipe.max_batch_rows):
            yield batch
            batch = []
        batch.append(row)
    yield batch
