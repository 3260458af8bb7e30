"""DeepSeek-V3.2's tokenizer: the ids of its Hugging Face tokenizer, the text of `deepseek_v32`.

Its checkpoint has no chat template, so the text is made here. Invariants: a rendered chat begins with one
beginning-of-text token, for it is tokenised without adding another; the marks of reasoning and tool calls survive
decoding, or nothing could be parsed.
"""

from collections.abc import Sequence
from typing import Any

from batchgen.engines.deepseek_v32 import DSML, THINK_END, parse_answer, render_chat
from batchgen.engines.hf_tokenizer import THINK_MARKS, HFTokenizer
from batchgen.spec import ModelSpec
from batchgen.worker.answer import Parsed

# (messages, thinking) that show every kind of turn. No tool definitions: the vendors' copies of that text differ.
_SYSTEM = {"role": "system", "content": "Be brief."}
_QUESTION = {"role": "user", "content": "What is 17 + 25?"}
_ANSWER = {"role": "assistant", "reasoning_content": "17 + 25 = 42", "content": "42"}
_CALL = {
    "role": "assistant",
    "reasoning_content": "I look it up.",
    "content": "",
    "tool_calls": [
        {"id": "a", "type": "function", "function": {"name": "look_up", "arguments": '{"what": "42", "max": 3}'}},
        {"id": "b", "type": "function", "function": {"name": "look_up", "arguments": '{"what": "é", "deep": [1, {}]}'}},
    ],
}
_RESULTS = [{"role": "tool", "tool_call_id": id_, "content": f"found {id_}"} for id_ in ("a", "b")]
_CHATS: list[list[dict[str, Any]]] = [
    [_QUESTION],
    [_SYSTEM, _QUESTION],
    [_SYSTEM, _QUESTION, _ANSWER, {"role": "user", "content": "And 1 more?"}],
    [_QUESTION, _CALL, *_RESULTS],
    [_QUESTION, _CALL, *_RESULTS, _ANSWER, {"role": "developer", "content": "Again."}],
]


class DeepSeekTokenizer(HFTokenizer):
    """As the protocol. Raises SpecError when the tokenizer can't be loaded."""

    marks = (*THINK_MARKS, DSML)
    can_use_tools = True

    def __init__(self, model: ModelSpec) -> None:
        super().__init__(model)
        self.think_end = THINK_END

    def render_chat(
        self, messages: Sequence[dict[str, Any]], *, thinking: bool, tools: Sequence[dict[str, Any]] | None = None
    ) -> str:
        return render_chat(messages, thinking=thinking, tools=tools)

    def parse(self, text: str, *, thinking: bool, has_tools: bool = False) -> Parsed:
        return parse_answer(text, thinking=thinking, has_tools=has_tools)


def create_deepseek_tokenizer(model: ModelSpec) -> DeepSeekTokenizer:
    """The tokenizer of this checkpoint; reads its files."""
    return DeepSeekTokenizer(model)


def make_probes() -> tuple[tuple[tuple[dict[str, Any], ...], bool, str], ...]:
    """(messages, thinking, rendered) to compare with the tokenizer of an engine's vendor at its start."""
    return tuple(
        (tuple(chat), thinking, render_chat(chat, thinking=thinking)) for chat in _CHATS for thinking in (False, True)
    )
