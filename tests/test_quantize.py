"""From a plain checkpoint to a checked NVFP4 one, with nvidia-modelopt and the embedded model; and what it weighs."""

import json
import shutil
import signal
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from ray_cluster import RayCluster
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from batchgen.cli import app
from batchgen.errors import InputError, OutputError, SpecError
from batchgen.preflight.checkpoint_facts import read_tensors
from batchgen.quantize.architecture import list_tensors, read_shape
from batchgen.quantize.calibrate import list_unmeasured
from batchgen.quantize.check import compare_tensors
from batchgen.quantize.job import check_folders, find_report, quantize, upload
from batchgen.quantize.recipe import is_quantized, quantize_names
from batchgen.quantize.spec import QuantizeSpec
from batchgen.quantize.weigh import weigh_checkpoint
from batchgen.spec import ModelSpec
from batchgen.specs.engine import TransformersEngineSpec
from batchgen.storage import Storage
from batchgen.training.accuracy import Examinee, list_questions, measure

EMBEDDED = Path(str(files("batchgen") / "embedded"))
# deepseek-ai/DeepSeek-V3.2-Exp, inference/config_671B_v3.2.json, in Hugging Face's words.
DEEPSEEK_V32 = {
    "architectures": ["DeepseekV32ForCausalLM"],
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "num_attention_heads": 128,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "vocab_size": 129280,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "num_nextn_predict_layers": 1,
    "quantization_config": {"quant_method": "fp8"},
}


def make_spec(folder: Path, **calibration: int) -> QuantizeSpec:
    prompts = folder / "prompts"
    prompts.mkdir(exist_ok=True)
    texts = [question.text for question in list_questions(80, thinking=False, held_out=False)]
    pq.write_table(pa.table({"question": texts}), prompts / "part.parquet")
    values = {
        "input": {"paths": str(prompts)},
        "prompt": {"column": "question"},
        "calibration": {"num_rows": 64, **calibration},
        "output": {"path": str(folder / "out")},
        "work_dir": str(folder / "work"),
    }
    return QuantizeSpec.model_validate(values)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An NVFP4 checkpoint of the embedded model."""
    folder = tmp_path_factory.mktemp("quantize")
    quantize(make_spec(folder), lambda _: None)
    return folder / "out"


# ---- the recipe and the sizes


@pytest.mark.parametrize(
    ("module", "is_packed"),
    [
        ("model.layers.0.mlp.down_proj", True),
        ("model.layers.3.mlp.experts.255.up_proj", True),
        ("model.layers.3.mlp.shared_experts.gate_proj", True),
        ("model.layers.3.self_attn.o_proj", True),
        ("model.layers.3.self_attn.q_b_proj", False),
        ("model.layers.3.self_attn.indexer.wk", False),
        ("model.layers.3.mlp.gate", False),
        ("model.layers.61.mlp.experts.0.up_proj", False),
        ("model.embed_tokens", False),
        ("lm_head", False),
    ],
)
def test_the_recipe_is_nvidias(module: str, is_packed: bool) -> None:
    assert is_quantized(module, num_layers=61) is is_packed


def test_the_model_cards_ratio_follows_from_the_config() -> None:
    before, after = weigh_checkpoint(DEEPSEEK_V32, [])
    assert (before.form, after.form) == ("FP8", "NVFP4")
    assert round(before.num_bytes / after.num_bytes, 2) == 1.66
    assert round(before.num_bytes / 1e9, 1) == 689.5  # what the published FP8 files take
    assert round(before.per_gpu(8, is_attention_dp=False) / 1e9, 1) == 86.2
    assert round(after.per_gpu(8, is_attention_dp=False) / 1e9, 1) == 51.9


def test_the_architecture_is_that_of_a_real_file() -> None:
    config, tensors = read_tensors(str(EMBEDDED))
    made = {(tensor.name, tensor.shape) for tensor in list_tensors(read_shape(config), is_fp8=False)}
    assert made == {(tensor.name, tensor.shape) for tensor in tensors}


def test_the_estimate_is_what_the_checkpoint_then_weighs(made: Path) -> None:
    _, estimated = weigh_checkpoint(*read_tensors(str(EMBEDDED)))
    found = sum(tensor.num_bytes for tensor in read_tensors(str(made))[1])
    # modelopt writes the routers' biases, four numbers a layer here, in float32.
    assert found - estimated.num_bytes == 2 * 4 * 2


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"num_hidden_layers": None}, "lacks num_hidden_layers"),
        ({"architectures": "LlamaForCausalLM"}, "architecture LlamaForCausalLM"),
        ({"quantization_config": "fp8", "architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
        ({"moe_intermediate_size": 2040}, "no multiple of 16"),
    ],
)
def test_a_config_that_tells_no_size_is_refused(change: dict[str, object], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        weigh_checkpoint({**DEEPSEEK_V32, **change}, [])


# ---- making one


def test_a_quantized_checkpoint_is_whole_and_checked(made: Path) -> None:
    report = json.loads((made / "quantize_report.json").read_text())
    assert report["faults"] == []
    assert len(report["layers"]) == 36
    assert 1.55 < report["ratio"] < 1.66
    assert all(0.05 < layer["relative_error"] < 0.15 for layer in report["layers"])
    quantization = json.loads((made / "hf_quant_config.json").read_text())["quantization"]
    assert (quantization["quant_algo"], quantization["group_size"]) == ("NVFP4", 16)
    assert quantization["kv_cache_quant_algo"] == "FP8"
    assert {"lm_head", "model.layers.1.mlp.gate", "model.layers.1.self_attn.q_a_proj"} <= set(
        quantization["exclude_modules"]
    )
    assert "layer_types" not in json.loads((made / "config.json").read_text())


def test_running_it_again_finds_everything_done(made: Path) -> None:
    said: list[str] = []
    quantize(make_spec(made.parent), said.append)
    assert said == ["nothing left to do: the checkpoint is there and was checked"]


def test_a_folder_with_another_checkpoint_is_refused(made: Path) -> None:
    with pytest.raises(OutputError, match="another quantization"):
        quantize(make_spec(made.parent, num_rows=65), lambda _: None)


def test_a_killed_quantization_goes_on_with_what_was_measured(tmp_path: Path, made: Path) -> None:
    spec = make_spec(tmp_path, max_batch_rows=1, save_interval_rows=1)
    (tmp_path / "spec.json").write_text(spec.model_dump_json())
    code = (
        "import sys; from pathlib import Path; from batchgen.quantize.job import quantize\n"
        "from batchgen.quantize.spec import QuantizeSpec\n"
        "quantize(QuantizeSpec.model_validate_json(Path(sys.argv[1]).read_text()), lambda text: print(text, flush=True))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "spec.json")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("measured 9 of"):
                process.send_signal(signal.SIGKILL)
                break
    said: list[str] = []
    quantize(spec, said.append)
    assert any(text.endswith("of 64 calibration rows were measured before") for text in said)
    assert "measured 9 of 64 rows" not in said
    ours, theirs = load_file(tmp_path / "out/model.safetensors"), load_file(made / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(
        torch.equal(ours[name].view(torch.uint8), theirs[name].view(torch.uint8)) for name in ours if ours[name].dim()
    )
    scales = [name for name in ours if name.endswith("input_scale")]
    assert scales
    # bfloat16 sums of a batch of one and of eight differ in the last digit.
    assert all(float(ours[name]) == pytest.approx(float(theirs[name]), rel=0.02) for name in scales)


def test_any_other_checkpoint_is_left_alone(tmp_path: Path, made: Path) -> None:
    spec = make_spec(tmp_path)
    shutil.copytree(made, tmp_path / "out", ignore=shutil.ignore_patterns("_batchgen"))
    (tmp_path / "out/quantize_report.json").unlink()
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir() if file.is_file()}
    with pytest.raises(OutputError, match="of another checkpoint; choose an empty"):
        quantize(spec, lambda _: None)
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir() if file.is_file()} == before


def test_an_interrupted_upload_goes_on_and_another_packings_files_are_replaced(tmp_path: Path, made: Path) -> None:
    packed, output, claim = tmp_path / "packed", Storage(str(tmp_path / "out")), {"fingerprint": "f", "packing": "one"}
    shutil.copytree(made, packed, ignore=shutil.ignore_patterns("_batchgen"))
    (packed / "encoding").mkdir()
    (packed / "encoding/rules.py").write_text("")
    said: list[str] = []
    upload(packed, output, claim, said.append)
    assert sum(text.startswith("wrote") for text in said) == sum(file.is_file() for file in packed.rglob("*"))
    assert (tmp_path / "out/encoding/rules.py").read_bytes() == b""
    output.delete("config.json")  # as if killed before it
    said.clear()
    upload(packed, output, claim, said.append)
    assert [text.split(",")[0] for text in said] == ["wrote config.json"]
    said.clear()
    upload(packed, output, {**claim, "packing": "two"}, said.append)
    assert any(text.startswith("wrote model.safetensors") for text in said)


def test_an_output_with_weights_and_a_claim_but_no_config_is_gone_on_with(tmp_path: Path) -> None:
    spec = make_spec(tmp_path)
    output = Storage(spec.output.path)
    output.put("model.safetensors", b"half")
    output.put("quantize_started.json", json.dumps({"fingerprint": spec.fingerprint(), "packing": "p"}).encode())
    assert find_report(output, spec) is None
    with pytest.raises(OutputError, match="another checkpoint"):
        find_report(output, make_spec(tmp_path, num_rows=65))


def test_rows_are_measured_once_whatever_the_batches_were_before() -> None:
    batches = [[(1,), (2,), (3,)], [(4,), (5,)]]
    assert list_unmeasured(batches, 0) == batches
    assert list_unmeasured(batches, 1) == [[(2,), (3,)], [(4,), (5,)]]
    assert list_unmeasured(batches, 4) == [[(5,)]]
    assert list_unmeasured(batches, 5) == []


def test_a_source_that_lacks_a_tensor_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    shutil.copytree(EMBEDDED, tmp_path / "model")
    tensors = load_file(EMBEDDED / "model.safetensors")
    del tensors["model.layers.0.input_layernorm.weight"]
    save_file(tensors, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    spec = make_spec(tmp_path).model_copy(update={"model": ModelSpec(path=str(tmp_path / "model"))})
    with pytest.raises(InputError, match=r"lacks 1 of the model's tensors, first model\.layers\.0\.input_layernorm"):
        quantize(spec, lambda _: None)


def write_float32_shards(folder: Path) -> None:
    shutil.copytree(EMBEDDED, folder, ignore=shutil.ignore_patterns("model.safetensors", "__pycache__"))
    tensors = {name: tensor.float() for name, tensor in load_file(EMBEDDED / "model.safetensors").items()}
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
    places = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def test_a_source_in_float32_and_in_shards_is_packed_as_its_bfloat16(tmp_path: Path, made: Path) -> None:
    write_float32_shards(tmp_path / "model")
    report = check_folders(tmp_path / "model", made, lambda _: None)
    assert report["faults"] == []
    assert report["ratio"] > 3.1


def test_from_object_storage_to_object_storage(tmp_path: Path, s3_url: str) -> None:
    write_float32_shards(tmp_path / "model")
    source, output = Storage(f"{s3_url}/model"), Storage(f"{s3_url}/nvfp4")
    for file in (tmp_path / "model").iterdir():
        source.put(file.name, file.read_bytes())
    spec = make_spec(tmp_path, num_rows=8)
    model = ModelSpec(path=source.root, stage_dir=str(tmp_path / "staged"))
    report = quantize(
        spec.model_copy(
            update={"model": model, "output": spec.output.model_copy(update={"path": output.root})},
        ),
        lambda _: None,
    )
    assert (report["faults"], len(report["layers"])) == ([], 36)
    paths = {info.path for info in output.list_files()}
    assert {"model.safetensors", "hf_quant_config.json", "quantize_report.json", "tokenizer.json"} <= paths
    assert "quantize_started.json" not in paths
    assert not (tmp_path / "work" / report["fingerprint"]).exists()


def test_gpus_that_ray_can_not_reserve_are_refused(tmp_path: Path) -> None:
    values = make_spec(tmp_path).model_dump(mode="json")
    with pytest.raises(ValueError, match="give a whole number"):
        QuantizeSpec.model_validate({**values, "gpus": 1.5})


def test_too_few_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"80 rows make a prompt, and calibration\.num_rows asks for 81"):
        quantize(make_spec(tmp_path, num_rows=81), lambda _: None)


def test_the_command_tells_a_refusal_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "spec.json").write_text(make_spec(tmp_path).model_dump_json())
    words = ["quantize", str(tmp_path / "spec.json"), "--set", "calibration.num_rows=81", "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2
    assert done.stderr.startswith("batchgen: ")
    assert done.stderr.rstrip().endswith("calibration.num_rows asks for 81; give more rows or ask for fewer")
    assert json.loads(done.stdout.splitlines()[-1])["state"] == "refused"


def test_a_quantized_source_is_refused(tmp_path: Path, made: Path) -> None:
    spec = make_spec(tmp_path).model_copy(update={"model": ModelSpec(path=str(made))})
    with pytest.raises(InputError, match="quantized already"):
        quantize(spec, lambda _: None)


def test_an_incomplete_source_is_refused(tmp_path: Path) -> None:
    shutil.copytree(EMBEDDED, tmp_path / "model")
    weights = tmp_path / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    spec = make_spec(tmp_path).model_copy(update={"model": ModelSpec(path=str(tmp_path / "model"))})
    with pytest.raises(InputError, match="truncated"):
        quantize(spec, lambda _: None)


@pytest.mark.ray
def test_the_ray_job_tells_its_tasks_refusal_in_one_sentence(cluster: RayCluster, tmp_path: Path) -> None:
    (tmp_path / "spec.json").write_text(make_spec(tmp_path).model_dump_json())
    job = Path(__file__).parents[1] / "jobs/quantize.py"
    command = [sys.executable, str(job), str(tmp_path / "spec.json"), "--set", "calibration.num_rows=81"]
    env = {**cluster.env, "RAY_ADDRESS": cluster.address}
    ended = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=240)
    assert ended.returncode == 2, ended.stderr[-2000:]
    told = [line for line in ended.stderr.splitlines() if line.startswith("batchgen: ")]
    assert len(told) == 1
    assert "80 rows make a prompt, and calibration.num_rows asks for 81; give more rows" in told[0]
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("module", ["modelopt", "torch"])
def test_a_machine_that_could_not_quantize_is_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SpecError, match=rf"{module} is not installed; pip install 'batchgen\[quantize\]'"):
        quantize(make_spec(tmp_path), lambda _: None)


# ---- checking one


def change(made: Path, tmp_path: Path, edit: dict[str, torch.Tensor | None]) -> Path:
    folder = tmp_path / "changed"
    shutil.copytree(made, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors.update({name: tensor for name, tensor in edit.items() if tensor is not None})
    kept = {name: tensor for name, tensor in tensors.items() if edit.get(name, tensor) is not None}
    save_file(kept, folder / "model.safetensors")
    return folder


MODULE = "model.layers.1.mlp.experts.2.up_proj"


@pytest.mark.parametrize("kind", ["missing", "shape", "type", "code", "other", "scale", "input_scale", "stray"])
def test_a_checkpoint_that_is_not_what_it_should_be_is_found_out(made: Path, tmp_path: Path, kind: str) -> None:
    tensors = load_file(made / "model.safetensors")
    codes, norm = tensors[f"{MODULE}.weight"], tensors["model.norm.weight"]
    flipped = codes.clone()
    flipped[3, 5] ^= 0x70
    edits: dict[str, tuple[dict[str, torch.Tensor | None], str]] = {
        "missing": ({f"{MODULE}.input_scale": None}, "input_scale is missing"),
        "shape": ({f"{MODULE}.weight": codes[:-1].clone()}, "has shape"),
        "type": ({f"{MODULE}.weight": codes.view(torch.int8)}, "is I8, U8 was expected"),
        "code": ({f"{MODULE}.weight": flipped}, "1 weights that are not the source's, rounded"),
        "other": ({"model.norm.weight": norm * 2}, "model.norm.weight is not the source's"),
        "scale": ({f"{MODULE}.weight_scale_2": tensors[f"{MODULE}.weight_scale_2"] * 2}, "not the source's"),
        "input_scale": ({f"{MODULE}.input_scale": torch.tensor(float("nan"))}, "input_scale is nan"),
        "stray": ({"model.extra.weight": norm}, "is not of the recipe"),
    }
    edit, what = edits[kind]
    faults = check_folders(EMBEDDED, change(made, tmp_path, edit), lambda _: None)["faults"]
    assert any(what in fault for fault in faults), faults


def test_a_source_of_odd_widths_is_refused() -> None:
    config, tensors = read_tensors(str(EMBEDDED))
    odd = list(list_tensors(read_shape({**config, "moe_intermediate_size": 24}), is_fp8=False))
    with pytest.raises(InputError, match="no multiple of 16"):
        compare_tensors(odd, tensors, 3)
    with pytest.raises(InputError, match="packed already"):
        compare_tensors(list(quantize_names(tensors, 3)), tensors, 3)


# ---- running one


@pytest.mark.parametrize(("mode", "least"), [("w4a16", 0.97), ("w4a4", 0.9)])
def test_a_quantized_model_still_answers(made: Path, mode: str, least: float) -> None:
    engine = TransformersEngineSpec.model_validate({"kind": "transformers", "device": "cpu", "nvfp4": mode})
    examinee = Examinee(made, engine)
    replies = examinee.ask(list_questions(60, thinking=False, held_out=True), thinking=False, temperature=0.0)
    share = measure(replies).share
    assert share is not None
    assert share >= least


def test_rounded_activations_make_a_difference_that_does_not_depend_on_the_batch(made: Path) -> None:
    questions = list_questions(12, thinking=True, held_out=True)
    texts = {}
    for mode in ("w4a16", "w4a4"):
        engine = TransformersEngineSpec.model_validate({"kind": "transformers", "device": "cpu", "nvfp4": mode})
        examinee = Examinee(made, engine)
        texts[mode] = [reply.text for reply in examinee.ask(questions, thinking=True, temperature=0.0)]
        alone = [examinee.ask([question], thinking=True, temperature=0.0)[0].text for question in questions[:2]]
        assert texts[mode][:2] == alone
    assert texts["w4a16"] != texts["w4a4"]


def test_a_checkpoint_that_lacks_something_is_not_run(made: Path, tmp_path: Path) -> None:
    name = "model.norm.weight"
    with pytest.raises(SpecError, match=f"lacks 1 of the model's tensors, first {name}"):
        Examinee(change(made, tmp_path, {name: None}))


def test_activations_are_rounded_only_where_their_scales_are_whole(made: Path, tmp_path: Path) -> None:
    engine = TransformersEngineSpec.model_validate({"kind": "transformers", "device": "cpu", "nvfp4": "w4a4"})
    scale = f"{MODULE}.input_scale"
    for number, (edit, what) in enumerate([(None, "has no input_scale"), (torch.tensor(3.0), "different input_scale")]):
        with pytest.raises(SpecError, match=what):
            Examinee(change(made, tmp_path / str(number), {scale: edit}), engine)


def test_another_quantization_is_refused_by_name(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "fp8"
    shutil.copytree(made, folder)
    (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    with pytest.raises(SpecError, match="says FP8"):
        Examinee(folder)
