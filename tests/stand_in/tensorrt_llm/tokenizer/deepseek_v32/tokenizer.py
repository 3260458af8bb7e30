"""The chat encoding of DeepSeek-V3.2, without tools, and a tokenizer with the real one's habits."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

USER, ASSISTANT, THINK, THINK_END = "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"


class DeepseekV32Tokenizer:
    """`encode` adds the beginning-of-text token by default, to a rendered chat as well, which has one."""

    def __init__(self, tokenizer: Tokenizer, options: dict[str, Any]) -> None:
        self.tokenizer = tokenizer
        self.bos_token, self.eos_token = options["bos_token"], options["eos_token"]
        self.bos_token_id = tokenizer.token_to_id(self.bos_token)
        self.eos_token_id = tokenizer.token_to_id(self.eos_token)
        self.pad_token_id = tokenizer.token_to_id(options.get("pad_token") or self.eos_token)

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo_id: str | Path,
        *_: Any,
        trust_remote_code: bool = False,
        revision: str | None = None,
        **__: Any,
    ) -> "DeepseekV32Tokenizer":
        del trust_remote_code, revision
        folder = Path(path_or_repo_id)
        if not (folder / "tokenizer.json").is_file():
            raise OSError(f"{path_or_repo_id} is not a local folder and is not a valid model identifier")
        options = json.loads((folder / "tokenizer_config.json").read_text())
        return cls(Tokenizer.from_file(str(folder / "tokenizer.json")), options)

    def __len__(self) -> int:
        return self.tokenizer.get_vocab_size()

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.get_vocab_size()

    def encode(self, text: str, *_: Any, add_special_tokens: bool = True, **__: Any) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: list[int], *_: Any, skip_special_tokens: bool = False, **__: Any) -> str:
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def apply_chat_template(self, messages: list[dict[str, Any]], tools: Any = None, **kwargs: Any) -> str:
        """Text, whatever `tokenize` says; of all keyword arguments only `thinking` is looked at."""
        if tools:
            raise NotImplementedError("the stand-in renders no tools")
        thinking = bool(kwargs.get("thinking", False))
        text = self.bos_token
        last_user = max((at for at, message in enumerate(messages) if message["role"] == "user"), default=-1)
        for at, message in enumerate(messages):
            text += self._render(message, is_thinking=thinking and at >= last_user)
        return text

    def _render(self, message: dict[str, Any], *, is_thinking: bool) -> str:
        role, content = message["role"], message.get("content") or ""
        if role == "system":
            return content
        if role in ("user", "developer"):
            return f"{USER}{content}{ASSISTANT}{THINK if is_thinking else THINK_END}"
        if role == "assistant":
            reasoning = message.get("reasoning_content") or message.get("reasoning")
            assert not is_thinking or reasoning, "an assistant's message after the last user's needs reasoning_content"
            return (f"{reasoning}{THINK_END}" if is_thinking else "") + content + self.eos_token
        raise NotImplementedError(f"Unknown role: {role}")
