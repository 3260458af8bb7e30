"""What is judged of a node and a checkpoint, line by line, from facts of nodes that no test runs on."""

import dataclasses
import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
from checkpoints import CONFIG, make_files, make_nvfp4_files

from batchgen.errors import EngineDied, SpecError
from batchgen.preflight.checkpoint import CheckpointFacts
from batchgen.preflight.checkpoint_facts import read_checkpoint
from batchgen.preflight.model import (
    check_capacity,
    check_disk,
    check_files,
    check_model,
    check_quantization,
    find_capacity,
    find_kv_token_bytes,
)
from batchgen.preflight.preflight import (
    GIB,
    Check,
    EngineNeeds,
    GpuFacts,
    MpiFacts,
    NodeFacts,
    check_gpus,
    check_machine,
    check_tensorrt_llm,
    check_transformers,
    make_error,
    parse_version,
)

B200 = GpuFacts("NVIDIA B200", (10, 0), 180 * GIB, 179 * GIB)
H100 = GpuFacts("NVIDIA H100 80GB HBM3", (9, 0), 80 * GIB, 79 * GIB)
NODE = NodeFacts(
    python=(3, 12),
    packages={"tensorrt_llm": "1.2.1", "torch": "2.9.1", "transformers": "4.57.3"},
    gpus=(B200,) * 8,
    driver="580.159.04",
    variables=(),
    mpi=MpiFacts("Open MPI v4.1.8", True),
    ram_bytes=2000 * GIB,
    free_ram_bytes=1900 * GIB,
    disk="/nvme",
    free_disk_bytes=3 * 10**12,
)
NEEDS = EngineNeeds(
    num_gpus=8,
    has_attention_dp=True,
    max_batch_size=128,
    max_inflight=1024,
    max_model_len=66_000,
    max_tokens=1024,
    kv_dtype="fp8",
    kv_free_fraction=0.8,
    block_reuse="auto",
    chunked_prefill="auto",
    scheduler_policy="GUARANTEED_NO_EVICT",
    custom_tokenizer="deepseek_v32",
)
# About the real one's: 368 GB of routed experts, 20 GB of all else.
REAL = CheckpointFacts("/model", {}, CONFIG, num_shared_bytes=20 * 10**9, num_expert_bytes=368 * 10**9)


def pick(checks: list[Check], name: str) -> Check:
    (found,) = [check for check in checks if check.name == name]
    return found


def judge(node: dict[str, Any] | None = None, needs: dict[str, Any] | None = None) -> list[Check]:
    return check_tensorrt_llm(dataclasses.replace(NODE, **(node or {})), dataclasses.replace(NEEDS, **(needs or {})))


def read(folder: Path, files: dict[str, bytes]) -> CheckpointFacts:
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return read_checkpoint(str(folder))


def test_a_node_as_it_should_be_has_nothing_to_mend() -> None:
    checks = [*check_machine(NODE), *judge()]
    assert {check.verdict for check in checks} == {"ok"}
    assert {check.mend for check in checks} == {""}
    assert pick(checks, "gpus").what == "8 x NVIDIA B200, sm_100, 180 GiB"
    assert make_error(checks) is None


@pytest.mark.parametrize(
    ("node", "name", "verdict", "what"),
    [
        ({"packages": {}}, "tensorrt_llm", "fail", "not installed"),
        ({"packages": {"tensorrt_llm": "1.2.0rc8"}}, "tensorrt_llm", "warn", "corrupts the KV cache"),
        ({"packages": {"tensorrt_llm": "1.2.1rc1"}}, "tensorrt_llm", "warn", "corrupts the KV cache"),
        ({"packages": {"tensorrt_llm": "1.3.0rc27"}}, "tensorrt_llm", "warn", "Open MPI 5"),
        ({"packages": {"tensorrt_llm": "1.3.0rc2"}}, "tensorrt_llm", "warn", "whether it has 1.2.1's fix"),
        ({"packages": {"tensorrt_llm": "1.3.0"}}, "tensorrt_llm", "ok", "1.3.0"),
        ({"packages": {"tensorrt_llm": "dev"}}, "tensorrt_llm", "warn", "no version"),
        ({"gpus": ()}, "gpus", "fail", "none"),
        ({"gpus": (), "gpu_problem": "NVML says: Driver Not Loaded"}, "gpus", "fail", "Driver Not Loaded"),
        ({"gpus": (B200,) * 4}, "gpus", "fail", "4 x NVIDIA B200, sm_100, 180 GiB where the engine needs 8"),
        ({"gpus": (B200,) * 7 + (H100,)}, "gpu kinds", "warn", "NVIDIA B200, NVIDIA H100"),
        (
            {"gpus": (dataclasses.replace(B200, free_bytes=100 * GIB),) + (B200,) * 7},
            "gpu memory",
            "warn",
            "GPU 0: 80.0 GiB",
        ),
        ({"driver": "565.57"}, "driver", "fail", "does not know Blackwell"),
        ({"driver": "570.172"}, "driver", "warn", "older than CUDA 13"),
        ({"driver": None}, "driver", "warn", "can't be read"),
        ({"mpi": MpiFacts(reason="mpi4py is not installed")}, "mpi", "fail", "mpi4py is not installed"),
        ({"mpi": MpiFacts("Open MPI v5", False, "no answer within 45 s")}, "mpi", "fail", "Open MPI v5 can't spawn"),
        ({"variables": ("SLURM_JOBID",)}, "launcher", "warn", "SLURM_JOBID"),
    ],
)
def test_each_fault_of_a_node_is_told_with_a_mend(node: dict[str, Any], name: str, verdict: str, what: str) -> None:
    check = pick(judge(node), name)
    assert check.verdict == verdict
    assert what in check.what
    assert bool(check.mend) == (verdict != "ok")
    others = [other for other in judge(node) if other.name != name]
    assert all(other.verdict == "ok" for other in others)


def test_old_versions_fail_only_where_the_spec_turns_on_what_corrupts() -> None:
    old = {"packages": {"tensorrt_llm": "1.2.0"}}
    for switches, verdict in ((("on", "on"), "fail"), (("on", "auto"), "warn"), (("off", "on"), "warn")):
        needs = dict(zip(("block_reuse", "chunked_prefill"), switches, strict=True))
        assert pick(judge(old, needs), "tensorrt_llm").verdict == verdict


@pytest.mark.parametrize(
    ("older", "newer"),
    [("1.2.0rc8", "1.2.0"), ("1.2.0", "1.2.1"), ("1.3.0rc9", "1.3.0rc27"), ("1.3.0b1", "1.3.0rc1"), ("1.9.9", "1.10")],
)
def test_versions_are_ordered(older: str, newer: str) -> None:
    assert (parse_version(older) or ()) < (parse_version(newer) or ())
    assert parse_version("1.2.1.post1") == parse_version("1.2.1+cu130") == parse_version("1.2.1")


def test_the_first_failure_is_raised_as_what_helps() -> None:
    spec_fault = Check("a", "fail", "is wrong", "change it", is_spec=True)
    node_fault = Check("b", "fail", "is absent")
    found = make_error([Check("ok", "ok", ""), Check("warn", "warn", ""), spec_fault, node_fault])
    assert (type(found), str(found)) == (SpecError, "a: is wrong; change it")
    other = make_error([node_fault, spec_fault])
    assert (type(other), str(other)) == (EngineDied, "this node can't carry the engine: b: is absent")
    assert str(pickle.loads(pickle.dumps(other))) == str(other)


def test_a_node_without_gpus_is_fine_for_who_needs_none() -> None:
    bare = dataclasses.replace(NODE, gpus=(), driver=None, gpu_problem="no driver")
    assert [check.verdict for check in check_gpus(bare, 0)] == ["ok"]
    assert {check.verdict for check in check_transformers(bare, "auto")} == {"ok"}
    assert pick(check_transformers(bare, "cuda"), "device").verdict == "fail"
    assert pick(check_transformers(NODE, "cuda:7"), "device").verdict == "ok"
    assert pick(check_transformers(NODE, "cuda:8"), "device").is_spec
    no_torch = dataclasses.replace(bare, packages={"transformers": "5"})
    assert "pip install 'batchgen[local]'" in pick(check_transformers(no_torch, "auto"), "torch").mend


# ---- the checkpoint


def test_a_whole_nvfp4_checkpoint(tmp_path: Path) -> None:
    found = read(tmp_path, make_nvfp4_files())
    checks = check_model(found, NEEDS, NODE)
    assert {check.name: check.verdict for check in checks if check.verdict != "ok"} == {}
    assert pick(checks, "quantisation").what == "NVFP4, KV cache FP8"
    assert pick(checks, "architecture").what == "DeepseekV32ForCausalLM"
    assert found.packed == {"model.layers.0.self_attn.o_proj"} | {
        f"model.layers.0.mlp.experts.N.{name}" for name in ("gate_proj", "up_proj", "down_proj")
    }
    assert (found.num_expert_bytes, found.num_shared_bytes) == (6 * 1133, 8000 + 1133 + 400)


@pytest.mark.parametrize(
    ("change", "name", "what"),
    [
        ({"config.json": None}, "checkpoint", "has no config.json"),
        ({"model-00002-of-00002.safetensors": None}, "checkpoint", "1 files that the index names are missing"),
        ({"model-00002-of-00002.safetensors": -1}, "checkpoint", "is truncated: 200,111 bytes where"),
        ({"model-00002-of-00002.safetensors": 3}, "checkpoint", "too short for a safetensors file"),
        ({"model-00002-of-00002.safetensors": 40}, "checkpoint", "a header that is not safetensors JSON"),
        ({"config.json": 5}, "checkpoint", "config.json is no JSON object"),
        ({"model.safetensors.index.json": 5}, "checkpoint", "is no safetensors index"),
        ({"tokenizer.json": None}, "tokenizer", "has none of tokenizer.json"),
    ],
)
def test_a_checkpoint_that_is_not_whole(change: dict[str, int | None], name: str, what: str, tmp_path: Path) -> None:
    files = make_files()
    for path, cut in change.items():
        content = files.pop(path)
        if cut is not None:
            files[path] = content[:cut]
    check = check_files(read(tmp_path, files))[-1]
    assert (check.name, check.verdict, check.is_spec) == (name, "fail", True)
    assert what in check.what
    assert check.mend


@pytest.mark.parametrize(
    ("files", "name", "verdict", "what"),
    [
        ({**make_nvfp4_files(), "hf_quant_config.json": b""}, "quantisation", "fail", "it goes unrecognised"),
        (make_nvfp4_files(quant_algo="FP8"), "quantisation", "warn", "says FP8"),
        ({**make_nvfp4_files(), "hf_quant_config.json": b"{}"}, "quantisation", "fail", "no section 'quantization'"),
        (make_nvfp4_files(["lm_head", "*o_proj", "*q_a_proj"]), "exclude_modules", "fail", "packed and excluded"),
        (make_nvfp4_files(["model.layers.0.mlp.experts.1*", "*"]), "exclude_modules", "fail", "4 modules are packed"),
        (make_nvfp4_files(["lm_head"]), "exclude_modules", "warn", "model.layers.0.self_attn.q_a_proj"),
        (make_nvfp4_files([]), "exclude_modules", "warn", "2 plain modules are not in exclude_modules"),
        (make_nvfp4_files(["*q_a_proj", "lm_head", "model.layers.61*"]), "exclude_modules", "ok", "at one"),
    ],
)
def test_quantisation(files: dict[str, bytes], name: str, verdict: str, what: str, tmp_path: Path) -> None:
    found = read(tmp_path, {path: content for path, content in files.items() if content})
    check = pick(check_quantization(found, NODE), name)
    assert check.verdict == verdict
    assert what in check.what


def test_nvfp4_needs_blackwell(tmp_path: Path) -> None:
    found = read(tmp_path, make_nvfp4_files())
    hopper = dataclasses.replace(NODE, gpus=(H100,) * 8)
    check = pick(check_quantization(found, hopper), "gpu kind")
    assert (check.verdict, check.is_spec) == ("fail", False)
    assert "NVIDIA H100 80GB HBM3" in check.what
    desktop = dataclasses.replace(NODE, gpus=(dataclasses.replace(B200, capability=(12, 0)),) * 8)
    assert pick(check_quantization(found, desktop), "gpu kind").verdict == "warn"
    plain = read_checkpoint(str(tmp_path / "nothing"))
    assert [check.name for check in check_quantization(plain, hopper)] == ["quantisation"]


def test_another_architecture(tmp_path: Path) -> None:
    found = dataclasses.replace(
        read(tmp_path, make_nvfp4_files()), config={**CONFIG, "architectures": ["LlamaForCausalLM"]}
    )
    assert pick(check_model(found, NEEDS, NODE), "architecture").verdict == "fail"
    own = dataclasses.replace(NEEDS, custom_tokenizer=None)
    assert pick(check_model(found, own, NODE), "architecture").verdict == "warn"


# ---- what fits


def test_bytes_of_a_token() -> None:
    """The figures of the vendor's own layout for this model, and a plain grouped-query one's."""
    assert find_kv_token_bytes(REAL, NEEDS) == 61 * (576 + 132) == 43_188
    bf16 = dataclasses.replace(NEEDS, kv_dtype="auto")
    assert find_kv_token_bytes(REAL, bf16) == 61 * (2 * 576 + 132)
    quantized = dataclasses.replace(REAL, quant_config={"quantization": {"kv_cache_quant_algo": "FP8"}})
    assert find_kv_token_bytes(quantized, bf16) == 43_188
    llama = dataclasses.replace(
        REAL,
        config={"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096},
    )
    assert (
        find_kv_token_bytes(llama, dataclasses.replace(bf16, has_attention_dp=False, num_gpus=2))
        == 32 * 2 * 4 * 128 * 2
    )
    assert find_kv_token_bytes(dataclasses.replace(REAL, config={}), NEEDS) is None


STRANGE: list[Any] = [None, [], {}, "x", "9" * 50, -1, 1e308, True, ["a"], [None], {"a": 1}]
NUMBERS = ["num_hidden_layers", "kv_lora_rank", "qk_rope_head_dim", "index_head_dim", "max_position_embeddings"]
NUMBERS += ["num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size", "architectures"]


def test_a_config_with_other_things_than_numbers_is_judged_all_the_same(tmp_path: Path) -> None:
    """What it doesn't say is unknown, and told so; whether the engine takes it is the engine's affair."""
    whole, needs = read(tmp_path, make_nvfp4_files()), dataclasses.replace(NEEDS, max_model_len=None)
    plain = {key: value for key, value in whole.config.items() if key != "kv_lora_rank"}
    for config, name, value in itertools.product(({**whole.config}, plain), NUMBERS, STRANGE):
        strange = dataclasses.replace(whole, config={**config, name: value})
        assert pick(check_model(strange, needs, NODE), "architecture").what


@pytest.mark.parametrize("value", [3, True, "x", {"a": 1}])
def test_a_list_of_excluded_modules_that_is_none(value: Any, tmp_path: Path) -> None:
    found = read(tmp_path, make_nvfp4_files(exclude_modules=value))
    (check,) = check_quantization(found, NODE)
    assert (check.verdict, check.is_spec) == ("fail", True)
    assert "exclude_modules of hf_quant_config.json is no list" in check.what


def test_how_many_requests_fit() -> None:
    found = find_capacity(REAL, dataclasses.replace(NEEDS, max_tokens=64_000), B200.free_bytes)
    assert found is not None
    assert found.weight_bytes == 66 * 10**9
    assert found.reserved_tokens == 65_024
    assert found.num_requests == int((B200.free_bytes - 66 * 10**9) * 0.8) // 43_188 // 65_024 == 35
    unknown = find_capacity(REAL, dataclasses.replace(NEEDS, max_tokens=None), B200.free_bytes)
    assert unknown is not None
    assert unknown.reserved_tokens == 66_000


def judge_capacity(node: NodeFacts = NODE, **needs: Any) -> list[Check]:
    return check_capacity(REAL, dataclasses.replace(NEEDS, **needs), node)


def test_capacity() -> None:
    assert {check.verdict for check in judge_capacity()} == {"ok"}
    long = pick(judge_capacity(max_tokens=64_000), "kv cache")
    assert long.verdict == "warn"
    assert "35 requests of 65,024 tokens, 280 in the engine; engine.max_inflight is 1,024" in long.what
    assert pick(judge_capacity(max_tokens=64_000, max_inflight=280), "kv cache").verdict == "ok"
    assert pick(judge_capacity(max_tokens=64_000, scheduler_policy="MAX_UTILIZATION"), "kv cache").verdict == "ok"
    assert pick(judge_capacity(max_batch_size=64), "kv cache").verdict == "warn"
    none = pick(judge_capacity(max_tokens=10_000_000, max_model_len=10_000_000), "kv cache")
    assert (none.verdict, none.is_spec) == ("fail", True)
    small = dataclasses.replace(NODE, gpus=(dataclasses.replace(H100, free_bytes=60 * GIB),) * 8)
    assert pick(judge_capacity(small), "weights").verdict == "fail"
    assert pick(judge_capacity(max_model_len=None), "max_model_len").verdict == "warn"
    assert pick(judge_capacity(dataclasses.replace(NODE, ram_bytes=256 * GIB)), "host memory").verdict == "warn"
    assert judge_capacity(dataclasses.replace(NODE, gpus=())) == []


def test_the_disk_of_a_copy() -> None:
    assert check_disk(415 * 10**9, NODE, is_copied=False).verdict == "ok"
    full = dataclasses.replace(NODE, free_disk_bytes=400 * 10**9)
    assert check_disk(415 * 10**9, full, is_copied=False).verdict == "fail"
    assert check_disk(415 * 10**9, full, is_copied=True).verdict == "ok"
