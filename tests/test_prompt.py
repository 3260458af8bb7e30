"""Every kind of row, good and bad: what is asked, and a reason that names the column and never the content."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from makers import make_job_spec

from batchgen.errors import BadRow, SpecError
from batchgen.prompt import (
    BadCell,
    get_cell,
    list_columns,
    list_row_columns,
    list_template_columns,
    make_custom_id,
    make_messages,
    make_prompt,
    make_row_sampling,
    make_sampling_params,
    make_seed,
    make_tools,
)
from batchgen.records import Guided, Prompt, RowId, SamplingParams
from batchgen.spec import PromptSpec
from batchgen.specs.sampling import SamplingSpec

SECRET = "Xyzzy"


def bad(work: Any, *args: Any, **kwargs: Any) -> tuple[str, str]:
    """(error_type, message) of the BadRow; it must hold nothing of the row."""
    with pytest.raises(BadRow) as error:
        work(*args, **kwargs)
    assert SECRET not in error.value.message
    assert not error.value.is_retryable
    error.value.message.encode()
    return error.value.error_type, error.value.message


def bad_prompt(row: dict[str, Any], **prompt: Any) -> str:
    return bad(make_prompt, row, PromptSpec(**prompt))[0]


# ---- columns and templates


def test_columns_are_each_read_once_in_order() -> None:
    spec = make_job_spec(
        input={"paths": "a", "custom_id": "id", "passthrough": ["z", "id", "b"]},
        prompt={"template": "{b} {a} {b}", "sampling": "s"},
    )
    assert list_row_columns(spec) == ("b", "a", "id", "s")
    assert list_columns(spec) == ("b", "a", "id", "s", "z")


def test_a_template_prints_columns_and_doubled_braces() -> None:
    prompt = PromptSpec(template="{{{a}}} is {b c}, {a}", chat=False)
    assert list_template_columns(prompt.template or "") == ("a", "b c")
    row = {"a": "{b c}", "b c": 3, "other": None}
    assert make_prompt(row, prompt) == Prompt(text="{{b c}} is 3, {b c}")


@pytest.mark.parametrize("template", ["", "no column", "{}", "{0.a}{a:>5}", "{a!r}", "{a", "a}", "{a:{b}}", "{{a}}"])
def test_a_template_takes_plain_names_only(template: str) -> None:
    with pytest.raises(SpecError, match=r"^prompt\.template: "):
        list_template_columns(template)


@pytest.mark.parametrize("value", [True, 0, 1.5, "", "é\n\0"])
def test_a_template_prints_any_scalar_and_an_empty_text(value: object) -> None:
    assert make_prompt({"a": value}, PromptSpec(template="<{a}>", chat=False)).text == f"<{value}>"


def test_a_template_with_a_null_or_nothing_to_show_is_a_bad_row() -> None:
    assert bad_prompt({"a": SECRET, "b": None}, template="{a}{b}") == "null_prompt"
    assert bad_prompt({"a": "", "b": ""}, template="{a}{b}") == "empty_prompt"
    assert bad_prompt({"a": SECRET, "b": BadCell("is odd", "bad_value")}, template="{a}{b}") == "bad_value"


def test_a_text_column_becomes_a_user_message_or_stays_bare() -> None:
    user = {"role": "user", "content": "hi"}
    assert make_prompt({"p": "hi"}, PromptSpec(column="p")).messages == (user,)
    told = make_prompt({"p": "hi"}, PromptSpec(column="p", system="Be brief."))
    assert told.messages == ({"role": "system", "content": "Be brief."}, user)
    assert make_prompt({"p": "hi"}, PromptSpec(column="p", chat=False)) == Prompt(text="hi")
    assert make_prompt({"p": " "}, PromptSpec(column="p", chat=False)) == Prompt(text=" ")


@pytest.mark.parametrize(
    ("value", "error_type"),
    [(None, "null_prompt"), ("", "empty_prompt"), (BadCell("is not valid UTF-8"), "invalid_utf8")],
)
@pytest.mark.parametrize("chat", [True, False])
def test_a_text_column_that_holds_nothing_is_a_bad_row(value: Any, error_type: str, chat: bool) -> None:
    found, message = bad(make_prompt, {"p": value}, PromptSpec(column="p", chat=chat))
    assert found == error_type
    assert "'p'" in message


# ---- messages

CHAT = [{"role": "system", "content": "s"}, {"role": "user", "content": "u", "name": None}]


@pytest.mark.parametrize("value", [CHAT, json.dumps(CHAT)])
def test_messages_come_as_structs_or_as_json_and_null_fields_are_left_out(value: Any) -> None:
    assert make_messages(value, "m") == ({"role": "system", "content": "s"}, {"role": "user", "content": "u"})


def test_an_assistant_may_call_tools_without_content() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    assert make_messages([call], "m") == ({"role": "assistant", "tool_calls": [{"id": "1"}]},)


@pytest.mark.parametrize(
    ("value", "error_type"),
    [
        (None, "null_prompt"),
        ([], "bad_messages"),
        ("[]", "bad_messages"),
        ("", "bad_messages"),
        (f"{SECRET} is no JSON", "bad_messages"),
        (f'{{"role": "{SECRET}"}}', "bad_messages"),
        ("[" * 100_000, "bad_messages"),
        ("9" * 5_000, "bad_messages"),
        ([None], "bad_messages"),
        ([SECRET], "bad_messages"),
        ([{"content": SECRET}], "bad_messages"),
        ([{"role": "", "content": SECRET}], "bad_messages"),
        ([{"role": 3, "content": SECRET}], "bad_messages"),
        ([{"role": "user"}], "bad_messages"),
        ([{"role": "user", "content": None}], "bad_messages"),
        ([{"role": "user", "content": [{"type": "text", "text": SECRET}]}], "bad_messages"),
        ([{"role": "user", "content": b"bytes"}], "bad_messages"),
        ([*CHAT, {"role": "user", "content": 3}], "bad_messages"),
        (r'[{"role": "user", "content": "Xyzzy \ud800"}]', "invalid_utf8"),
        (r'[{"role": "us\udc00er", "content": "Xyzzy"}]', "invalid_utf8"),
        (r'[{"role": "user", "content": "Xyzzy", "name": "\ud83d"}]', "invalid_utf8"),
        (r'[{"role": "user", "content": "Xyzzy", "\ud83d": 1}]', "invalid_utf8"),
        (r'[{"role": "assistant", "tool_calls": [{"a": ["Xyzzy \ud83d"]}]}]', "invalid_utf8"),
    ],
)
def test_malformed_messages_are_a_bad_row(value: Any, error_type: str) -> None:
    found, message = bad(make_messages, value, "m")
    assert found == error_type
    assert message.startswith("column 'm'")


def test_the_reason_says_which_message() -> None:
    assert "message 2: content must be text" in bad(make_messages, [*CHAT, {"role": "user", "content": 3}], "m")[1]


def test_a_whole_surrogate_pair_is_a_character() -> None:
    assert make_messages(r'[{"role": "user", "content": "\ud83d\ude00"}]', "m")[0]["content"] == "😀"


DEPTH = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "name", "tool_calls"]) | st.text(max_size=3), inner, max_size=3
        )
    ),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(DEPTH)
def test_whatever_a_row_holds_it_is_a_chat_or_a_bad_row(value: Any) -> None:
    for cell in (value, json.dumps(value), [value], [{"role": "user", "content": "hi", "more": value}]):
        try:
            messages = make_messages(cell, "m")
        except BadRow as error:
            error.message.encode()
        else:
            json.dumps(messages, ensure_ascii=False).encode()


# ---- tools

SCHEMA = {"type": "object", "properties": {"a": {"default": None}}}
TOOL = {"type": "function", "function": {"name": "f", "description": "é", "parameters": SCHEMA}}


@pytest.mark.parametrize("value", [None, [], "[]", "null"])
def test_a_row_may_have_no_tools(value: Any) -> None:
    assert make_tools(value, "t") is None
    assert make_prompt({"p": "hi", "t": value}, PromptSpec(column="p", tools="t")).tools is None


def test_tools_come_as_json_or_as_structs_that_all_have_the_same_fields() -> None:
    assert make_tools(json.dumps([TOOL]), "t") == (TOOL,), "in JSON a null is meant"
    struct = {
        "type": "function",
        "strict": None,
        "function": {"name": "f", "parameters": json.dumps(SCHEMA), "x": None},
    }
    assert make_tools([struct], "t") == ({"type": "function", "function": {"name": "f", "parameters": SCHEMA}},)
    for prompt in (PromptSpec(column="p", tools="t"), PromptSpec(messages="m", tools="t")):
        row = {"p": "hi", "m": [{"role": "user", "content": "hi"}], "t": [TOOL]}
        assert make_prompt(row, prompt).messages == ({"role": "user", "content": "hi"},)
        assert [tool["function"]["name"] for tool in make_prompt(row, prompt).tools or ()] == ["f"]


@pytest.mark.parametrize(
    ("value", "error_type"),
    [
        (f"{{{SECRET}", "bad_tools"),
        ("[" * 100_000, "bad_tools"),
        ("{}", "bad_tools"),
        (7, "bad_tools"),
        ([SECRET], "bad_tools"),
        ([{"function": {"name": SECRET}}], "bad_tools"),
        ([{"type": SECRET, "function": {"name": "f"}}], "bad_tools"),
        ([{"type": "function", "function": SECRET}], "bad_tools"),
        ([{"type": "function", "function": {}}], "bad_tools"),
        ([{"type": "function", "function": {"name": ""}}], "bad_tools"),
        ([{"type": "function", "function": {"name": "f", "parameters": [SECRET]}}], "bad_tools"),
        ([{"type": "function", "function": {"name": "f", "parameters": f"{{{SECRET}"}}], "bad_tools"),
        (r'[{"type": "function", "function": {"name": "Xyzzy \ud800"}}]', "invalid_utf8"),
        (BadCell("is not valid UTF-8"), "invalid_utf8"),
    ],
)
def test_malformed_tools_are_a_bad_row(value: Any, error_type: str) -> None:
    found, message = bad(make_prompt, {"p": "hi", "t": value}, PromptSpec(column="p", tools="t"))
    assert found == error_type
    assert message.startswith("column 't'")


@settings(max_examples=60, deadline=None)
@given(DEPTH)
def test_whatever_a_row_gives_it_is_tools_or_a_bad_row(value: Any) -> None:
    function = {"type": "function", "function": {"name": "f", "more": value}}
    for cell in (value, json.dumps(value), [value], [function], [{"type": "function", "function": value}]):
        try:
            tools = make_tools(cell, "t")
        except BadRow as error:
            error.message.encode()
        else:
            json.dumps(tools, ensure_ascii=False).encode()


# ---- token ids


def test_token_ids_go_as_they_are() -> None:
    assert make_prompt({"t": [0, 5, 2]}, PromptSpec(prompt_token_ids="t")) == Prompt(token_ids=(0, 5, 2))


@pytest.mark.parametrize(
    ("value", "error_type"),
    [
        (None, "null_prompt"),
        ([], "empty_prompt"),
        ([1, None], "bad_token_ids"),
        ([1, -1], "bad_token_ids"),
        ([1.0], "bad_token_ids"),
        (SECRET, "bad_token_ids"),
        (7, "bad_token_ids"),
        (BadCell("is not valid UTF-8"), "invalid_utf8"),
    ],
)
def test_token_ids_that_are_none_are_a_bad_row(value: Any, error_type: str) -> None:
    assert bad_prompt({"t": value}, prompt_token_ids="t") == error_type


# ---- keys


def test_a_custom_id_is_the_users_key_or_file_and_row() -> None:
    assert make_custom_id({"k": 7}, "k", "/f", 3) == "7"
    assert make_custom_id({"k": "a"}, "k", "/f", 3) == "a"
    assert make_custom_id({"k": None}, "k", "/f", 3) is None
    assert make_custom_id({"k": BadCell("is odd")}, "k", "/f", 3) is None
    assert make_custom_id({}, None, "/f", 3) == "/f:3"


def test_a_bad_cell_says_why() -> None:
    assert get_cell({"a": None}, "a") is None
    assert bad(get_cell, {"a": BadCell("is odd", "bad_value")}, "a") == ("bad_value", "column 'a' is odd")


# ---- sampling

ROW_SPEC = make_job_spec(
    prompt={"column": "p", "sampling": "s"}, sampling={"temperature": 0.5, "n": 3, "stop": ["END"], "seed": 1}
)


def test_the_jobs_own_sampling_reaches_the_request_field_by_field() -> None:
    params = make_sampling_params(SamplingSpec(top_k=5, stop=("x",), logprobs=2, thinking=True))
    assert params == SamplingParams(top_k=5, stop=("x",), logprobs=2, thinking=True)
    assert set(SamplingParams.__slots__) == set(SamplingSpec.model_fields) - {"n"}
    assert make_sampling_params(SamplingSpec()) == SamplingParams()


@pytest.mark.parametrize("value", [None, "{}", {}, {"temperature": None, "top_k": None}])
def test_a_row_without_overrides_gets_the_jobs_sampling(value: Any) -> None:
    assert make_row_sampling({"s": value}, ROW_SPEC) == make_sampling_params(ROW_SPEC.sampling)
    assert make_row_sampling({}, make_job_spec()) == SamplingParams()


@pytest.mark.parametrize("as_json", [True, False])
def test_a_row_overrides_what_it_names(as_json: bool) -> None:
    given_ = {"max_tokens": 9, "stop": ["a", "b"], "thinking": True}
    found = make_row_sampling({"s": json.dumps(given_) if as_json else given_}, ROW_SPEC)
    assert found == SamplingParams(temperature=0.5, seed=1, max_tokens=9, stop=("a", "b"), thinking=True)


@pytest.mark.parametrize(
    "guided", [{"json_schema": {"type": "object"}}, {"json_schema": '{"type": "object"}', "regex": None}]
)
def test_a_row_may_be_held_to_a_form_of_its_own(guided: Any) -> None:
    spec = make_job_spec(prompt={"column": "p", "sampling": "s"}, sampling={"guided": {"regex": "a"}})
    assert make_row_sampling({"s": None}, spec).guided == Guided(regex="a")
    for cell in ({"guided": guided}, json.dumps({"guided": guided})):
        assert make_row_sampling({"s": cell}, spec).guided == Guided(json_schema='{"type":"object"}')


def test_a_row_is_refused_a_form_that_the_server_has_no_field_for() -> None:
    server = {"kind": "openai", "base_urls": "http://a/v1"}
    spec = make_job_spec(prompt={"column": "p", "sampling": "s"}, engine=server)
    assert make_row_sampling({"s": {"guided": {"json_schema": {}}}}, spec).guided == Guided(json_schema="{}")
    reason = bad(make_row_sampling, {"s": {"guided": {"regex": SECRET}}}, spec)[1]
    assert reason == "column 's': guided.regex can't be honoured by the engine 'openai'"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"guided": SECRET}, "guided: Input should be a valid dictionary"),
        ({"guided": {}}, "guided: give exactly one of json_schema, regex, grammar; found none"),
        ({"guided": {"regex": "a", "grammar": SECRET}}, "guided: give exactly one of"),
        ({"guided": {"json_schema": SECRET}}, "guided.json_schema: is not JSON"),
        (
            {"guided": {"json_schema": {"type": SECRET}}},
            "guided.json_schema: is no valid JSON Schema: what stands under",
        ),
        ({"guided": {SECRET: "a"}}, "has a field that is none of"),
        ("", "is not valid JSON"),
        (f"{{{SECRET}", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("[1]", "must be a struct or a JSON object"),
        (3, "must be a struct or a JSON object"),
        ({"temperature": -1}, "temperature: Input should be greater than or equal to 0"),
        ({"temperature": SECRET}, "temperature: Input should be a valid number"),
        ('{"temperature": NaN}', "temperature: "),
        ('{"temperature": Infinity}', "temperature: "),
        ({"max_tokens": 0}, "max_tokens: "),
        ({"max_tokens": 1.5}, "max_tokens: "),
        ({"max_tokens": 10**5}, None),
        ({"seed": 2**63}, "seed: "),
        ({"stop": SECRET}, "stop: "),
        ({"stop": [SECRET, 3]}, "stop.1: "),
        ({"stop": [""]}, "stop.0: "),
        ({"n": 2}, "n can't be set for a row"),
        ({"n": None}, None),
        ({"seed": 3, "logprobs": 1}, "logprobs can't be set for a row"),
        ({SECRET: 1}, "has a field that is none of temperature, top_p"),
        (r'{"\ud800": 1}', "has a field that is none of temperature, top_p"),
        (BadCell("is not valid UTF-8"), "is not valid UTF-8"),
    ],
)
def test_bad_sampling_is_a_bad_row_that_quotes_nothing(value: Any, reason: str | None) -> None:
    refused = frozenset({"logprobs"})
    if reason is None:
        make_row_sampling({"s": value}, ROW_SPEC, refused)
        return
    error_type, message = bad(make_row_sampling, {"s": value}, ROW_SPEC, refused)
    assert error_type == ("invalid_utf8" if isinstance(value, BadCell) else "bad_sampling")
    assert message.startswith("column 's'")
    assert reason in message


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from([*SamplingSpec.model_fields, "x"]), DEPTH, max_size=3) | DEPTH)
def test_whatever_a_row_asks_it_is_sampling_or_a_bad_row(value: Any) -> None:
    for cell in (value, json.dumps(value)):
        try:
            assert isinstance(make_row_sampling({"s": cell}, ROW_SPEC), SamplingParams)
        except BadRow as error:
            error.message.encode()


# ---- seeds


def test_a_seed_is_the_rows_own_and_always_the_same() -> None:
    assert make_seed(None, RowId("/f", 0, 0)) is None
    ids = [RowId(file, row, sample) for file in ("/f", "/g") for row in (0, 1) for sample in (0, 1)]
    seeds = [make_seed(seed, row_id) for seed in (0, 1, 2**63 - 1) for row_id in ids]
    assert len(set(seeds)) == len(seeds)
    assert all(seed is not None and 0 <= seed < 2**63 for seed in seeds)
    assert make_seed(7, RowId("/f", 3, 1)) == 9156537955444226782
