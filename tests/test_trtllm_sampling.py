"""Our sampling in TensorRT-LLM's words, and where an answer of theirs ends."""

from dataclasses import dataclass, fields, replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchgen.engines.trtllm.errors import UNKNOWN, judge_answer, judge_start, judge_submit
from batchgen.engines.trtllm.sampling import (
    drop_end,
    make_guided_kwargs,
    make_logprobs,
    make_sampling_kwargs,
)
from batchgen.records import SamplingParams, TokenLogprob
from batchgen.worker.stops import cut_at_stop, cut_text

FULL = SamplingParams(
    temperature=0.7,
    top_p=0.9,
    max_tokens=77,
    top_k=5,
    min_p=0.1,
    seed=3,
    stop=("x",),
    stop_token_ids=(9,),
    presence_penalty=0.1,
    frequency_penalty=0.2,
    repetition_penalty=1.1,
    logprobs=4,
)
WORDS = {1: "a", 2: "b", 3: ".\n", 4: "\n", 5: "ab", 6: "\n\nb", 7: ""}


def decode(token_ids: Any) -> str:
    return "".join(WORDS[each] for each in token_ids)


def test_everything_that_was_asked_is_passed_on() -> None:
    kwargs = make_sampling_kwargs(FULL)
    plain = [
        field.name
        for field in fields(SamplingParams)
        if field.name not in ("thinking", "stop", "stop_token_ids", "guided")
    ]
    assert {name: kwargs[name] for name in plain} == {name: getattr(FULL, name) for name in plain}
    assert (kwargs["stop"], kwargs["stop_token_ids"], kwargs["detokenize"]) == (["x"], [9], True)
    assert (kwargs["add_special_tokens"], kwargs["ignore_eos"], kwargs["skip_special_tokens"]) == (False, False, False)


def test_what_was_not_asked_is_left_to_the_vendor_but_never_the_greedy_switch() -> None:
    kwargs = make_sampling_kwargs(SamplingParams())
    assert (kwargs["temperature"], kwargs["top_p"], kwargs["max_tokens"], kwargs["detokenize"]) == (
        1.0,
        0.95,
        1024,
        False,
    )
    assert not {"top_k", "min_p", "seed", "stop", "stop_token_ids", "logprobs", "end_id", "n"} & kwargs.keys()


def test_temperature_0_is_greedy_and_top_k_0_is_off() -> None:
    assert make_sampling_kwargs(replace(FULL, temperature=0.0))["top_k"] == 1
    assert "top_k" not in make_sampling_kwargs(replace(FULL, top_k=0))


def test_the_answers_form_is_passed_on() -> None:
    @dataclass(frozen=True, slots=True)
    class Guided:
        json_schema: str | None = None
        regex: str | None = None
        grammar: str | None = None

    @dataclass(frozen=True)
    class Sampling(SamplingParams):
        guided: Guided | None = None

    assert make_guided_kwargs(Sampling()) is None
    assert make_guided_kwargs(Sampling(guided=Guided(json_schema="{}"))) == {"json": "{}"}
    assert make_guided_kwargs(Sampling(guided=Guided(regex="a+"))) == {"regex": "a+"}
    assert make_guided_kwargs(Sampling(guided=Guided(grammar="root ::= x"))) == {"grammar": "root ::= x"}


@pytest.mark.parametrize(
    ("token_ids", "stop", "kept"),
    [
        ([1, 2, 1, 2], ("b",), [1]),
        ([1, 4, 4, 1], ("\n\n",), [1]),
        ([5, 1], ("b",), [5]),  # 'a' is inside the token
        ([1, 3, 4, 1], ("\n\n",), [1, 3, 4]),  # so is '.'
        ([1, 7, 6, 1], ("\n\n",), [1, 7]),
        ([2, 1], ("b",), []),
        ([1, 1], ("b",), [1, 1]),
        ([1, 2, 1], ("ba", "b"), [1]),
    ],
)
def test_token_ids_are_cut_where_the_stop_string_begins(
    token_ids: list[int], stop: tuple[str, ...], kept: list[int]
) -> None:
    assert list(cut_at_stop(token_ids, stop, decode)) == kept


@given(
    token_ids=st.lists(st.sampled_from(sorted(WORDS)), max_size=20),
    stop=st.lists(st.sampled_from(["b", "ab", "\n\n", ".\n", "aa"]), min_size=1, max_size=2),
)
def test_cut_twice_the_text_is_what_came_before_the_stop_string(token_ids: list[int], stop: list[str]) -> None:
    kept = cut_at_stop(token_ids, stop, decode)
    assert cut_text(decode(kept), stop) == cut_text(decode(token_ids), stop)
    assert list(kept) == token_ids[: len(kept)]


def test_the_end_token_is_dropped_unless_it_is_all_there_is() -> None:
    assert drop_end([5, 1], frozenset({1})) == [5]
    assert drop_end([1], frozenset({1})) == [1]
    assert drop_end([5, 2], frozenset({1})) == [5, 2]
    assert drop_end([], frozenset({1})) == []


def test_logprobs_come_in_either_of_the_vendors_shapes() -> None:
    given = [{1: SimpleNamespace(logprob=-0.5, rank=1), 2: SimpleNamespace(logprob=-0.1, rank=2)}]
    assert make_logprobs([1], given, 1) == (TokenLogprob(1, -0.5, ((2, -0.1),)),)
    assert make_logprobs([1], given, 0) == (TokenLogprob(1, -0.5),)
    assert make_logprobs([1], [-0.5], 2) == (TokenLogprob(1, -0.5),)
    assert make_logprobs([3], given, 1) is None, "the drawn token's is unknown"
    assert make_logprobs([1, 2], given, 1) is None, "one is missing"
    assert make_logprobs([1], given, None) is None
    assert make_logprobs([1], None, 1) is None


# ---- errors


class VendorError(RuntimeError):
    """Stands for their RequestError."""


def test_errors_are_judged_by_class_and_state_never_by_text() -> None:
    refused, other = VendorError("x"), RuntimeError("x")
    assert judge_submit(refused, VendorError, is_healthy=True).blame == "request"
    assert judge_submit(refused, VendorError, is_healthy=False).blame == "engine"
    assert judge_submit(ValueError("x"), VendorError, is_healthy=True).blame == "request"
    unknown = judge_submit(other, VendorError, is_healthy=True)
    assert (unknown.blame, unknown.error_type) == ("retry", UNKNOWN)
    assert judge_answer(refused, VendorError, is_healthy=True, can_never_fit=False).blame == "retry"
    assert judge_answer(refused, VendorError, is_healthy=True, can_never_fit=True).blame == "request"
    assert judge_answer(refused, VendorError, is_healthy=False, can_never_fit=True).blame == "engine"
    assert judge_answer(ValueError("x"), VendorError, is_healthy=True, can_never_fit=True).blame == "retry"


def test_a_message_is_one_short_line() -> None:
    verdict = judge_answer(VendorError("a" * 999 + "\nb"), VendorError, is_healthy=True, can_never_fit=False)
    assert verdict.message == "VendorError: " + "a" * 300
    assert judge_answer(VendorError(), VendorError, is_healthy=True, can_never_fit=False).message == "VendorError"


@pytest.mark.parametrize(
    ("error", "is_spec"),
    [
        (ValueError("x"), True),
        (TypeError("x"), True),
        (RuntimeError("x"), False),
        (OSError("x"), False),
        (SystemExit(1), False),
        (ModuleNotFoundError("x", name="tensorrt_llm.llmapi"), True),
        (ModuleNotFoundError("x", name="mpi4py"), False),
        (ImportError("libcuda.so.1"), False),
    ],
)
def test_a_start_is_hopeless_only_where_the_arguments_are(error: BaseException, is_spec: bool) -> None:
    assert judge_start(error)[1] == is_spec
