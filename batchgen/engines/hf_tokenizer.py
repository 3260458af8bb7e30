"""A Hugging Face tokenizer and its chat template behind the `Tokenizer` protocol.

One of the two places that import transformers (the other is the engine of that name), and only when a tokenizer is
made. Needs neither torch nor weights. Holds for transformers 4.57 and 5: the production image brings 4.57.

Invariants: a rendered chat is tokenised without adding special tokens, because the template has written them already;
the same ids come out whatever threads call; no error quotes the prompt. Text that spells a special token becomes that
token, as everywhere in Hugging Face.
"""

import json
import logging
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from batchgen.errors import BadRow, SpecError, StorageError
from batchgen.paths import expand_home
from batchgen.spec import ModelSpec
from batchgen.staging.staging import stage_tokenizer
from batchgen.worker.answer import Parsed, split_reasoning

THINK_MARKS = ("<think>", "</think>")
NAMES_TOOLS = re.compile(r"\btools\b")
ROLES = {"system", "developer", "user", "assistant", "tool"}
MEND = "give a local folder with a Hugging Face checkpoint, a hub id this machine can reach, or 'embedded'"


def resolve_model(model: ModelSpec) -> str:
    """Folder or hub id to load from. Raises SpecError for what looks like a folder and is none."""
    if model.path == "embedded":
        return str(files("batchgen") / "embedded")
    path = expand_home(model.path)
    if path.is_dir():
        return str(path)
    if path.is_absolute() or model.path.startswith((".", "~")) or model.path.count("/") > 1:
        raise SpecError(f"model.path: {model.path} is not a folder on this machine; {MEND}")
    return model.path


def unloadable(model: ModelSpec, what: str, error: Exception) -> SpecError:
    """The refusal for a model whose `what` can't be loaded; vendors put the reason in the first line."""
    reason = (str(error).strip().splitlines() or [""])[0][:300]
    return SpecError(f"model.path: can't load the {what} of {model.path} ({type(error).__name__}: {reason}); {MEND}")


class HFTokenizer:
    """The model's own tokenizer. Raises SpecError when it can't be loaded. Thread-safe: the Rust tokenizer raises
    'Already borrowed' when one thread sets its options while another encodes, hence the lock. `marks` are special tokens
    that decoding keeps."""

    marks: tuple[str, ...] = THINK_MARKS

    def __init__(self, model: ModelSpec) -> None:
        self._model = model
        self._lock = threading.Lock()
        self._vendor = load_vendor(model)
        self.vocab_size: int = len(self._vendor)
        mark_ids = {token: self._vendor.convert_tokens_to_ids(token) for token in self.marks}
        known = {token for token, id_ in mark_ids.items() if id_ not in (None, self._vendor.unk_token_id)}
        self.think_end: str | None = "</think>" if "</think>" in known else None
        self._hidden_ids = frozenset(self._vendor.all_special_ids) - {mark_ids[token] for token in known}

    @property
    def eos_id(self) -> int | None:
        """The end-of-text token, where the model has one."""
        eos_id: int | None = self._vendor.eos_token_id
        return eos_id

    @property
    def can_use_tools(self) -> bool:
        """Does the template show them? One that never names them would drop them silently."""
        template = self._vendor.chat_template
        texts = template.values() if isinstance(template, dict) else [template or ""]
        return any(NAMES_TOOLS.search(text) for text in texts)

    def encode(self, text: str) -> list[int]:
        return self._encode(text, add_special_tokens=True)

    def encode_chat(
        self, messages: Sequence[dict[str, Any]], *, thinking: bool, tools: Sequence[dict[str, Any]] | None = None
    ) -> list[int]:
        """As the protocol. Raises SpecError where the model has no chat template."""
        # The template wrote the beginning-of-text token; a second one measurably costs accuracy on DeepSeek models.
        return self._encode(self.render_chat(messages, thinking=thinking, tools=tools), add_special_tokens=False)

    def render_chat(
        self, messages: Sequence[dict[str, Any]], *, thinking: bool, tools: Sequence[dict[str, Any]] | None = None
    ) -> str:
        if not self._vendor.chat_template:
            raise SpecError(f"prompt.chat: {self._model.path} has no chat template; set prompt.chat: false")
        if not messages:
            raise BadRow("bad_messages", "the chat holds no message")
        try:
            # DeepSeek's templates read `thinking`, Qwen's `enable_thinking`; a template ignores what it does not know.
            text: str = self._vendor.apply_chat_template(
                list(messages),
                tools=list(tools) if tools else None,
                tokenize=False,
                add_generation_prompt=True,
                thinking=thinking,
                enable_thinking=thinking,
            )
        except TemplateSyntaxError as error:
            raise SpecError(
                f"model.path: the chat template of {self._model.path} is broken ({error.message}); mend the file"
            ) from error
        # A template is the vendor's program over the row's values: None or a number where it expects text, or a key
        # that is missing, surfaces as one of these.
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise BadRow("bad_messages", describe_refusal(messages, error)) from None
        return text

    def parse(self, text: str, *, thinking: bool, has_tools: bool = False) -> Parsed:  # noqa: ARG002 - protocol
        """Each model calls tools in a format of its own, which its template doesn't tell: calls stay in the text."""
        return Parsed(*split_reasoning(text, thinking=thinking, think_end=self.think_end))

    def decode(self, token_ids: Sequence[int]) -> str:
        ids = [token_id for token_id in token_ids if token_id not in self._hidden_ids]
        with self._lock:
            text: str = self._vendor.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        with self._lock:
            ids: list[int] = self._vendor.encode(text, add_special_tokens=add_special_tokens)
        return ids


def describe_refusal(messages: Sequence[dict[str, Any]], error: Exception) -> str:
    """Why the template refused, without its own words: they may quote the row."""
    roles = [message.get("role") if isinstance(message, dict) else None for message in messages[:20]]
    names = ", ".join(role if isinstance(role, str) and role in ROLES else "?" for role in roles)
    return f"the chat template refused the messages ({type(error).__name__}); their roles: {names}"


def load_vendor(model: ModelSpec) -> Any:
    """The transformers tokenizer of the model."""
    try:
        model = stage_tokenizer(model)
    except StorageError as error:
        raise unloadable(model, "tokenizer", error) from error
    source = resolve_model(model)
    with quiet_import():
        from transformers import AutoTokenizer
    try:
        check_json(Path(source) / "tokenizer.json")
        return AutoTokenizer.from_pretrained(source, revision=model.revision)
    # OSError: absent or unreachable; ValueError and KeyError: not a checkpoint; ImportError: its kind of tokenizer
    # needs a library that is not here.
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise unloadable(model, "tokenizer", error) from error


def check_json(path: Path) -> None:
    """A half-copied tokenizer.json raises ValueError here; the Rust reader would raise a bare Exception."""
    if path.is_file():
        json.loads(path.read_text(encoding="utf-8"))


@contextmanager
def quiet_import() -> Iterator[None]:
    """transformers warns at import that torch is missing: true, and no news where only the tokenizer is wanted."""
    logger = logging.getLogger("transformers")
    logger.addFilter(is_not_advice)
    try:
        yield
    finally:
        logger.removeFilter(is_not_advice)


def is_not_advice(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
