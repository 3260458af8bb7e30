"""The model card's rows on the embedded model: quantize it, put the same questions to both, compare. `make card`.

The embedded model is what `jobs/train_demo_model.py` made; training it anew takes a quarter of an hour, and has a command
of its own. Everything is resumable: a second run goes on, or finds all done.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from batchgen.demo import write_questions
from batchgen.evaluate.spec import EvaluateSpec
from batchgen.evaluate.spec_load import with_absolute
from batchgen.quantize.job import quantize
from batchgen.quantize.spec import QuantizeSpec
from batchgen.specs.load import make_section

NUM_QUESTIONS = 500
# As the card samples; and greedy, where each question is asked once and McNemar's test is exact.
KINDS: dict[str, dict[str, Any]] = {
    "chat": {"n": 4, "seed": 1},
    "thinking": {"n": 4, "seed": 1, "thinking": True},
    "thinking-greedy": {"n": 1, "temperature": 0.0, "thinking": True},
}
FORMS = ("bf16", "w4a16", "w4a4")


def quantize_embedded(folder: Path, say: Callable[[str], None]) -> str:
    """Folder of the NVFP4 checkpoint."""
    write_questions(folder / "prompts")
    values = {
        "input": {"paths": str(folder / "prompts")},
        "prompt": {"column": "question"},
        "output": {"path": str(folder / "nvfp4")},
        "work_dir": str(folder / "work"),
    }
    quantize(make_section(QuantizeSpec, values, source="card_demo"), say)
    return str(folder / "nvfp4")


def list_specs(folder: Path, checkpoint: str, num_questions: int) -> Iterator[EvaluateSpec]:
    """One for each kind of question and form of the model, at folder/form/kind."""
    for form in FORMS:
        for kind, sampling in KINDS.items():
            engine: dict[str, Any] = {"kind": "transformers", "device": "cpu", "dtype": "float32"}
            values = {
                "benchmark": "arithmetic",
                "num_questions": num_questions,
                "model": {"path": "embedded" if form == "bf16" else checkpoint},
                "engine": engine if form == "bf16" else {**engine, "nvfp4": form},
                "sampling": sampling,
                "output": {"path": str(folder / form / kind)},
                "cluster": {"pool": "inline"},
            }
            yield with_absolute(make_section(EvaluateSpec, values, source="card_demo"))
