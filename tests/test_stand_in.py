"""The stand-in for TensorRT-LLM is only worth what it shares with the real one: names and defaults are compared with the
facts that were read from the vendor's sources, and its bad habits are tried."""

import ast
import dataclasses
import inspect
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticUndefined
from trtllm_util import StandIn, create_stand_in, wait_until

import batchgen
from batchgen.engines.trtllm.args import make_llm_kwargs
from batchgen.spec import ModelSpec
from batchgen.specs.tensorrt_llm import TensorRTLLMEngineSpec

sys.path.insert(0, str(Path(__file__).parent / "stand_in"))

from signatures import SIGNATURES
from tensorrt_llm.executor.result import RequestOutput
from tensorrt_llm.executor.utils import RequestError
from tensorrt_llm.llmapi import (
    LLM,
    CompletionOutput,
    GuidedDecodingParams,
    SamplingParams,
    SchedulingParams,
    TorchLlmArgs,
    llm_args,
)

MODEL = str(Path(batchgen.__file__).parent / "embedded")
FACTS = Path(__file__).parents[2] / "shared/facts/tensorrt_llm.md"
needs_facts = pytest.mark.skipif(not FACTS.is_file(), reason=f"no facts sheet at {FACTS}")
UNSAID = "unsaid"  # a default that the facts don't give
Fields = dict[str, Any]

# ---- the stand-in, as it is


def read_model(model: type[BaseModel]) -> Fields:
    """A section that is a default of another stands as 'Section()'."""
    fields = {}
    for name, field in model.model_fields.items():
        value = field.get_default(call_default_factory=True)
        value = f"{type(value).__name__}()" if isinstance(value, BaseModel) else value
        fields[name] = ... if value is PydanticUndefined else value
    return fields


def read_dataclass(kind: Any) -> Fields:
    fields = {}
    for field in dataclasses.fields(kind):
        if not field.name.startswith("_"):
            has_factory = field.default_factory is not dataclasses.MISSING
            value = field.default_factory() if has_factory else field.default  # type: ignore[misc]
            fields[field.name] = ... if value is dataclasses.MISSING else value
    return fields


def read_function(function: Any) -> Fields:
    parameters = inspect.signature(function).parameters.values()
    named = [each for each in parameters if each.name != "self" and each.kind is not each.VAR_KEYWORD]
    return {each.name: ... if each.default is each.empty else each.default for each in named}


LIVE: dict[str, Fields] = {
    "LLM.__init__": read_function(LLM.__init__),
    "LLM.generate_async": read_function(LLM.generate_async),
    **{name: read_model(getattr(llm_args, name)) for name in SIGNATURES if hasattr(llm_args, name)},
    **{
        each.__name__: read_dataclass(each)
        for each in (SamplingParams, GuidedDecodingParams, SchedulingParams, CompletionOutput)
    },
}


def test_the_stand_in_has_the_signatures_of_its_file() -> None:
    assert LIVE.keys() == SIGNATURES.keys()
    for name, fields in SIGNATURES.items():
        assert LIVE[name] == fields, name


# ---- the facts sheet


def read_section(title: str, end: str = "\n##") -> str:
    """What stands below a heading or begins with a mark, up to the next heading or `end`."""
    text = FACTS.read_text().partition(title)[2]
    assert text, f"the facts sheet has no {title!r}"
    return re.sub(r"\[M-only:[^]]*\]", "", text.partition(end)[0])


def parse_value(text: str) -> Any:
    """The first value of a text: a literal, a class that is called, or a bare word."""
    text = re.sub(r"\[[M\d.]+\]", "", text.replace("**", "")).strip()
    if called := re.match(r"(\w+)\(", text):
        return f"{called[1]}()"
    text = text.partition("=")[2] if re.match(r"[^(]*?=", text) else re.sub(r"^\w+:", "", text)
    found = re.match(r"\s*(\[.*?\]|'[^']*'|\"[^\"]*\"|[\w.]+)", text)
    assert found is not None, f"no value in {text!r}"
    try:
        return ast.literal_eval(found[1])
    except ValueError:
        return found[1]


def parse_call(text: str) -> Fields:
    """The parameters of a signature written as Python."""
    (function,) = ast.parse(f"def f{text}: ...").body
    assert isinstance(function, ast.FunctionDef)
    names = [each.arg for each in function.args.args]
    values: list[Any] = [ast.literal_eval(each) for each in function.args.defaults]
    return dict(zip(names, [...] * (len(names) - len(values)) + values, strict=True))


def list_parts(text: str) -> Iterator[str]:
    """What stands in backticks, split at commas that are in no bracket."""
    for span in re.findall(r"`([^`]+)`", text):
        depth, part = 0, ""
        for character in f"{span},":
            depth += (character in "([{") - (character in ")]}")
            if character == "," and depth == 0:
                yield part.strip()
                part = ""
            else:
                part += character


def parse_listed(text: str) -> Fields:
    """`name: type = default` or `name=default` or a bare `name`, in backticks."""
    fields = {}
    for part in list_parts(text):
        found = re.match(r"(\w+)\s*(?::[^=]*)?(=.*)?$", part, re.DOTALL)
        assert found is not None, f"no field: {part!r}"
        fields[found[1]] = UNSAID if found[2] is None else parse_value(found[2])
    return fields


def parse_table(text: str) -> Fields:
    """Rows of `| names | type = default | note |`; several names share a cell, and their defaults the next one."""
    fields = {}
    for row in text.replace("\\|", "¦").splitlines():
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        if len(cells) < 3 or not re.match(r"[a-z]\w+", cells[0]):
            continue
        by = "/" if "/" in cells[0] else ","
        names = [name.strip() for name in cells[0].split(by)]
        values = cells[1].split(by) if cells[1].count(by) == len(names) - 1 else [cells[1]] * len(names)
        for name, value in zip(names, values, strict=True):
            if beside := re.fullmatch(r"(\w+) \((\w+)\)", name):
                fields[beside[1]] = parse_value(beside[2])
            elif name != "field":
                fields[name] = ... if "required" in value else parse_value(value)
    return fields


def read_facts() -> dict[str, Fields]:
    sampling = read_section("## 2. SamplingParams", "\n* ")
    rows = [row.split("|")[2] for row in sampling.replace("\\|", "¦").splitlines() if row.startswith("| ")]
    calls = read_section("### 4.2")
    guided = re.search(r"GuidedDecodingParams\(([^)]*)\)", sampling)
    init = re.search(r"`LLM.__init__(\(.*?\))`", FACTS.read_text())
    submit = re.search(r"LLM.generate_async(\(.*?\)) ->", FACTS.read_text(), re.DOTALL)
    assert guided is not None
    assert init is not None
    assert submit is not None
    return {
        "LLM.__init__": parse_call(init[1]),
        "LLM.generate_async": parse_call(re.sub(r": \w+(?=[,=)])", "", submit[1])),
        "TorchLlmArgs": parse_table(read_section("### 1.1", "\n`kv_cache_free")),
        "KvCacheConfig": parse_listed(read_section("### 1.2 KvCacheConfig")),
        "MoeConfig": parse_listed(read_section("### 1.3 MoeConfig", "\nNVFP4")),
        "CudaGraphConfig": parse_listed(read_section("### 1.4 CudaGraphConfig", "Generated")),
        "SchedulerConfig": parse_listed(read_section("### 1.5 SchedulerConfig")),
        "AttentionDpConfig": parse_call(calls.partition("AttentionDpConfig")[2].partition("`")[0]),
        "MTPDecodingConfig": parse_listed(read_section("\nMTPDecodingConfig:", "\n*")),
        "SamplingParams": parse_listed("\n".join(rows)),
        "GuidedDecodingParams": dict.fromkeys(guided[1].split(","), UNSAID),
        "SchedulingParams": parse_call(calls.partition("SchedulingParams")[2].partition("`")[0]),
        "CompletionOutput": parse_listed(read_section("* CompletionOutput:", "; props")),
        "Nvfp4GemmConfig": {
            "allowed_backends": ast.literal_eval(FACTS.read_text().partition("allowed_backends=")[2].partition(")")[0])
        },
    }


@needs_facts
@pytest.mark.parametrize("name", SIGNATURES)
def test_the_signatures_are_those_of_the_facts_sheet(name: str) -> None:
    """Every name, in both directions, and every default that the sheet gives."""
    said, ours = read_facts()[name], SIGNATURES[name]
    assert said.keys() == ours.keys()
    assert {field: value for field, value in said.items() if value != UNSAID} == {
        field: value for field, value in ours.items() if said[field] != UNSAID
    }


@needs_facts
def test_a_result_has_the_facts_attributes() -> None:
    said = read_section("* RequestOutput:", "**No `.error`")
    said = re.sub(r"\([^)]*\)", "", said)
    names = {re.split(r"\W", part)[0] for part in list_parts(said)}
    assert {"request_id", "prompt_token_ids", "outputs", "finished", "cached_tokens", "metrics_dict"} <= names
    result = RequestOutput(None, 1, None, [1], SamplingParams())
    assert [name for name in sorted(names) if not hasattr(result, name)] == []
    assert not hasattr(result, "error")


# ---- how it behaves


def test_what_we_pass_by_default_is_taken() -> None:
    section = TensorRTLLMEngineSpec(kind="tensorrt_llm")
    made = make_llm_kwargs(ModelSpec(path="nvidia/DeepSeek-V3.2-NVFP4", max_model_len=72_192), section, "1.2.1")
    args = TorchLlmArgs(**made)
    assert (args.tensor_parallel_size, args.speculative_config, args.max_seq_len) == (8, None, 72_192)


def test_it_is_strict_with_names() -> None:
    with pytest.raises(ValueError, match="got invalid argument: no_such"):
        LLM(MODEL, no_such=1)
    with pytest.raises(ValidationError, match="no_such"):
        TorchLlmArgs(model=MODEL, kv_cache_config={"no_such": 1})
    with pytest.raises(TypeError):
        SamplingParams(no_such=1)


def test_it_is_greedy_and_brief_unless_told_otherwise() -> None:
    plain = SamplingParams()
    assert (plain.max_tokens, plain._greedy_decoding) == (32, True)
    assert not SamplingParams(temperature=1.0, top_p=0.95)._greedy_decoding
    assert SamplingParams(temperature=0.0, top_p=0.95)._greedy_decoding


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return create_stand_in(tmp_path, monkeypatch)


def test_its_bad_habits(stand_in: StandIn) -> None:
    llm = LLM(MODEL, tensor_parallel_size=2, max_num_tokens=100, max_seq_len=40)
    try:
        with pytest.raises(RequestError, match="should not exceed max_num_tokens"):
            llm.generate_async([40] * 101)
        with pytest.raises(RequestError, match="must be greater than 0"):
            llm.generate_async([40] * 40).result()
        clipped = llm.generate_async([40] * 30, SamplingParams(max_tokens=1000, ignore_eos=True)).result()
        assert (len(clipped.outputs[0].token_ids), clipped.outputs[0].finish_reason) == (10, "length")
        stand_in.control(empty_answers=1)
        empty = llm.generate_async([40]).result().outputs[0]
        assert (empty.token_ids, empty.finish_reason) == ([], "stop")
        stand_in.control(die=1)
        wait_until(lambda: len(stand_in.list_held()) == 1, "a rank dies without a word")
        waiting = llm.generate_async(
            [40], scheduling_params=SchedulingParams(attention_dp_rank=0, attention_dp_relax=False)
        )
        waiter = threading.Thread(target=waiting.result, kwargs={"timeout": 0.01}, daemon=True)
        waiter.start()
        waiter.join(0.3)
        assert waiter.is_alive(), "the timeout is ignored"
        assert llm._check_health(), "and nobody says that anything is wrong"
    finally:
        llm.shutdown()
    stand_in.check_nothing_left()
