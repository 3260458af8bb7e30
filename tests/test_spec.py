"""What a spec says, what it refuses and in which words, and what of it makes the data."""

import datetime
import json
import traceback
from pathlib import Path
from typing import Any

import pytest
import yaml
from makers import make_job_spec, make_tree
from pydantic import BaseModel, ValidationError

from batchgen.errors import InputError, SpecError
from batchgen.spec import YOUNGER, JobSpec
from batchgen.specs.engine import SimulatedEngineSpec, TransformersEngineSpec
from batchgen.specs.load import _members, describe, list_field_names, load_spec, make_spec, parse_spec

TEXT = """
input: {paths: /data/in.parquet}
prompt: {column: prompt}
engine: {kind: simulated}
output: {path: /data/out}
"""


def refusal(**sections: Any) -> str:
    with pytest.raises(SpecError) as error:
        make_job_spec(**sections)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- what it is


def test_a_spec_is_frozen_with_defaults_and_one_path_is_a_list_of_one() -> None:
    spec = parse_spec(TEXT)
    assert spec.input.paths == ("/data/in.parquet",)
    assert (spec.sampling.temperature, spec.sampling.top_p, spec.sampling.n) == (1.0, 0.95, 1)
    assert spec.model.path == "embedded"
    for section in (spec, spec.input, spec.engine, spec.cluster.workers):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, next(iter(type(section).model_fields)), None)


def test_a_resolved_spec_reads_back_as_itself() -> None:
    spec = make_job_spec(sampling={"stop": ["a", "b"], "seed": 3}, input={"paths": ["/a", "s3://b/c"]})
    assert make_spec(json.loads(spec.model_dump_json())) == spec


def list_models(model: type[BaseModel]) -> list[type[BaseModel]]:
    found = [member for field in model.model_fields.values() for member in _members(field.annotation)]
    return [model, *(deeper for member in found for deeper in list_models(member))]


@pytest.mark.parametrize("model", list_models(JobSpec), ids=lambda model: model.__name__)
def test_every_section_refuses_unknown_fields_and_every_field_is_described(model: type[BaseModel]) -> None:
    assert model.__doc__
    assert model.model_config["extra"] == "forbid"
    assert model.model_config["frozen"]
    for name, field in model.model_fields.items():
        is_section = bool(list(_members(field.annotation)))  # said by its own docstring
        if not is_section and name != "kind":
            assert field.description, f"{model.__name__}.{name} has no description"


def test_the_json_schema_knows_every_section_and_tells_engines_apart_by_kind() -> None:
    schema = JobSpec.model_json_schema()
    assert set(schema["properties"]) == set(JobSpec.model_fields)
    assert schema["required"] == ["input", "prompt", "engine", "output"]
    assert schema["additionalProperties"] is False
    kinds = {"simulated", "transformers", "openai", "tensorrt_llm"}
    assert set(schema["properties"]["engine"]["discriminator"]["mapping"]) == kinds
    json.dumps(schema)


# ---- what it refuses


def openai(**fields: Any) -> dict[str, Any]:
    return {"engine": {"kind": "openai", "base_urls": "http://node:8000/v1", **fields}}


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"engin": {}}, "spec: engin: unknown field; did you mean 'engine'?"),
        ({"sampling": {"temprature": 1}}, "spec: sampling.temprature: unknown field; did you mean 'temperature'?"),
        ({"cluster": {"workers": {"maxx": 2}}}, "spec: cluster.workers.maxx: unknown field; did you mean 'max'?"),
        ({"engine": {"kind": "simulated", "slot": 3}}, "spec: engine.slot: unknown field; did you mean 'slots'?"),
        (
            {"engine": {"kind": "transformers", "num_thread": 3}},
            "spec: engine.num_thread: unknown field; did you mean 'num_threads'?",
        ),
        ({"input": {"paths": "a", "zzz": 1}}, "spec: input.zzz: unknown field; known here: check_unique, custom_id, "),
        ({"prompt": {}}, "give exactly one of column, messages, prompt_token_ids, template; found none"),
        ({"prompt": {"column": "a", "template": "{b}"}}, "found column and template"),
        ({"prompt": {"column": "a", "messages": ""}}, "found column and messages"),
        ({"prompt": {"messages": "m", "system": "s"}}, "system goes with a chat column or template"),
        ({"prompt": {"column": "c", "chat": False, "system": "s"}}, "system goes with a chat column or template"),
        ({"prompt": {"column": ["a"]}}, "spec: prompt.column: Input should be a valid string"),
        ({"engine": {"max_inflight": 3}}, "spec: engine: Unable to extract tag using discriminator 'kind'"),
        ({"engine": {"kind": "simulatd"}}, "spec: engine: unknown kind 'simulatd'; did you mean 'simulated'?"),
        ({"engine": {"kind": "openai"}}, "spec: engine.base_urls: is required; add it"),
        (openai(base_urls=[]), "spec: engine.base_urls: "),
        (
            openai(base_urls="node:8000"),
            "spec: engine.base_urls: each must be a URL; write it as in http://host:8000/v1",
        ),
        (
            openai(base_urls="http://me:pass@node/v1"),
            "engine.base_urls: no user, password or query belongs in a base URL",
        ),
        (
            openai(base_urls="http://node/v1?key=x"),
            "engine.base_urls: no user, password or query belongs in a base URL",
        ),
        (openai(base_urls=["http://a", "http://a"]), "engine.base_urls: names a server twice"),
        (openai(extra_body={"messages": []}), "engine.extra_body: messages is not for extra_body"),
        (openai(send_token_ids=True), "engine: send_token_ids needs api: completions"),
        (openai(extra_bod={}), "engine.extra_bod: unknown field; did you mean 'extra_body'?"),
        ({"engine": {"kind": "zzz"}}, "unknown kind 'zzz'; known here: simulated, transformers, openai"),
        ({"sampling": {"temperature": float("nan")}}, "spec: sampling.temperature: "),
        ({"sampling": {"top_p": 0}}, "spec: sampling.top_p: Input should be greater than 0"),
        ({"sampling": {"n": 0}}, "spec: sampling.n: "),
        ({"sampling": {"seed": 2**63}}, "spec: sampling.seed: "),
        ({"sampling": {"stop": [""]}}, "spec: sampling.stop.0: "),
        ({"cluster": {"workers": {"min": 3, "max": 2}}}, "spec: cluster.workers: min (3) is above max (2)"),
        ({"input": {"paths": []}}, "spec: input.paths: "),
        ({"input": {"paths": "a", "limit": 0}}, "spec: input.limit: "),
        ({"sampling": None}, "spec: sampling: Input should be a valid dictionary"),
        ({"model": {"revision": "v2"}}, "spec: model: revision goes with a hub id; leave it out"),
        ({"model": {"path": "/models/m", "revision": "v2"}}, "spec: model: revision goes with a hub id; leave it out"),
        ({"prompt": {"column": "c", "chat": False, "tools": "t"}}, "spec: prompt: tools go with chat prompts"),
        ({"prompt": {"prompt_token_ids": "c", "tools": "t"}}, "spec: prompt: tools go with chat prompts"),
        (
            {"sampling": {"guided": {}}},
            "sampling.guided: give exactly one of json_schema, regex, grammar; found none",
        ),
        ({"sampling": {"guided": {"regex": "a", "grammar": "b"}}}, "found regex and grammar"),
        ({"sampling": {"guided": {"regexp": "a"}}}, "sampling.guided.regexp: unknown field; did you mean 'regex'?"),
        ({"sampling": {"guided": {"regex": ""}}}, "spec: sampling.guided.regex: "),
        *(
            ({"sampling": {"guided": {"json_schema": schema}}}, f"spec: sampling.guided.json_schema: {sentence}")
            for schema, sentence in [
                (3, "must be a JSON Schema object"),
                ("[1]", "must be a JSON Schema object"),
                ("{", "is not JSON; write a JSON Schema"),
                ({"enum": [float("nan")]}, "is not JSON; write a JSON Schema"),
                ({"const": "\ud800"}, "is not JSON; write a JSON Schema"),
                ({"const": datetime.date(2026, 1, 2)}, "is not JSON; write a JSON Schema"),
                ({"type": "strin"}, "is no valid JSON Schema: what stands under 'type' is wrong"),
                ({"properties": {"a": {"minimum": "x"}}}, "is no valid JSON Schema: what stands under 'minimum' is"),
                ({"$schema": "http://json-schema.org/draft-04/schema#", "required": []}, "is no valid JSON Schema: "),
            ]
        ),
        ({"cluster": {"placement": "PACK"}}, "spec: cluster.placement: Input should be 'SPREAD' or 'DEFAULT'"),
    ],
)
def test_a_wrong_field_is_refused_in_one_sentence(sections: dict[str, Any], sentence: str) -> None:
    assert sentence in refusal(**sections)


@pytest.mark.parametrize(
    "url",
    [
        "https://host/in.parquet?X-Amz-Algorithm=AWS4&X-Amz-Credential=hunter2/2026/s3&X-Amz-Signature=hunter2",
        "http://host/in.parquet?raw=hunter2",
        "simplecache::https://host/in.parquet?hunter2",
        "abfs://container@account/in?sv=2024&st=2026-01-01&sr=c&sig=hunter2",
        "gs://bucket/in?GoogleAccessId=x&Signature=hunter2",
        "s3://bucket/in?AWSAccessKeyId=hunter2&Expires=1",
        "s3://bucket/in?a=1&access_token=hunter2",
        "s3://name:hunter2@bucket/in",
    ],
)
def test_a_url_with_a_secret_never_enters_a_spec(url: str) -> None:
    """Nor the sentence that refuses it, nor the traceback of --debug."""
    for sections, field in (
        ({"input": {"paths": url}}, "input.paths.0"),
        ({"input": {"paths": ["/a", url]}}, "input.paths.1"),
        ({"output": {"path": url}}, "output.path"),
        ({"output": {"path": "/o", "lock_url": url}}, "output.lock_url"),
    ):
        with pytest.raises(SpecError) as error:
            make_job_spec(**sections)
        assert str(error.value).startswith(f"spec: {field}: has a ")
        assert "; leave credentials to the environment" in str(error.value)
        assert "hunter2" not in "".join(traceback.format_exception(error.value))


@pytest.mark.parametrize(
    "url",
    ["s3://bucket/part-?.parquet", "s3://bucket/day=?/part-??.parquet", "s3://bucket/token=1/?.parquet",
     "s3://bucket/?/secret=a&b", "gs://b/a?b&c", "/data/in?sig=1&token=2", "https://host/in.parquet", "s3://a/b#c%3F"],
)  # fmt: skip
def test_a_question_mark_may_be_a_wildcard_or_a_character(url: str) -> None:
    assert make_job_spec(input={"paths": url}).input.paths == (url,)


def test_a_revision_goes_with_a_hub_id_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert make_job_spec(model={"path": "org/name", "revision": "v2"}).model.revision == "v2"
    (tmp_path / "org/name").mkdir(parents=True)
    assert refusal(model={"path": "org/name", "revision": "v2"}) == (
        "model.revision: goes with a hub id, and org/name is a folder here; leave it out"
    )


def test_an_unknown_engine_field_is_compared_with_that_engines_own_fields_only() -> None:
    assert "num_threads" in TransformersEngineSpec.model_fields
    assert "num_threads" not in SimulatedEngineSpec.model_fields
    sentence = refusal(engine={"kind": "simulated", "num_threads": 1})
    assert "engine.num_threads: unknown field" in sentence
    assert "did you mean 'num_threads'" not in sentence
    names = list_field_names(["engine"], ["engine", "transformers", "x"])
    assert sorted(names) == sorted(TransformersEngineSpec.model_fields)


def test_a_misspelt_required_field_is_named_before_the_missing_one() -> None:
    assert "output.pth: unknown field; did you mean 'path'? (and 1 more)" in refusal(output={"pth": "/o"})


def test_missing_sections_are_counted() -> None:
    with pytest.raises(
        SpecError, match=r"^here: input: is required; add it, e.g. input: {paths: prompts.parquet} \(and 3 more\)$"
    ):
        make_spec({}, source="here")


def test_an_output_in_rays_copy_of_the_working_directory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "session" / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    assert "give a full path or a URL" in refusal(output={"path": "out"})
    assert make_job_spec(output={"path": "/out"}).output.path == "/out"


def test_no_sentence_quotes_the_value() -> None:
    sentence = refusal(prompt={"column": "c", "system": ["my secret prompt"]})
    assert "secret" not in sentence
    with pytest.raises(ValidationError) as error:
        JobSpec.model_validate(make_tree(prompt={"column": ["my secret prompt"]}))
    assert "secret" not in describe(error.value)


def test_a_lone_surrogate_is_refused_before_it_kills_a_worker() -> None:
    sentence = refusal(prompt={"template": "\ud800 {a}"})
    assert "half of a surrogate pair" in sentence
    sentence.encode()


# ---- YAML and overrides


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("input: {paths: a\nprompt: [", "job.yaml line 2: not valid YAML"),
        ("a: b: c", "job.yaml line 1: not valid YAML"),
        ("a:\n  - b\n c: d", "job.yaml line 3: not valid YAML"),
        ("a: \0", "job.yaml: not valid YAML"),
        ("a: 2024-13-45", "job.yaml: not valid YAML"),
        ("a: !!python/object:os.system x", "job.yaml line 1: not valid YAML"),
        ("", "must be a mapping"),
        ("- a", "must be a mapping"),
        ("just text", "must be a mapping"),
    ],
)
def test_a_file_that_is_no_spec_is_refused_with_its_line(text: str, where: str) -> None:
    with pytest.raises(SpecError) as error:
        parse_spec(text, source="job.yaml")
    assert where in str(error.value)


@pytest.mark.parametrize(
    ("override", "section", "field", "value"),
    [
        ("sampling.temperature=0.5", "sampling", "temperature", 0.5),
        ("sampling.temperature=1e-3", "sampling", "temperature", 0.001),
        ("sampling.stop=['a', 'b=c']", "sampling", "stop", ("a", "b=c")),
        ("sampling.seed=", "sampling", "seed", None),
        ("engine.slots=3", "engine", "slots", 3),
        (" output.token_ids =true", "output", "token_ids", True),
        ("prompt.column='yes'", "prompt", "column", "yes"),
    ],
)
def test_an_override_is_read_as_yaml(override: str, section: str, field: str, value: object) -> None:
    assert getattr(getattr(parse_spec(TEXT, [override]), section), field) == value


def test_overrides_go_deep_and_the_last_one_wins() -> None:
    spec = parse_spec(TEXT, ["cluster.workers.max=3", "cluster.workers.max=5"])
    assert spec.cluster.workers.max == 5


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("sampling.temperature", "write section.key=value"),
        ("=3", "write section.key=value"),
        ("input.paths.x=3", "paths is not a section"),
        ("sampling.stop=[", "the value is not valid YAML; quote it"),
        ("sampling.seed=2024-13-45", "the value is not valid YAML; quote it"),
        ("sampling.sed=3", "did you mean 'seed'?"),
    ],
)
def test_a_wrong_override_is_refused(override: str, sentence: str) -> None:
    with pytest.raises(SpecError) as error:
        parse_spec(TEXT, [override])
    assert sentence in str(error.value)


def test_local_paths_become_absolute_and_urls_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    spec = make_job_spec(
        input={"paths": ["in/*.parquet", "s3://bucket/x", "/abs"], "reuse_from": ["earlier", "s3://bucket/e"]},
        output={"path": "out", "lock_url": "lock"},
        engine={"kind": "simulated", "call_log": "calls"},
        model={"path": "model"},
    )
    assert spec.input.paths == (f"{tmp_path}/in/*.parquet", "s3://bucket/x", "/abs")
    assert spec.input.reuse_from == (f"{tmp_path}/earlier", "s3://bucket/e"), "workers read it"
    assert (spec.output.path, spec.output.lock_url) == (f"{tmp_path}/out", f"{tmp_path}/lock")
    assert isinstance(spec.engine, SimulatedEngineSpec)
    assert spec.engine.call_log == f"{tmp_path}/calls"
    assert spec.model.path == f"{tmp_path}/model"
    assert make_job_spec(output={"path": "x/../out/"}).output.path == f"{tmp_path}/out", "one spelling for each place"
    assert make_job_spec(model={"path": "org/name"}).model.path == "org/name"
    assert make_job_spec(output={"path": "s3://b/o", "lock_url": "s3://b/l"}).output.lock_url == "s3://b/l"


def test_a_spec_is_loaded_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(TEXT)
    assert load_spec(str(path), ["sampling.n=2"]).sampling.n == 2
    with pytest.raises(InputError):
        load_spec(str(tmp_path / "none.yaml"))
    path.write_text(TEXT + "\nsampling: {n: x}")
    with pytest.raises(SpecError, match=f"{path}: sampling.n: "):
        load_spec(str(path))
    path.write_text(json.dumps(yaml.safe_load(TEXT)))
    assert load_spec(str(path)) == parse_spec(TEXT)


# ---- the fingerprint

SAME = [
    {"output": {"path": "/elsewhere", "rows_per_shard": 3, "compression_level": 9, "journal_interval_s": 1}},
    {"output": {"path": "/data/out", "lock_url": "/lock"}},
    {"engine": {"kind": "simulated", "max_inflight": 3, "slots": 2, "mean_tokens": 5, "failure_rate": 0.5}},
    {"cluster": {"pool": "inline", "workers": {"min": 2, "max": 7}, "gpus_per_worker": 8}},
    {"retry": {"max_attempts": 9, "errors": "all", "max_error_rate": 0.5}},
    {"input": {"paths": ["/data/in.parquet"], "limit": 5, "check_unique": "never"}},
    {"sampling": {"temperature": 1, "top_p": 0.95}},
]
OTHER = [
    {"input": {"paths": ["/data/other.parquet"]}},
    {"input": {"paths": ["/data/in.parquet", "/data/other.parquet"]}},
    {"input": {"paths": ["/data/in.parquet"], "custom_id": "key"}},
    {"input": {"paths": ["/data/in.parquet"], "passthrough": ["a"]}},
    {"input": {"paths": ["/data/in.parquet"], "passthrough": ["b"]}},
    {"prompt": {"column": "other"}},
    {"prompt": {"template": "{prompt}"}},
    {"prompt": {"messages": "prompt"}},
    {"prompt": {"prompt_token_ids": "prompt"}},
    {"prompt": {"column": "prompt", "chat": False}},
    {"prompt": {"column": "prompt", "system": "Be brief."}},
    {"prompt": {"column": "prompt", "sampling": "s"}},
    {"prompt": {"column": "prompt", "tools": "t"}},
    {"prompt": {"column": "prompt", "on_overflow": "truncate_left"}},
    {"model": {"path": "org/model"}},
    {"model": {"path": "org/model", "revision": "v2"}},
    {"model": {"max_model_len": 100}},
    {"engine": {"kind": "transformers"}},
    openai(),
    openai(model="m"),
    openai(api="completions"),
    openai(api="completions", send_token_ids=True),
    openai(extra_body={"tools": []}),
    {"output": {"path": "/data/out", "token_ids": True}},
    *(
        {"sampling": {name: value}}
        for name, value in {
            "temperature": 0.5, "top_p": 0.5, "max_tokens": 9, "top_k": 5, "min_p": 0.1, "n": 2, "seed": 0,
            "stop": ["x"], "stop_token_ids": [1], "presence_penalty": 1, "frequency_penalty": 1,
            "repetition_penalty": 1.5, "logprobs": 0, "thinking": True, "guided": {"regex": "a"},
        }.items()
    ),
]  # fmt: skip


def test_the_fingerprint_covers_what_makes_the_data_and_nothing_else() -> None:
    plain = make_job_spec().fingerprint()
    assert len(plain) == 32
    assert int(plain, 16)
    assert [sections for sections in SAME if make_job_spec(**sections).fingerprint() != plain] == []
    others = [make_job_spec(**sections).fingerprint() for sections in OTHER]
    assert len({plain, *others}) == len(others) + 1


def test_a_schema_is_the_same_however_it_is_written() -> None:
    schema = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"enum": ["é", None]}}}
    made = [make_job_spec(sampling={"guided": {"json_schema": form}}) for form in (schema, json.dumps(schema))]
    assert made[0].sampling.guided is not None
    text = made[0].sampling.guided.json_schema
    assert text == '{"type":"object","properties":{"b":{"type":"string"},"a":{"enum":["é",null]}}}'
    assert made[0].fingerprint() == made[1].fingerprint()
    assert make_spec(json.loads(made[0].model_dump_json())) == made[0]


def test_an_engines_address_and_tuning_make_no_data() -> None:
    plain = make_job_spec(**openai()).fingerprint()
    tuned = openai(base_urls=["http://a/", "http://b"], max_inflight=1, api_key_env="K", give_up_s=1, measure_ttft=True)
    assert make_job_spec(**tuned).fingerprint() == plain


def test_the_fingerprint_names_every_sampling_and_prompt_field() -> None:
    """A field that is added later counts unless somebody decides otherwise."""
    fields = make_job_spec().fingerprint_fields()
    spec = make_job_spec()
    for section in ("prompt", "sampling", "model"):
        assert set(fields[section]) == set(type(getattr(spec, section)).model_fields) - YOUNGER - {"stage_dir"}
    tried = {name for sections in OTHER for name in sections.get("sampling", {})}
    assert tried == set(type(spec.sampling).model_fields)


def test_the_fingerprint_is_the_same_in_every_release() -> None:
    """A changed value would orphan every output folder there is: raise FINGERPRINT_VERSION only on purpose."""
    assert make_job_spec().fingerprint() == "58c78d9eaf6b1f1fdd0ed7c49a758ada"
    spec = make_job_spec(
        input={"paths": ["/data/in.parquet"], "custom_id": "id"},
        prompt={"messages": "m", "sampling": "s"},
        model={"path": "org/model"},
        sampling={"n": 2, "seed": 7, "stop": ["x"], "thinking": True},
        **openai(base_urls="http://a/v1", extra_body={"tools": [{}]}),
    )
    assert spec.fingerprint() == "c354dc1b670de47d99cd4546b5868630"
