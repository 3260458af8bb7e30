"""Writing a trained model as a Hugging Face folder that other versions of transformers, too, can read."""

import json
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

# Made once and kept: mended by hand so that transformers 4.57 loads it, see the tests of hf_tokenizer.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def save_model(model: Any, folder: Path) -> None:
    """Weights in bfloat16, which `model` is cast to, beside the embedded model's tokenizer."""
    import torch

    model.to(torch.bfloat16).save_pretrained(folder)
    write_portable_config(folder / "config.json")
    for name in TOKENIZER_FILES:
        source = Path(str(files("batchgen") / "embedded" / name))
        if source.parent.resolve() != folder.resolve():
            shutil.copyfile(source, folder / name)


def write_portable_config(path: Path) -> None:
    """transformers 5.23 writes `layer_types` with a word that 5.14 refuses; every version rebuilds it when absent."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("layer_types", None)
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
