"""DeepSeek-V3.2's tokenizer over the embedded model's: one BOS, marks that survive decoding, the same text as Jinja's."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from batchgen.engines.deepseek_tokenizer import DeepSeekTokenizer, create_deepseek_tokenizer, make_probes
from batchgen.engines.deepseek_v32 import DSML
from batchgen.engines.hf_tokenizer import HFTokenizer
from batchgen.errors import BadRow, SpecError
from batchgen.spec import ModelSpec

BOS, EOS, THINK_END = 0, 1, 6
EMBEDDED = Path(sys.modules["batchgen"].__file__ or "").parent / "embedded"
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]


@pytest.fixture(scope="module")
def tokenizer() -> DeepSeekTokenizer:
    return create_deepseek_tokenizer(ModelSpec())


def say(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


CHATS = [
    [say("user", "1 + 2 = ?")],
    [say("system", "Be brief."), say("user", "1 + 2 = ?")],
    [say("user", "1 + 2 = ?"), say("assistant", "3"), say("user", "And 1?")],
    [
        say("system", ""),
        say("user", "é"),
        say("assistant", "a\nb"),
        say("user", ""),
        say("assistant", ""),
        say("user", "!"),
    ],
]


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("messages", CHATS)
def test_the_embedded_models_own_template_says_the_same(
    tokenizer: DeepSeekTokenizer, messages: list[dict[str, Any]], thinking: bool
) -> None:
    own = HFTokenizer(ModelSpec())
    assert tokenizer.render_chat(messages, thinking=thinking) == own.render_chat(messages, thinking=thinking)
    assert tokenizer.encode_chat(messages, thinking=thinking) == own.encode_chat(messages, thinking=thinking)


@pytest.mark.parametrize("tools", [None, TOOLS])
def test_a_chat_begins_with_one_bos_though_the_tokenizer_would_add_another(
    tokenizer: DeepSeekTokenizer, tools: list[dict[str, Any]] | None
) -> None:
    ids = tokenizer.encode_chat(CHATS[1], thinking=False, tools=tools)
    assert (ids[0], ids.count(BOS), ids[-1]) == (BOS, 1, THINK_END)
    assert tokenizer.encode(tokenizer.render_chat(CHATS[1], thinking=False))[:2] == [BOS, BOS]


def test_it_knows_marks_and_tools_and_refuses_as_a_bad_row(tokenizer: DeepSeekTokenizer) -> None:
    assert (tokenizer.think_end, tokenizer.can_use_tools) == ("</think>", True)
    with pytest.raises(BadRow, match="the last message must be"):
        tokenizer.encode_chat([say("system", "x")], thinking=False)
    parsed = tokenizer.parse("because</think>so", thinking=True)
    assert (parsed.text, parsed.reasoning, parsed.tool_calls) == ("so", "because", None)


def copy_model(folder: Path, template: str, **added: bool) -> ModelSpec:
    """The embedded tokenizer with more tokens (text -> is it special) and another template."""
    tree = json.loads((EMBEDDED / "tokenizer.json").read_text(encoding="utf-8"))
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    first = max(token["id"] for token in tree["added_tokens"]) + 1000
    for number, (text, is_special) in enumerate(added.items()):
        tree["added_tokens"].append({"id": first + number, "content": text, "special": is_special, **plain})
    config = json.loads((EMBEDDED / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["additional_special_tokens"] = [text for text, is_special in added.items() if is_special]
    (folder / "tokenizer.json").write_text(json.dumps(tree), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "config.json").write_text((EMBEDDED / "config.json").read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return ModelSpec(path=str(folder))


def test_the_mark_of_a_call_survives_decoding_where_it_is_a_special_token(tmp_path: Path) -> None:
    model = copy_model(tmp_path, "{{ messages }}", **{DSML: True})
    ours, plain = DeepSeekTokenizer(model), HFTokenizer(model)
    ids = ours.encode(f"<{DSML}function_calls>")
    assert plain.decode(ids) == "<function_calls>", "the copy has no such special token"
    assert ours.decode([*ids, EOS]) == f"<{DSML}function_calls>"


def test_probes_show_every_role_and_end_where_an_answer_begins() -> None:
    probes = make_probes()
    assert {message["role"] for chat, _, _ in probes for message in chat} == {
        "system",
        "user",
        "developer",
        "assistant",
        "tool",
    }
    assert {rendered.rpartition("<")[2] for _, _, rendered in probes} == {"think>", "/think>"}
    assert all(rendered.endswith("<think>") == thinking for _, thinking, rendered in probes)
    assert "## Tools" not in "".join(rendered for _, _, rendered in probes)


# ---- tools through a template of Hugging Face's

SHOWS_TOOLS = "{% for tool in tools or [] %}<{{ tool.function.name }}>{% endfor %}{{ messages[0].content }}"


def test_a_template_that_takes_tools_gets_them(tmp_path: Path) -> None:
    tokenizer = HFTokenizer(copy_model(tmp_path, SHOWS_TOOLS))
    assert tokenizer.can_use_tools
    assert tokenizer.render_chat(CHATS[0], thinking=False, tools=TOOLS) == "<f>1 + 2 = ?"
    assert tokenizer.render_chat(CHATS[0], thinking=False) == "1 + 2 = ?"
    ids = tokenizer.encode_chat(CHATS[0], thinking=False, tools=TOOLS)
    assert tokenizer.decode(ids) == "<f>1 + 2 = ?"


def test_a_template_that_names_no_tools_can_show_none() -> None:
    assert not HFTokenizer(ModelSpec()).can_use_tools


def test_calls_in_an_unknown_format_stay_in_the_text() -> None:
    parsed = HFTokenizer(ModelSpec()).parse(
        'so</think><tool_call>{"name": "f"}</tool_call>', thinking=True, has_tools=True
    )
    assert (parsed.text, parsed.reasoning, parsed.tool_calls) == ('<tool_call>{"name": "f"}</tool_call>', "so", None)


def test_a_tokenizer_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"model\.path: can't load the tokenizer"):
        create_deepseek_tokenizer(ModelSpec(path=str(tmp_path)))
