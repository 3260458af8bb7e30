"""Which tokenizer made a job's token ids: one digest of its files, where they can be read from here. No vendor."""

import hashlib
from importlib.resources import files
from pathlib import Path

from batchgen.paths import expand_home
from batchgen.spec import JobSpec

# Every name under which Hugging Face checkpoints keep what turns text into ids, the chat template included.
NAMES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


def digest_tokenizer(spec: JobSpec) -> str | None:
    """SHA-256 over names, sizes and contents of the tokenizer files at `model.path`. None where a server tokenises, and
    where the model is a hub id or lies on other machines only: unknown here."""
    if not spec.engine.has_tokenizer:
        return None
    folder = Path(str(files("batchgen") / "embedded")) if spec.model.path == "embedded" else Path(spec.model.path)
    found = [path for name in NAMES if (path := expand_home(folder) / name).is_file()]
    if not found:
        return None
    total = hashlib.sha256()
    for path in found:
        content = path.read_bytes()
        total.update(f"{path.name}\0{len(content)}\0".encode() + content)
    return total.hexdigest()
