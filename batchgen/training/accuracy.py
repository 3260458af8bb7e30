"""How many questions a model answers right, by kind, asked through the decode loop that the engine uses."""

import random
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from batchgen.demo_questions import CHAT_MIX, THINKING_MIX, Question, make_question
from batchgen.records import SamplingParams
from batchgen.spec import ModelSpec
from batchgen.specs.engine import TransformersEngineSpec

THINK_END = "</think>"
ON_CPU = TransformersEngineSpec(kind="transformers", device="cpu", dtype="float32")


@dataclass(frozen=True, slots=True)
class Reply:
    """`text` as the model wrote it, its thinking included; `num_tokens` counts all of it, end-of-text included."""

    question: Question
    text: str
    num_tokens: int
    is_right: bool


@dataclass(slots=True)
class Score:
    num_right: int = 0
    num_asked: int = 0


@dataclass(slots=True)
class Accuracy:
    """Of one mode at one temperature; `kinds` by question kind."""

    kinds: dict[str, Score] = field(default_factory=lambda: defaultdict(Score))

    @property
    def share(self) -> float | None:
        """Right answers among all; None when nothing was asked."""
        num_asked = sum(score.num_asked for score in self.kinds.values())
        return sum(score.num_right for score in self.kinds.values()) / num_asked if num_asked else None

    def as_json(self) -> dict[str, float | str | None]:
        return {"right": self.share, **{kind: f"{s.num_right}/{s.num_asked}" for kind, s in self.kinds.items()}}


def list_questions(num: int, *, thinking: bool, held_out: bool | None, seed: int = 1) -> list[Question]:
    """`num` different questions in the mode's mix of kinds."""
    rng = random.Random(seed)
    found: dict[str, Question] = {}
    while len(found) < num:
        question = make_question(rng, THINKING_MIX if thinking else CHAT_MIX, held_out=held_out)
        found.setdefault(question.text, question)
    return list(found.values())


def measure(replies: Sequence[Reply]) -> Accuracy:
    accuracy = Accuracy()
    for reply in replies:
        accuracy.kinds[reply.question.kind].num_asked += 1
        accuracy.kinds[reply.question.kind].num_right += reply.is_right
    return accuracy


class Examinee:
    """A model, on a CPU in float32 unless `engine` says otherwise. Raises SpecError for a folder that holds none. Sets
    torch's thread count to 1."""

    def __init__(self, folder: Path | str, engine: TransformersEngineSpec = ON_CPU) -> None:
        import torch

        from batchgen.engines.hf_model import find_max_model_len, load_model
        from batchgen.engines.hf_tokenizer import HFTokenizer

        torch.set_num_threads(1)
        spec = ModelSpec(path=str(folder))
        self._tokenizer = HFTokenizer(spec)
        self._model = load_model(spec, engine)
        self._max_model_len = find_max_model_len(spec, self._model.config)

    def ask(self, questions: Sequence[Question], *, thinking: bool, temperature: float) -> list[Reply]:
        """Replies in the order of the questions; each draws from a generator seeded with its number, top_p 0.95."""
        from batchgen.engines.decode import DecodeBatch

        rows = [self._make_row(question, number, thinking, temperature) for number, question in enumerate(questions)]
        batch = DecodeBatch(self._model, self._tokenizer.decode, max_rows=64, max_cells=1 << 22, can_join=True)
        waiting = deque(rows)
        while waiting or batch.rows:
            group = batch.pick(waiting)
            if group:
                batch.admit(group)
            else:
                batch.step()
        pairs = zip(questions, rows, strict=True)
        return [
            Reply(question, row.text, len(row.out), is_right(question, row.text, thinking)) for question, row in pairs
        ]

    def _make_row(self, question: Question, number: int, thinking: bool, temperature: float) -> Any:
        from batchgen.engines.sampling import make_row

        ids = self._tokenizer.encode_chat([{"role": "user", "content": question.text}], thinking=thinking)
        params = SamplingParams(temperature=temperature, top_p=0.95, seed=number, thinking=thinking)
        room = self._max_model_len - len(ids)
        return make_row(tuple(ids), params, room, frozenset([self._tokenizer.eos_id or 0]))


def is_right(question: Question, text: str, thinking: bool) -> bool:
    """The answer alone must be right, and there must be a closed thinking before it if and only if asked for."""
    thought, mark, answer = text.rpartition(THINK_END)
    return answer == question.answer and bool(mark) == thinking and THINK_END not in thought
