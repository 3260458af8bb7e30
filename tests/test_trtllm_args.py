"""The section of a spec, what it refuses, and the keyword arguments and the environment that are made from it."""

from typing import Any

import pytest
from makers import make_job_spec
from pydantic import ValidationError

from batchgen.engines import check_supported
from batchgen.engines.trtllm.args import is_safe_version, make_llm_kwargs, needs_safe_version
from batchgen.engines.trtllm.env import make_environment
from batchgen.engines.trtllm.gpu import MAX_FREE_USED_BYTES, list_held
from batchgen.errors import SpecError
from batchgen.spec import ModelSpec
from batchgen.specs.tensorrt_llm import DROPPED, TensorRTLLMEngineSpec

MODEL = ModelSpec(path="nvidia/DeepSeek-V3.2-NVFP4", max_model_len=72_192)


def make_section(**fields: Any) -> TensorRTLLMEngineSpec:
    return TensorRTLLMEngineSpec(kind="tensorrt_llm", **fields)


def make(version: str | None = "1.2.1", model: ModelSpec = MODEL, **fields: Any) -> dict[str, Any]:
    return make_llm_kwargs(model, make_section(**fields), version)


GOLDEN = {
    "model": "nvidia/DeepSeek-V3.2-NVFP4",
    "custom_tokenizer": "deepseek_v32",
    "tensor_parallel_size": 8,
    "moe_expert_parallel_size": 8,
    "enable_attention_dp": True,
    "attention_dp_config": {"enable_balance": True, "batching_wait_iters": 0, "timeout_iters": 60},
    "max_batch_size": 128,
    "max_num_tokens": 8192,
    "max_seq_len": 72_192,
    "kv_cache_config": {"dtype": "fp8", "free_gpu_memory_fraction": 0.8, "enable_block_reuse": True},
    "enable_chunked_prefill": True,
    "moe_config": {"backend": "TRTLLM"},
    "scheduler_config": {"capacity_scheduler_policy": "GUARANTEED_NO_EVICT"},
    "cuda_graph_config": {"enable_padding": True, "max_batch_size": 128},
    "speculative_config": None,
    "stream_interval": 10,
    "return_perf_metrics": True,
    "guided_decoding_backend": None,
}


def test_the_defaults_are_the_recipe() -> None:
    assert make() == GOLDEN


@pytest.mark.parametrize("version", [None, "1.2.0", "1.2.0rc8", "1.2.1rc1", "0.21.0", "nonsense"])
def test_what_an_old_version_does_wrong_is_off_by_itself(version: str | None) -> None:
    made = make(version)
    assert not is_safe_version(version)
    assert made["kv_cache_config"]["enable_block_reuse"] is False
    assert made["enable_chunked_prefill"] is False
    assert made | {"kv_cache_config": None, "enable_chunked_prefill": None} == GOLDEN | {
        "kv_cache_config": None,
        "enable_chunked_prefill": None,
    }


@pytest.mark.parametrize("version", ["1.2.1", "1.2.1.post1", "1.2.2", "1.3.0rc5", "2.0"])
def test_versions_that_are_safe(version: str) -> None:
    assert is_safe_version(version)


def test_a_switch_is_the_users_word() -> None:
    assert make("1.2.0", enable_block_reuse="on")["kv_cache_config"]["enable_block_reuse"] is True
    assert make("1.2.0", enable_chunked_prefill="on")["enable_chunked_prefill"] is True
    assert make("1.2.1", enable_chunked_prefill="off")["enable_chunked_prefill"] is False
    assert needs_safe_version(make_section(enable_block_reuse="on", enable_chunked_prefill="on"))
    assert not needs_safe_version(make_section(enable_block_reuse="on"))


def test_what_a_field_turns_off_is_not_there() -> None:
    made = make(
        model=ModelSpec(path="org/model", revision="abc"),
        custom_tokenizer=None,
        enable_attention_dp=False,
        cuda_graphs=False,
        perf_metrics=False,
    )
    assert {"custom_tokenizer", "attention_dp_config", "max_seq_len"} & made.keys() == set()
    assert (made["cuda_graph_config"], made["return_perf_metrics"], made["revision"]) == (None, False, "abc")
    assert "attention_dp_config" not in make(attention_dp_balance=False)


def test_extra_goes_through_and_is_merged_with_what_is_there() -> None:
    extra = {
        "kv_cache_config": {"tokens_per_block": 64, "enable_block_reuse": False},
        "cuda_graph_config": {"batch_sizes": [1, 2]},
        "print_iter_log": True,
        "scheduler_config": None,
    }
    made = make(extra=extra)
    assert made["kv_cache_config"] == GOLDEN["kv_cache_config"] | {"tokens_per_block": 64, "enable_block_reuse": False}  # type: ignore[operator]
    assert made["cuda_graph_config"] == {"enable_padding": True, "max_batch_size": 128, "batch_sizes": [1, 2]}
    assert made["print_iter_log"] is True
    assert made["scheduler_config"] is None


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        ({"tensor_parallel_size": 4}, "set engine.tensor_parallel_size"),
        ({"model": "x"}, "made from model.path"),
        ({"orchestrator_type": "ray"}, "the ranks are started by MPI"),
        ({"speculative_config": {"decoding_type": "MTP"}}, "decodes greedily and ignores temperature"),
        ({"speculative_config": {"decoding_type": "MTP", "allow_advanced_sampling": False}}, "allow_advanced_sampling"),
    ],
)
def test_what_extra_may_not_hold(extra: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        make_section(extra=extra)


def test_penalties_that_the_default_sampler_drops_are_refused_and_told_how_to_have_them() -> None:
    def check(engine: dict[str, Any], **sampling: Any) -> None:
        check_supported(make_job_spec(engine={"kind": "tensorrt_llm", **engine}, sampling=sampling))

    for field in sorted(DROPPED):
        value = {field: 0.5}
        with pytest.raises(SpecError, match=rf"sampling\.{field}: .*sampler_type: TRTLLMSampler"):
            check({}, **value)
        check({"extra": {"sampler_type": "TRTLLMSampler"}}, **value)
        check({"has_penalties": True}, **value)
    check({}, top_k=5, seed=1)
    with pytest.raises(SpecError, match="sampler_type"):
        check({"extra": {"sampler_type": "TorchSampler"}}, min_p=0.1)


def test_mtp_that_samples_is_let_through() -> None:
    extra = {"speculative_config": {"decoding_type": "MTP", "allow_advanced_sampling": True}}
    assert make(extra=extra)["speculative_config"] == extra["speculative_config"]


def test_the_fingerprint_covers_what_makes_the_data() -> None:
    plain = make_section().fingerprint_fields()
    assert plain == {
        "kind": "tensorrt_llm",
        "kv_cache_dtype": "fp8",
        "custom_tokenizer": "deepseek_v32",
        "extra": {},
    }
    tuned = make_section(max_batch_size=64, moe_backend="CUTLASS", no_progress_s=2, max_inflight=8)
    assert tuned.fingerprint_fields() == plain
    assert make_section(kv_cache_dtype="auto").fingerprint_fields() != plain


def test_a_spec_names_the_wrong_field() -> None:
    with pytest.raises(SpecError, match="kv_cache_free_fraction"):
        make_job_spec(engine={"kind": "tensorrt_llm", "kv_cache_free_fraction": 1.5})


def test_every_field_says_what_it_is() -> None:
    own = {name: field for name, field in TensorRTLLMEngineSpec.model_fields.items() if name != "kind"}
    assert [name for name, field in own.items() if not field.description] == []


# ---- environment and GPUs


def test_the_environment_is_put_in_order() -> None:
    environ = {
        "PATH": "/bin",
        "CUDA_VISIBLE_DEVICES": "4,5",
        "SLURM_JOB_ID": "1",
        "SLURM_JOBID": "1",
        "SLURM_NODELIST": "n1",
        "SLURM_CPUS_ON_NODE": "8",
        "PMIX_RANK": "0",
        "PMI_FD": "3",
        "OMPI_COMM_WORLD_RANK": "0",
        "OMPI_MCA_btl": "self",
        "TLLM_DISABLE_MPI": "1",
        "RAY_LOCAL_WORLD_SIZE": "1",
        "RAY_ADDRESS": "a:1",
        "PYTHONPATH": "/mine::/yours",
    }
    made = make_environment(environ, "MARK", "value", "/repo")
    assert made == {
        "PATH": "/bin",
        "CUDA_VISIBLE_DEVICES": "4,5",
        "SLURM_CPUS_ON_NODE": "8",
        "OMPI_MCA_btl": "self",
        "RAY_ADDRESS": "a:1",
        "PYTHONPATH": "/repo:/mine:/yours",
        "MARK": "value",
    }
    assert make_environment({}, "MARK", "value", "/repo") == {"MARK": "value", "PYTHONPATH": "/repo"}


def test_a_gpu_is_free_but_for_what_the_driver_keeps() -> None:
    assert list_held({"GPU 0": 2**29, "GPU 1": MAX_FREE_USED_BYTES}) == []
    assert list_held({"GPU 0": 0, "GPU 3": 150 * 2**30}) == ["GPU 3: 150.0 GiB"]
