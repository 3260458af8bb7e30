"""A tokenizer without a model: one token for each byte. What the simulated engine has."""

import json
from collections.abc import Sequence
from typing import Any

from batchgen.worker.answer import Parsed, split_reasoning


class ByteTokenizer:
    """One token a UTF-8 byte. Enough for lengths, budgets and templates."""

    vocab_size = 256
    think_end: str | None = "</think>"
    can_use_tools = True

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_chat(
        self, messages: Sequence[dict[str, Any]], *, thinking: bool, tools: Sequence[dict[str, Any]] | None = None
    ) -> list[int]:
        return self.encode(self.render_chat(messages, thinking=thinking, tools=tools))

    def render_chat(
        self, messages: Sequence[dict[str, Any]], *, thinking: bool, tools: Sequence[dict[str, Any]] | None = None
    ) -> str:
        turns = [f"<tools>{json.dumps(tools)}"] if tools else []
        turns += [f"<{message['role']}>{message.get('content') or ''}" for message in messages]
        return "\n".join([*turns, "<assistant>" + ("<think>" if thinking else "")])

    def parse(self, text: str, *, thinking: bool, has_tools: bool = False) -> Parsed:  # noqa: ARG002 - protocol
        return Parsed(*split_reasoning(text, thinking=thinking, think_end=self.think_end))

    def decode(self, token_ids: Sequence[int]) -> str:
        return bytes(token_ids).decode(errors="replace")
