"""Where prompt and tokenizer meet: overflow, room for the completion, samples, cells that can't be decoded."""

import json
from typing import Any

import pyarrow as pa
import pytest
from makers import make_job_spec

from batchgen.engines.simulated import ByteTokenizer
from batchgen.errors import SpecError
from batchgen.records import Prompt, Request, Result, RowId, Timing
from batchgen.worker.prepare import Prepared, Preparer, make_custom_ids


def prepare(
    columns: dict[str, Any], max_model_len: int = 100, first_row: int = 0, **sections: Any
) -> tuple[list[Prepared], list[str | None]]:
    sections = {"prompt": {"column": "p", "chat": False}, **sections}
    spec, batch = make_job_spec(**sections), pa.RecordBatch.from_pydict(columns)
    preparer = Preparer(spec, ByteTokenizer(), max_model_len, frozenset({"logprobs"}))
    numbers = range(first_row, first_row + batch.num_rows)
    return preparer.prepare(batch, "/f", numbers), make_custom_ids(batch, spec.input.custom_id, "/f", first_row)


def one_request(*args: Any, **kwargs: Any) -> Request:
    [item], _ = prepare(*args, **kwargs)
    assert isinstance(item, Request)
    return item


def one_failure(*args: Any, **kwargs: Any) -> tuple[str, str]:
    [item], _ = prepare(*args, **kwargs)
    assert isinstance(item, Result)
    assert (item.num_attempts, item.timing, item.generation) == (0, Timing(), None)
    assert item.failure is not None
    assert not item.failure.is_retryable
    return item.failure.error_type, item.failure.message


def test_rows_keep_their_order_number_and_key() -> None:
    columns = {"p": ["a", None, "c"], "k": [1, 2, None]}
    items, keys = prepare(columns, first_row=7, input={"paths": "x", "custom_id": "k"})
    assert [item.row_id for item in items] == [RowId("/f", row, 0) for row in (7, 8, 9)]
    assert [type(item) for item in items] == [Request, Result, Request]
    assert keys == ["1", "2", None]
    assert prepare({"p": ["a"]}, first_row=7)[1] == ["/f:7"]


def test_every_sample_is_a_request_with_its_own_seed_and_one_prompt() -> None:
    items, keys = prepare({"p": ["ab", None]}, sampling={"n": 3, "seed": 5})
    assert [item.row_id.sample_index for item in items] == [0, 1, 2, 0, 1, 2]
    requests = [item for item in items if isinstance(item, Request)]
    assert {request.token_ids for request in requests} == {(97, 98)}
    assert len({request.sampling.seed for request in requests}) == 3
    assert [item.failure.error_type for item in items if isinstance(item, Result) and item.failure] == [
        "null_prompt"
    ] * 3
    assert len(keys) == 2


@pytest.mark.parametrize(
    ("prompt", "columns", "expected"),
    [
        ({"column": "p", "chat": False}, {"p": ["ab"]}, Prompt(text="ab")),
        ({"column": "p"}, {"p": ["ab"]}, Prompt(messages=({"role": "user", "content": "ab"},))),
        ({"prompt_token_ids": "p"}, {"p": [[10**9]]}, Prompt(token_ids=(10**9,))),
    ],
)
def test_without_a_tokenizer_the_prompt_goes_as_it_is(
    prompt: dict[str, Any], columns: dict[str, Any], expected: Prompt
) -> None:
    spec = make_job_spec(prompt=prompt, sampling={"max_tokens": 10**6, "n": 2, "seed": 1})
    items = Preparer(spec, None, 100).prepare(pa.RecordBatch.from_pydict(columns), "/f", [0])
    requests = [item for item in items if isinstance(item, Request)]
    assert [(request.prompt, request.token_ids) for request in requests] == [(expected, None)] * 2
    assert {request.sampling.max_tokens for request in requests} == {10**6}
    assert len({request.sampling.seed for request in requests}) == 2
    assert all(2 <= request.num_bytes < 1000 for request in requests)
    with pytest.raises(ValueError, match="takes token ids, and the request has none"):
        _ = requests[0].ids


def test_without_a_known_limit_a_prompt_is_neither_cut_nor_refused() -> None:
    preparer = Preparer(make_job_spec(prompt={"column": "p", "chat": False}), ByteTokenizer(), None)
    [item] = preparer.prepare(pa.RecordBatch.from_pydict({"p": ["x" * 5000]}), "/f", [0])
    assert isinstance(item, Request)
    assert (len(item.ids), item.prompt, item.sampling.max_tokens) == (5000, None, 1024)


def test_without_a_seed_the_requests_have_none() -> None:
    assert one_request({"p": ["a"]}).sampling.seed is None


@pytest.mark.parametrize(("length", "max_tokens", "clipped"), [(1, 10, 9), (9, 10, 1), (4, 6, 6), (4, 5, 5), (4, 7, 6)])
def test_max_tokens_is_clipped_to_the_room_left(length: int, max_tokens: int, clipped: int) -> None:
    request = one_request({"p": ["x" * length]}, 10, sampling={"max_tokens": max_tokens})
    assert request.sampling.max_tokens == clipped
    assert len(request.token_ids) == length


@pytest.mark.parametrize("length", [10, 11, 5000])
def test_a_prompt_that_leaves_no_room_is_a_bad_row(length: int) -> None:
    error_type, message = one_failure({"p": ["x" * length]}, 10)
    assert error_type == "prompt_too_long"
    assert message.startswith(f"{length} prompt tokens; the model takes 10")
    assert "xx" not in message


@pytest.mark.parametrize(
    ("max_model_len", "max_tokens", "kept"), [(10, 3, 7), (10, 5, 5), (10, 1000, 5), (2, 1000, 1), (3, 1, 2), (3, 2, 2)]
)
def test_truncate_left_keeps_the_end_and_room_for_the_answer(max_model_len: int, max_tokens: int, kept: int) -> None:
    request = one_request(
        {"p": ["abcdefghijklmnop"]},
        max_model_len,
        prompt={"column": "p", "chat": False, "on_overflow": "truncate_left"},
        sampling={"max_tokens": max_tokens},
    )
    assert bytes(request.token_ids) == b"abcdefghijklmnop"[-kept:]
    assert request.sampling.max_tokens == min(max_tokens, max_model_len - kept)
    assert request.sampling.max_tokens >= 1


def test_truncate_left_leaves_a_prompt_that_fits() -> None:
    prompt = {"column": "p", "chat": False, "on_overflow": "truncate_left"}
    request = one_request({"p": ["123456789"]}, 10, prompt=prompt, sampling={"max_tokens": 5})
    assert (len(request.token_ids), request.sampling.max_tokens) == (9, 1)


def test_a_cell_that_is_not_utf8_costs_its_own_row_only() -> None:
    column = pa.array([b"good", b"\xff\xfe", None, "é".encode(), b"\xed\xa0\x80"], pa.binary())
    for cells in (column, column.cast(pa.large_binary()), pa.Array.from_buffers(pa.string(), 5, column.buffers())):
        items, keys = prepare({"p": cells})
        kinds = [item.failure.error_type if isinstance(item, Result) and item.failure else "ok" for item in items]
        assert kinds == ["ok", "invalid_utf8", "null_prompt", "ok", "invalid_utf8"]
        assert len(keys) == 5


def test_a_key_that_is_not_utf8_is_null_and_its_row_goes_on() -> None:
    columns = {"p": ["a", "b"], "k": pa.array([b"\xff", b"ok"])}
    items, keys = prepare(columns, input={"paths": "x", "custom_id": "k"})
    assert keys == [None, "ok"]
    assert all(isinstance(item, Request) for item in items)


def test_a_date_that_python_cannot_hold_costs_its_own_row_only() -> None:
    columns = {"d": pa.array([0, 2**30], pa.date32())}
    items, _ = prepare(columns, prompt={"template": "on {d}", "chat": False})
    assert isinstance(items[0], Request)
    assert bytes(items[0].token_ids) == b"on 1970-01-01"
    assert isinstance(items[1], Result)
    assert items[1].failure is not None
    assert items[1].failure.error_type == "bad_value"


def test_nested_text_that_is_not_utf8_is_a_bad_row() -> None:
    content = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff"]).buffers())
    chat = pa.StructArray.from_arrays([pa.array(["user"]), content], names=["role", "content"])
    cells = pa.ListArray.from_arrays([0, 1], chat)
    assert one_failure({"m": cells}, prompt={"messages": "m"})[0] == "invalid_utf8"


def test_a_chat_is_rendered_by_the_template_with_the_rows_own_thinking() -> None:
    prompt = {"column": "p", "system": "s", "sampling": "o"}
    plain = one_request({"p": ["hi"], "o": [None]}, prompt=prompt)
    thinking = one_request({"p": ["hi"], "o": ['{"thinking": true}']}, prompt=prompt)
    assert bytes(plain.token_ids) == b"<system>s\n<user>hi\n<assistant>"
    assert bytes(thinking.token_ids) == bytes(plain.token_ids) + b"<think>"
    assert (plain.sampling.thinking, thinking.sampling.thinking) == (False, True)


TOOLS = json.dumps([{"type": "function", "function": {"name": "f"}}])


def test_a_rows_tools_are_shown_to_the_model_and_told_to_who_reads_the_answer() -> None:
    prompt = {"column": "p", "tools": "t"}
    items, _ = prepare({"p": ["hi", "hi", "hi"], "t": [TOOLS, None, "[1]"]}, prompt=prompt)
    with_tools, without, broken = items
    assert isinstance(with_tools, Request)
    assert isinstance(without, Request)
    assert bytes(with_tools.ids) == b"<tools>" + TOOLS.encode() + b"\n<user>hi\n<assistant>"
    assert bytes(without.ids) == b"<user>hi\n<assistant>"
    assert (with_tools.has_tools, without.has_tools) == (True, False)
    assert isinstance(broken, Result)
    assert broken.failure is not None
    assert broken.failure.error_type == "bad_tools"


def test_tools_go_to_a_server_as_they_are() -> None:
    preparer = Preparer(make_job_spec(prompt={"column": "p", "tools": "t"}), None, None)
    [item] = preparer.prepare(pa.RecordBatch.from_pydict({"p": ["hi"], "t": [TOOLS]}), "/f", [0])
    assert isinstance(item, Request)
    assert item.prompt == Prompt(messages=({"role": "user", "content": "hi"},), tools=tuple(json.loads(TOOLS)))
    assert item.num_bytes > Prompt(messages=({"role": "user", "content": "hi"},)).num_bytes + 400


class ToollessTokenizer(ByteTokenizer):
    can_use_tools = False


def test_tools_that_the_model_would_never_see_are_refused_before_the_start() -> None:
    with pytest.raises(SpecError, match=r"prompt\.tools: the model's chat template shows no tools"):
        Preparer(make_job_spec(prompt={"column": "p", "tools": "t"}), ToollessTokenizer(), 100)
    Preparer(make_job_spec(prompt={"column": "p"}), ToollessTokenizer(), 100)


def test_token_ids_outside_the_vocabulary_are_a_bad_row() -> None:
    prompt = {"prompt_token_ids": "t"}
    assert one_request({"t": [[0, 255]]}, prompt=prompt).token_ids == (0, 255)
    error_type, message = one_failure({"t": [[0, 256]]}, prompt=prompt)
    assert error_type == "bad_token_ids"
    assert "vocabulary of 256" in message


def test_what_the_engine_cannot_do_is_refused_for_the_row() -> None:
    prompt = {"column": "p", "sampling": "o"}
    assert one_failure({"p": ["a"], "o": ['{"logprobs": 1}']}, prompt=prompt)[0] == "bad_sampling"


def test_a_lone_surrogate_never_reaches_the_tokenizer() -> None:
    chat = r'[{"role": "user", "content": "hi", "name": "\ud800"}]'
    assert one_failure({"m": [chat]}, prompt={"messages": "m"})[0] == "invalid_utf8"
