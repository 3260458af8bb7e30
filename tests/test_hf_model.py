"""Models and devices that can't be had are refused by the field to change, before anything is generated."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from batchgen.engines.hf_tokenizer import resolve_model
from batchgen.engines.transformers import TransformersEngine, make_batch
from batchgen.errors import SpecError
from batchgen.spec import ModelSpec
from batchgen.specs.engine import TransformersEngineSpec


def open_engine(model: ModelSpec, **changes: Any) -> None:
    asyncio.run(TransformersEngine(model, TransformersEngineSpec(kind="transformers", **changes)).open())


@pytest.mark.parametrize(
    ("model", "changes", "field"),
    [
        (ModelSpec(path="/no/such/folder"), {}, r"model\.path"),
        (ModelSpec(max_model_len=2000), {}, r"model\.max_model_len: 2000 is more than the 1024"),
        (ModelSpec(), {"device": "nonsense"}, r"engine\.device"),
        (ModelSpec(), {"device": "cuda:99"}, r"engine\.device"),
    ],
)
def test_what_cannot_be_had_is_refused_by_field(model: ModelSpec, changes: dict[str, Any], field: str) -> None:
    with pytest.raises(SpecError, match=field):
        open_engine(model, **changes)


@pytest.mark.parametrize("weights", [b"", b"\x08\x00\x00\x00\x00\x00\x00\x00nonsense", None])
def test_weights_that_are_damaged_or_missing_are_refused(tmp_path: Path, weights: bytes | None) -> None:
    for file in Path(resolve_model(ModelSpec())).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").unlink()
    if weights is not None:
        (tmp_path / "model.safetensors").write_bytes(weights)
    with pytest.raises(SpecError, match=r"model\.path: can't load the weights"):
        open_engine(ModelSpec(path=str(tmp_path)))


def test_a_model_without_an_attention_cache_is_refused() -> None:
    def state_space(**_: Any) -> Any:
        return SimpleNamespace(logits=torch.zeros(2, 1, 9), past_key_values=None)

    state_space.device = torch.device("cpu")  # type: ignore[attr-defined]
    spec = TransformersEngineSpec(kind="transformers")
    with pytest.raises(SpecError, match="choose a model with an attention cache"):
        make_batch(ModelSpec(), spec, state_space, lambda _: "")


def test_without_torch_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(SpecError, match=r"pip install 'batchgen\[local\]'"):
        open_engine(ModelSpec())
