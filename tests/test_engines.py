"""The table of engines, entry points included, and what it refuses before any engine is made."""

from importlib.metadata import EntryPoint
from typing import Any

import pytest
from makers import make_job_spec

from batchgen.engines import ENGINES, check_supported, create_engine, create_tokenizer, get_engine_kind, list_refused
from batchgen.engines.base import Capabilities, EngineKind
from batchgen.errors import SpecError
from batchgen.specs import engine as engine_specs
from batchgen.specs.engine import BUILT_IN, SimulatedEngineSpec
from batchgen.specs.sections import EngineSection


def openai(**fields: Any) -> dict[str, Any]:
    return {"kind": "openai", "base_urls": "http://node:8000/v1", **fields}


COMPLETIONS, IDS = openai(api="completions"), openai(api="completions", send_token_ids=True)
BARE = {"column": "c", "chat": False}


def test_every_built_in_kind_is_in_the_table_with_its_section() -> None:
    assert {kind: line.spec for kind, line in ENGINES.items()} == BUILT_IN
    for kind, section in BUILT_IN.items():
        assert section.model_fields["kind"].annotation.__args__ == (kind,)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("prompt", "engine"),
    [
        ({"column": "c"}, openai()),
        ({"messages": "c"}, openai()),
        (BARE, COMPLETIONS),
        ({"prompt_token_ids": "c"}, COMPLETIONS),
        ({"column": "c"}, IDS),
        ({"column": "c", "on_overflow": "truncate_left"}, IDS),
        ({"prompt_token_ids": "c"}, {"kind": "transformers"}),
    ],
)
def test_prompts_that_an_engine_takes(prompt: dict[str, Any], engine: dict[str, Any]) -> None:
    check_supported(make_job_spec(prompt=prompt, engine=engine))


@pytest.mark.parametrize(
    ("prompt", "engine", "sentence"),
    [
        (BARE, openai(), "prompt: the engine 'openai' can't be sent it; prompt.chat: false makes bare text"),
        ({"prompt_token_ids": "c"}, openai(), "prompt_token_ids needs engine.api: completions"),
        ({"column": "c"}, COMPLETIONS, "chat prompts need engine.api: chat, or a tokenizer here"),
        (
            {"column": "c", "on_overflow": "truncate_left"},
            openai(),
            "prompt.on_overflow: the engine 'openai' counts no",
        ),
    ],
)
def test_prompts_that_it_can_not_be_sent(prompt: dict[str, Any], engine: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SpecError, match=sentence):
        check_supported(make_job_spec(prompt=prompt, engine=engine))


TOOLS = {"column": "c", "tools": "t"}


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        (
            {"engine": {"kind": "simulated"}, "sampling": {"guided": {"regex": "a"}}},
            r"sampling\.guided: the engine 'simu",
        ),
        (
            {"engine": openai(), "sampling": {"guided": {"regex": "a"}}},
            r"guided\.regex: .* 'openai' takes json_schema; ",
        ),
        ({"engine": openai(), "sampling": {"guided": {"grammar": "a"}}}, r"goes into engine\.extra_body"),
        (
            {"engine": openai(extra_body={"response_format": {}}), "sampling": {"guided": {"json_schema": {}}}},
            "takes none of them beside its own response_format",
        ),
        ({"engine": openai(extra_body={"tools": [{}]}), "prompt": TOOLS}, r"prompt\.tools: the engine's section gives"),
    ],
)
def test_guides_and_tools_that_it_can_not_be_sent(sections: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SpecError, match=sentence):
        check_supported(make_job_spec(**{"prompt": {"column": "c"}, **sections}))


@pytest.mark.parametrize("extra_body", [{}, {"structured_outputs": {"regex": "a"}}])
def test_guides_and_tools_that_it_takes(extra_body: dict[str, Any]) -> None:
    guided = {"guided": {"json_schema": {"type": "object"}}}
    check_supported(make_job_spec(engine=openai(extra_body=extra_body), prompt=TOOLS, sampling=guided))


@pytest.mark.parametrize(
    ("engine", "cluster", "sentence"),
    [
        (
            {"kind": "tensorrt_llm", "start_timeout_s": 9000},
            {},
            "start_timeout_s: 7200 is too short, .* start for 9000 s",
        ),
        (
            {"kind": "tensorrt_llm"},
            {"stall_timeout_s": 5820},
            "stall_timeout_s: 5820 is too short, .* silent for 5820 s",
        ),
        (openai(open_timeout_s=100), {"start_timeout_s": 90}, "start_timeout_s: 90 is too short"),
        (openai(give_up_s=10_000), {}, "stall_timeout_s: 7200 is too short, .* silent for 10000 s"),
    ],
)
def test_the_driver_is_more_patient_than_its_engine(
    engine: dict[str, Any], cluster: dict[str, Any], sentence: str
) -> None:
    """Else it would give up a worker whose engine is starting, or mending itself."""
    check_supported(make_job_spec(engine=openai() if engine["kind"] == "openai" else {"kind": engine["kind"]}))
    with pytest.raises(SpecError, match=sentence):
        check_supported(make_job_spec(engine=engine, cluster=cluster))


def test_a_worker_reserves_the_gpus_of_its_engine() -> None:
    """Else the node is taken first, and then found to have too few."""
    for num_gpus in (0, 8):
        check_supported(make_job_spec(engine={"kind": "tensorrt_llm"}, cluster={"gpus_per_worker": num_gpus}))
    with pytest.raises(SpecError, match="gpus_per_worker: 4 are too few, an engine takes 8"):
        check_supported(make_job_spec(engine={"kind": "tensorrt_llm"}, cluster={"gpus_per_worker": 4}))


def test_only_an_engine_with_a_tokenizer_makes_one() -> None:
    assert create_tokenizer(make_job_spec(engine=openai())) is None
    assert create_tokenizer(make_job_spec(engine=IDS)) is not None


# ---- engines of other packages


class OtherSpec(EngineSection):
    kind: str = "other"
    size: int = 1


class OtherEntryPoint(EntryPoint):
    """An installed one whose object lies here."""

    def load(self) -> Any:
        if self.value == "absent":
            raise ModuleNotFoundError("No module named 'vendor'")
        return OTHER if self.value == "right" else object()


def make_nothing(*_: object) -> Any:
    return "an engine"


OTHER = EngineKind(OtherSpec, Capabilities(is_seeded=False, has_logprobs=False, has_sampling=False), make_nothing)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [OtherEntryPoint(name, value, "batchgen.engines") for name, value in INSTALLED.items()]
    monkeypatch.setattr(engine_specs, "entry_points", lambda group: entries if group == "batchgen.engines" else [])


INSTALLED = {"other": "right", "broken": "wrong", "gone": "absent", "simulated": "right"}


@pytest.mark.usefixtures("installed")
def test_an_entry_point_adds_a_kind_and_replaces_none() -> None:
    assert get_engine_kind("other") is OTHER
    assert get_engine_kind("simulated").spec is SimulatedEngineSpec
    assert list_refused(OtherSpec()) == {
        "seed",
        "logprobs",
        "top_k",
        "min_p",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "guided",
    }
    with pytest.raises(SpecError, match=r"'broken' \(wrong of a package\) is no EngineKind"):
        get_engine_kind("broken")


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("kind", "sentence"),
    [("broken", "is no EngineKind"), ("gone", "can't be imported: ModuleNotFoundError: No module named 'vendor'")],
)
def test_a_broken_package_is_refused_when_the_spec_is_made(kind: str, sentence: str) -> None:
    with pytest.raises(SpecError, match=sentence):
        make_job_spec(engine={"kind": kind})


def test_a_kind_that_was_there_when_the_spec_was_made_may_be_missing_on_a_node() -> None:
    with pytest.raises(SpecError, match="'other' is not installed here; install the package"):
        create_engine(make_job_spec().model_copy(update={"engine": OtherSpec()}))


def test_a_field_that_an_engine_cannot_honour_is_told_with_those_that_can() -> None:
    guided = {"guided": {"json_schema": {"type": "object"}}}
    with pytest.raises(SpecError, match=r"^sampling.guided: .* choose another engine \(openai, tensorrt_llm\)$"):
        check_supported(make_job_spec(engine={"kind": "transformers"}, sampling=guided))
