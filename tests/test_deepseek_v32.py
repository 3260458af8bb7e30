"""DeepSeek-V3.2's chat as text: golden prompts in the form of DeepSeek's own examples, refusals, answers taken apart."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchgen.engines.deepseek_v32 import parse_answer, render_chat
from batchgen.errors import BadRow
from batchgen.worker.answer import Parsed

SECRET = "Xyzzy"
BEGIN, END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"

# The words that the model was trained on, as the examples beside its weights have them.
TOOLS_TEXT = """

## Tools

You have access to a set of tools you can use to answer the user's question.
You can invoke functions by writing a "<｜DSML｜function_calls>" block like the following as part of your reply to the user:
<｜DSML｜function_calls>
<｜DSML｜invoke name="$FUNCTION_NAME">
<｜DSML｜parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</｜DSML｜parameter>
...
</｜DSML｜invoke>
<｜DSML｜invoke name="$FUNCTION_NAME2">
...
</｜DSML｜invoke>
</｜DSML｜function_calls>

String and scalar parameters should be specified as is without any escaping or quotes, while lists and objects should use JSON format. The "string" attribute should be set to "true" for string type parameters and "false" for other types (numbers, booleans, arrays, objects).

If the thinking_mode is enabled, then after function results you should strongly consider outputting a thinking block. Here is an example:

<｜DSML｜function_calls>
...
</｜DSML｜function_calls>

<function_results>
...
</function_results>

<think>...thinking about results</think>

Here are the functions available in JSONSchema format:
<functions>
{"name": "get_weather", "description": "Wetter für einen Ort", "parameters": {"type": "object", "properties": {}}}
{"name": "now", "default": null}
</functions>
"""  # noqa: E501
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Wetter für einen Ort",
            "parameters": {"type": "object", "properties": {}},
        },
    },
    {"type": "function", "function": {"name": "now", "default": None}},
]


def say(role: str, content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def call(name: str, arguments: Any, id_: str | None = None) -> dict[str, Any]:
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}


SYSTEM = say("system", "Be brief.")
ASK, ASK_MORE = say("user", "2 + 2 = ?"), say("user", "And 1 more?")
ANSWER = say("assistant", "4", reasoning_content="2 and 2 is 4")
CALLS = say(
    "assistant",
    None,
    reasoning="I ask.",
    tool_calls=[
        call("get_weather", json.dumps({"city": "Köln", "days": 2, "more": {"a": [True, None]}}, ensure_ascii=False)),
        call("now", {}),
    ],
)
CALLS_TEXT = """

<｜DSML｜function_calls>
<｜DSML｜invoke name="get_weather">
<｜DSML｜parameter name="city" string="true">Köln</｜DSML｜parameter>
<｜DSML｜parameter name="days" string="false">2</｜DSML｜parameter>
<｜DSML｜parameter name="more" string="false">{"a": [true, null]}</｜DSML｜parameter>
</｜DSML｜invoke>
<｜DSML｜invoke name="now">

</｜DSML｜invoke>
</｜DSML｜function_calls>"""
RESULTS = [say("tool", "rain"), say("tool", "noon")]
RESULTS_TEXT = "\n\n<function_results>\n<result>rain</result>\n<result>noon</result>\n</function_results>\n\n"


# ---- prompts


@pytest.mark.parametrize(
    ("messages", "chat", "thinking"),
    [
        ([ASK], "<｜User｜>2 + 2 = ?<｜Assistant｜></think>", "<｜User｜>2 + 2 = ?<｜Assistant｜><think>"),
        (
            [SYSTEM, ASK],
            "Be brief.<｜User｜>2 + 2 = ?<｜Assistant｜></think>",
            "Be brief.<｜User｜>2 + 2 = ?<｜Assistant｜><think>",
        ),
        (
            [SYSTEM, ASK, ANSWER, ASK_MORE],
            f"Be brief.<｜User｜>2 + 2 = ?<｜Assistant｜></think>4{END}<｜User｜>And 1 more?<｜Assistant｜></think>",
            f"Be brief.<｜User｜>2 + 2 = ?<｜Assistant｜></think>4{END}<｜User｜>And 1 more?<｜Assistant｜><think>",
        ),
        (
            [ASK, CALLS, *RESULTS],
            f"<｜User｜>2 + 2 = ?<｜Assistant｜></think>{CALLS_TEXT}{END}{RESULTS_TEXT}</think>",
            f"<｜User｜>2 + 2 = ?<｜Assistant｜><think>I ask.</think>{CALLS_TEXT}{END}{RESULTS_TEXT}<think>",
        ),
        (
            [ASK, CALLS, *RESULTS, ANSWER, ASK_MORE],
            f"<｜User｜>2 + 2 = ?<｜Assistant｜></think>{CALLS_TEXT}{END}{RESULTS_TEXT}</think>4{END}"
            "<｜User｜>And 1 more?<｜Assistant｜></think>",
            f"<｜User｜>2 + 2 = ?<｜Assistant｜></think>{CALLS_TEXT}{END}{RESULTS_TEXT}</think>4{END}"
            "<｜User｜>And 1 more?<｜Assistant｜><think>",
        ),
        (
            [say("developer", "2 + 2 = ?", response_format={"type": "é"})],
            "<｜User｜>\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
            '{"type": "é"}\n\n# The user\'s message is: 2 + 2 = ?<｜Assistant｜></think>',
            "<｜User｜>\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
            '{"type": "é"}\n\n# The user\'s message is: 2 + 2 = ?<｜Assistant｜><think>',
        ),
        (
            [say("developer", "Hi"), ANSWER, ASK],
            f"<｜User｜>\n\n# The user's message is: Hi<｜Assistant｜></think>4{END}<｜User｜>2 + 2 = ?"
            "<｜Assistant｜></think>",
            f"<｜User｜>\n\n# The user's message is: Hi<｜Assistant｜></think>4{END}<｜User｜>2 + 2 = ?"
            "<｜Assistant｜><think>",
        ),
    ],
    ids=["user", "system", "turns", "results", "turn after results", "developer", "earlier developer"],
)
def test_a_chat_is_rendered_as_the_model_learnt_it(messages: list[Any], chat: str, thinking: str) -> None:
    assert render_chat(messages, thinking=False) == BEGIN + chat
    assert render_chat(messages, thinking=True) == BEGIN + thinking


def test_tools_stand_in_the_system_message() -> None:
    asked = "<｜User｜>2 + 2 = ?<｜Assistant｜></think>"
    assert render_chat([SYSTEM, ASK], thinking=False, tools=TOOLS) == f"{BEGIN}Be brief.{TOOLS_TEXT}{asked}"
    assert render_chat([ASK], thinking=False, tools=TOOLS) == f"{BEGIN}{TOOLS_TEXT}{asked}"
    assert render_chat([{**SYSTEM, "tools": TOOLS}, ASK], thinking=False) == f"{BEGIN}Be brief.{TOOLS_TEXT}{asked}"
    split = [{**SYSTEM, "tools": TOOLS[:1]}, ASK]
    assert render_chat(split, thinking=False, tools=TOOLS[1:]) == f"{BEGIN}Be brief.{TOOLS_TEXT}{asked}"
    assert render_chat([ASK], thinking=False, tools=[]) == BEGIN + asked


def test_a_developers_tools_stand_before_the_question() -> None:
    rendered = render_chat([say("developer", "Hi", tools=TOOLS)], thinking=True)
    assert rendered == f"{BEGIN}<｜User｜>{TOOLS_TEXT}\n\n# The user's message is: Hi<｜Assistant｜><think>"


def test_a_system_message_may_ask_for_a_format_after_its_tools() -> None:
    rendered = render_chat([{**SYSTEM, "response_format": {"a": 1}}, ASK], thinking=False, tools=TOOLS)
    wanted = '\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n{"a": 1}'
    assert rendered.startswith(f"{BEGIN}Be brief.{TOOLS_TEXT}{wanted}<｜User｜>")


def test_results_that_name_their_calls_are_put_in_the_calls_order() -> None:
    asked = say("assistant", "", reasoning="r", tool_calls=[call("f", "{}", "one"), call("f", "{}", "two")])
    results = [say("tool", "second", tool_call_id="two"), say("tool", "first", tool_call_id="one")]
    rendered = render_chat([ASK, asked, *results], thinking=True)
    assert rendered.endswith("<result>first</result>\n<result>second</result>\n</function_results>\n\n<think>")
    unnamed = [{**result, "tool_call_id": "?"} for result in results]
    assert "<result>second</result>\n<result>first" in render_chat([ASK, asked, *unnamed], thinking=True)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "the chat holds no message"),
        ([SECRET], "message 0: must be a struct"),
        ([say(SECRET, SECRET)], "message 0: the roles are"),
        ([ASK, {"content": SECRET}], "message 1: the roles are"),
        ([say("user", None)], "message 0: content must be text"),
        ([{"role": "user", "content": [{"type": "text", "text": SECRET}]}], "message 0: content must be text"),
        ([say("developer", "")], "message 0: a developer message must have content"),
        ([SYSTEM], "message 0: the last message must be"),
        ([ASK, ANSWER], "message 1: the last message must be"),
        ([ASK, CALLS], "message 1: the last message must be"),
        ([say("tool", SECRET)], "message 0: a tool's result must follow"),
        ([ASK, say("tool", SECRET)], "message 1: a tool's result must follow"),
        ([ASK, ANSWER, say("tool", SECRET)], "message 2: a tool's result must follow"),
        ([ASK, CALLS, RESULTS[0]], "message 2: 2 tool_calls need as many results, not 1"),
        ([ASK, CALLS, RESULTS[0], ASK_MORE], "message 2: 2 tool_calls need as many results, not 1"),
        ([ASK, CALLS, *RESULTS, *RESULTS], "message 2: 2 tool_calls need as many results, not 4"),
        ([ASK, say("assistant", "", reasoning=3), ASK], "message 1: reasoning must be text"),
        ([ASK, say("assistant", "", tool_calls={"a": SECRET}), ASK], "message 1: tool_calls must be a list"),
        ([ASK, say("assistant", "", tool_calls=[SECRET]), ASK], "message 1: each of tool_calls must be a struct"),
        ([ASK, say("assistant", "", tool_calls=[call(3, "{}")]), ASK], "message 1: each of tool_calls must be"),  # type: ignore[arg-type]
        ([ASK, say("assistant", "", tool_calls=[call("f", f"{{{SECRET}")]), ASK], "message 1: the arguments of a tool"),
        ([ASK, say("assistant", "", tool_calls=[call("f", "[" * 10**5)]), ASK], "message 1: the arguments of a tool"),
        ([ASK, say("assistant", "", tool_calls=[call("f", "[1]")]), ASK], "must be a JSON object"),
        ([ASK, say("assistant", "", tool_calls=[call("f", {"a": {SECRET}})]), ASK], "message 1: holds a value"),
        ([{**SYSTEM, "tools": SECRET}, ASK], "message 0: tools must be a list"),
        ([{**SYSTEM, "tools": [{"name": SECRET}]}, ASK], "message 0: each of tools must be a struct"),
    ],
)
@pytest.mark.parametrize("thinking", [False, True])
def test_a_chat_that_no_answer_can_follow_is_a_bad_row(messages: list[Any], reason: str, thinking: bool) -> None:
    with pytest.raises(BadRow) as error:
        render_chat(messages, thinking=thinking)
    assert error.value.error_type == "bad_messages"
    assert reason in error.value.message
    assert SECRET not in error.value.message


def test_what_was_answered_in_this_turn_must_have_been_thought() -> None:
    messages = [ASK, say("assistant", SECRET), CALLS, *RESULTS]
    assert render_chat(messages, thinking=False)
    with pytest.raises(BadRow, match="message 1: after the last user message an answer must have reasoning"):
        render_chat(messages, thinking=True)
    assert render_chat([ASK, say("assistant", "4"), ASK_MORE], thinking=True)


# ---- answers


def parse(text: str, thinking: bool = False, has_tools: bool = True) -> Parsed:
    return parse_answer(text, thinking=thinking, has_tools=has_tools)


def read_calls(parsed: Parsed) -> list[tuple[str, Any]]:
    assert parsed.tool_calls is not None
    calls = json.loads(parsed.tool_calls)
    assert all(call["type"] == "function" and set(call) == {"id", "type", "function"} for call in calls)
    assert len({call["id"] for call in calls}) == len(calls)
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]


WEATHER = ("get_weather", {"city": "Köln", "days": 2, "more": {"a": [True, None]}})


@pytest.mark.parametrize(
    "text",
    [
        f"I look.{CALLS_TEXT}",
        f"I look.{CALLS_TEXT}{END}",
        f"I look.{CALLS_TEXT}\n",
        f"I look.\n\n{CALLS_TEXT.strip()}",
        f"I look.{CALLS_TEXT}".replace(">\n<", "><").replace(">\n\n<", "><"),
        f"I look.{CALLS_TEXT}".replace('">\n', '">\n\n  '),
    ],
)
def test_calls_are_read_out_of_an_answer(text: str) -> None:
    parsed = parse(text)
    assert (parsed.text, parsed.reasoning) == ("I look.", None)
    assert read_calls(parsed) == [WEATHER, ("now", {})]


def test_an_answer_in_thinking_mode_has_reasoning_and_calls() -> None:
    parsed = parse(f"I ask.</think>{CALLS_TEXT}", thinking=True)
    assert (parsed.text, parsed.reasoning) == ("", "I ask.")
    assert read_calls(parsed) == [WEATHER, ("now", {})]
    assert parse("I think and think", thinking=True) == Parsed("", "I think and think")
    unfinished = f"I call inside my thoughts{CALLS_TEXT}"
    assert parse(unfinished, thinking=True) == Parsed("", unfinished)
    assert parse("I ask.</think>4", thinking=True) == Parsed("4", "I ask.")


def test_the_ids_of_calls_repeat_with_the_answer_and_not_with_another() -> None:
    first, again, other = parse(CALLS_TEXT), parse(CALLS_TEXT), parse(f"Now.{CALLS_TEXT}")
    assert first == again
    ids = [call["id"] for parsed in (first, other) for call in json.loads(parsed.tool_calls or "[]")]
    assert len(set(ids)) == 4
    assert all(id_.startswith("call_") for id_ in ids)


def test_without_tools_nothing_is_taken_for_a_call() -> None:
    assert parse(f"Like this:{CALLS_TEXT}", has_tools=False) == Parsed(f"Like this:{CALLS_TEXT}", None)


@pytest.mark.parametrize(
    "text",
    [
        f"{CALLS_TEXT} And then?",
        CALLS_TEXT.replace("2<", "two<"),
        CALLS_TEXT.replace("2<", "NaN<"),
        CALLS_TEXT.replace("2<", "[" * 10**5 + "<"),
        CALLS_TEXT.replace("2<", "9" * 5000 + "<"),
        CALLS_TEXT.replace('string="false">2', 'string="maybe">2'),
        CALLS_TEXT.replace('"days"', '"city"'),
        CALLS_TEXT.replace(' name="now"', ""),
        CALLS_TEXT.replace("</｜DSML｜invoke>", "", 1),
        CALLS_TEXT.replace("</｜DSML｜parameter>", "", 1),
        CALLS_TEXT.replace("\n<｜DSML｜invoke", "\nwell\n<｜DSML｜invoke", 1),
        CALLS_TEXT.replace("\n<｜DSML｜parameter", "\nwell\n<｜DSML｜parameter", 1),
        "\n\n<｜DSML｜function_calls>\n</｜DSML｜function_calls>",
        "<｜DSML｜function_calls>",
        "</｜DSML｜function_calls><｜DSML｜function_calls>",
    ],
)
def test_malformed_calls_stay_in_the_text(text: str) -> None:
    assert parse(text) == Parsed(text, None)


def test_calls_that_are_cut_off_anywhere_stay_in_the_text() -> None:
    for end in range(len(CALLS_TEXT)):
        assert parse(CALLS_TEXT[:end]) == Parsed(CALLS_TEXT[:end], None)


PIECES = ["<think>", "</think>", BEGIN, END, CALLS_TEXT, *CALLS_TEXT.split("\n"), '"', "\n", " ", "{", "\ud800", "é"]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(PIECES) | st.text(st.characters(), max_size=5), max_size=12).map("".join))
def test_whatever_the_model_writes_is_parsed_and_nothing_of_it_lost(text: str) -> None:
    for thinking in (False, True):
        parsed = parse(text, thinking)
        if parsed.tool_calls is None:
            mark = "</think>" if thinking and "</think>" in text else ""
            assert (parsed.reasoning or "") + mark + parsed.text == text
        else:
            assert read_calls(parsed)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
).filter(lambda value: "｜" not in str(value))
KEYS = st.text(min_size=1).filter(lambda key: "｜" not in key and '"' not in key)
NAMES = st.from_regex(r"[a-zA-Z0-9_-]{1,64}", fullmatch=True)
MADE_CALLS = st.lists(st.tuples(NAMES, st.dictionaries(KEYS, JSON, max_size=4)), min_size=1, max_size=3)
WORDS = st.text().filter(lambda text: "｜" not in text and "<think>" not in text and "</think>" not in text)


@settings(max_examples=200, deadline=None)
@given(MADE_CALLS, WORDS, WORDS, st.booleans(), st.booleans())
def test_calls_come_back_as_they_were_rendered(
    calls: list[tuple[str, Any]], content: str, reasoning: str, thinking: bool, is_text: bool
) -> None:
    made = [call(name, json.dumps(arguments) if is_text else arguments) for name, arguments in calls]
    turn = say("assistant", content, reasoning_content=reasoning, tool_calls=made)
    prompt = render_chat([ASK], thinking=thinking)
    whole = render_chat([ASK, turn, *(say("tool", "r") for _ in calls)], thinking=thinking)
    answer = whole.removeprefix(prompt).partition("\n\n<function_results>")[0]
    parsed = parse(answer.removesuffix(END), thinking)
    assert read_calls(parsed) == calls
    assert (parsed.text, parsed.reasoning) == (content, reasoning if thinking else None)
