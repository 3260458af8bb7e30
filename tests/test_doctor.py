"""The command on this very machine, and how its facts are gathered."""

import dataclasses
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkpoints import make_files, make_nvfp4_files
from makers import make_tree
from openai_server import OpenAIServer
from test_preflight import B200, NODE, pick
from typer.testing import CliRunner, Result

from batchgen.cli import app
from batchgen.errors import EngineDied, SpecError
from batchgen.preflight.check import make_needs, preflight
from batchgen.preflight.doctor import examine
from batchgen.preflight.facts import find_existing, parse_smi, pick_visible, read_node, read_spawn, try_mpi
from batchgen.preflight.preflight import list_launcher_variables
from batchgen.spec import ModelSpec
from batchgen.specs.load import make_spec
from batchgen.specs.tensorrt_llm import TensorRTLLMEngineSpec
from batchgen.storage import Storage

TRTLLM = TensorRTLLMEngineSpec(kind="tensorrt_llm")
# What an H100 machine printed.
SMI = "0, GPU-653a28c6-8f0b-a61b-7897-cb4a0ff45491, NVIDIA H100 80GB HBM3, 9.0, 81559, 81079, 580.159.04\n"


def invoke(*args: str) -> Result:
    return CliRunner().invoke(app, list(args))


def write_spec(folder: Path, **sections: Any) -> str:
    tree = make_tree(output={"path": str(folder / "out")}, **sections)
    (folder / "spec.yaml").write_text(yaml.safe_dump(tree))
    return str(folder / "spec.yaml")


def upload(folder: Path | str, files: dict[str, bytes]) -> str:
    for name, content in files.items():
        Storage(str(folder)).put(name, content)
    return str(folder)


# ---- the command


def test_without_a_spec_it_looks_at_the_node_alone() -> None:
    result = invoke("doctor", "--json")
    value = json.loads(result.stdout.splitlines()[-1])
    assert (result.exit_code, value["state"], value["fail"]) == (0, "ok", 0)
    assert {"python", "memory", "disk", "gpus", "tensorrt_llm", "mpi"} <= {check["name"] for check in value["checks"]}
    assert "python" in result.stderr
    assert invoke("doctor").stdout == ""


def test_the_embedded_model_on_this_machine(tmp_path: Path) -> None:
    result = invoke("doctor", write_spec(tmp_path, engine={"kind": "transformers"}), "--json")
    assert result.exit_code == 0, result.stderr
    checks = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
    assert checks["checkpoint"]["what"] == "whole: 1 weight files, 0.0 GB"
    assert checks["output"]["verdict"] == "ok"


def test_what_fails_is_shown_with_its_mend_and_ends_with_2(tmp_path: Path) -> None:
    model = upload(tmp_path / "model", {"config.json": b"{}", "model.safetensors": b"123"})
    spec = write_spec(tmp_path, engine={"kind": "transformers", "device": "cuda:3"}, model={"path": model})
    result = invoke("doctor", spec, "--json")
    assert result.exit_code == 2
    value = json.loads(result.stdout)
    failed = {check["name"]: check["mend"] for check in value["checks"] if check["verdict"] == "fail"}
    assert failed == {
        "device": "set engine.device: auto, or use a GPU node",
        "checkpoint": "copy the checkpoint there again",
    }
    assert (value["state"], value["exit_code"], value["fail"]) == ("failed", 2, 2)
    assert "-> copy the checkpoint there again" in result.stderr


def test_a_bad_spec_is_refused_as_everywhere(tmp_path: Path) -> None:
    result = invoke("doctor", str(tmp_path / "none.yaml"), "--json")
    assert (result.exit_code, json.loads(result.stdout)["state"]) == (2, "refused")


def test_staging_ahead(tmp_path: Path) -> None:
    model = upload(tmp_path / "nfs", make_files())
    spec = write_spec(tmp_path, model={"path": model, "stage_dir": str(tmp_path / "nvme")})
    result = invoke("stage", spec, "--json")
    folder = Path(json.loads(result.stdout.splitlines()[-1])["folder"])
    assert (result.exit_code, folder.parent) == (0, tmp_path / "nvme")
    weights = folder / "model-00001-of-00002.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert invoke("stage", spec, "--verify").exit_code == 0
    assert weights.read_bytes() == content
    shown = invoke(
        "doctor",
        write_spec(tmp_path, engine={"kind": "transformers"}, model=yaml.safe_load(Path(spec).read_text())["model"]),
    )
    assert "the copy lies there already" in " ".join(shown.stderr.replace("│", " ").split())


# ---- servers


def test_servers_are_asked(openai_server: OpenAIServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    urls = [openai_server.base_url, "http://127.0.0.1:9/v1"]
    engine = {"kind": "openai", "base_urls": urls, "model": "sums", "open_timeout_s": 0.5}
    spec = make_spec(make_tree(engine=engine, output={"path": str(tmp_path)}))
    started = time.monotonic()
    servers = [check for check in examine(spec, NODE) if check.name == "server"]
    assert time.monotonic() - started < 60
    assert [check.verdict for check in servers] == ["ok", "fail"]
    assert "http://127.0.0.1:9/v1" in servers[1].what
    openai_server.require_key()
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong-key")
    refused = next(check for check in examine(spec, NODE) if check.name == "server")
    assert refused.verdict == "fail"
    assert "sk-wrong-key" not in str(refused)


# ---- an engine's start


def test_preflight_lets_a_good_node_go(tmp_path: Path) -> None:
    model = ModelSpec(path=upload(tmp_path, make_nvfp4_files()), max_model_len=66_000)
    checks = preflight(model, TRTLLM, node=NODE)
    assert {check.verdict for check in checks} <= {"ok", "warn"}


@pytest.mark.s3
def test_preflight_reads_a_checkpoint_in_a_store_without_its_weights(s3_url: str, tmp_path: Path) -> None:
    upload(s3_url, make_nvfp4_files())
    model = ModelSpec(path=s3_url, max_model_len=4096, stage_dir=str(tmp_path))
    assert pick(preflight(model, TRTLLM, node=NODE), "staging").verdict == "ok"
    upload(s3_url, {"model.safetensors": make_nvfp4_files()["model.safetensors"][:-5]})
    with pytest.raises(SpecError, match=r"checkpoint: model\.safetensors is truncated"):
        preflight(model, TRTLLM, node=NODE)
    full = dataclasses.replace(NODE, free_disk_bytes=1000)
    upload(s3_url, make_nvfp4_files())
    with pytest.raises(EngineDied, match=r"staging: the copy takes .* set model.stage_dir to a larger disk"):
        preflight(model, TRTLLM, node=full)


def test_preflight_refuses_in_seconds_with_one_sentence(tmp_path: Path) -> None:
    model = ModelSpec(path=upload(tmp_path, make_nvfp4_files()), max_model_len=66_000)
    with pytest.raises(EngineDied, match="gpus: 4 x NVIDIA B200, sm_100, 180 GiB where the engine needs 8; lower"):
        preflight(model, TRTLLM, node=dataclasses.replace(NODE, gpus=(B200,) * 4))
    with pytest.raises(SpecError, match=r"checkpoint: .* has no config.json; correct model.path"):
        preflight(ModelSpec(path=upload(tmp_path / "b", {"a": b""})), TRTLLM, node=NODE)
    with pytest.raises(EngineDied, match="tensorrt_llm: not installed"):
        preflight(model, TRTLLM)  # this machine


def test_a_hub_id_that_is_not_here_is_no_reason(tmp_path: Path) -> None:
    model = ModelSpec(path="nvidia/DeepSeek-V3.2-NVFP4", stage_dir=str(tmp_path))
    assert pick(preflight(model, TRTLLM, node=NODE), "checkpoint").verdict == "warn"


def test_a_hub_cache_with_the_tokenizer_alone_is_no_broken_checkpoint(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--model" / "snapshots" / ("a" * 40)
    upload(snapshot, {"config.json": b"{}", "tokenizer.json": b"{}"})
    upload(tmp_path / "models--org--model" / "refs", {"main": b"a" * 40})
    model = ModelSpec(path="org/model", stage_dir=str(tmp_path), max_model_len=4096)
    assert pick(preflight(model, TRTLLM, node=NODE), "checkpoint").verdict == "warn"
    upload(snapshot, make_nvfp4_files())
    assert pick(preflight(model, TRTLLM, node=NODE), "checkpoint").what == "whole: 1 weight files, 0.0 GB"
    upload(snapshot, {"model.safetensors": b"123"})
    with pytest.raises(SpecError, match="too short"):
        preflight(model, TRTLLM, node=NODE)


def test_needs_are_read_from_the_section() -> None:
    needs = make_needs(TRTLLM, ModelSpec(max_model_len=5000), 100)
    assert (needs.num_gpus, needs.num_ranks, needs.max_inflight) == (8, 8, 1152)
    assert (needs.max_model_len, needs.max_tokens) == (5000, 100)


# ---- gathering


def test_this_machine() -> None:
    node = read_node("~/nowhere/yet")
    assert node.python == sys.version_info[:2]
    assert "torch" in node.packages
    assert 0 < node.free_ram_bytes < node.ram_bytes
    assert node.free_disk_bytes > 0
    assert Path(node.disk).is_dir()
    assert find_existing(Path("/no/such/folder")) == Path("/")


def test_nvidia_smi_is_read_where_nvml_is_not() -> None:
    devices, driver = parse_smi(SMI)
    ((index, _, gpu),) = devices
    assert (index, driver, gpu.name, gpu.capability) == ("0", "580.159.04", "NVIDIA H100 80GB HBM3", (9, 0))
    assert (gpu.total_bytes, gpu.free_bytes) == (81559 * 2**20, 81079 * 2**20)
    with pytest.raises(ValueError, match="not enough values"):
        parse_smi("No devices were found\n")


@pytest.mark.parametrize(
    ("visible", "chosen"),
    [(None, [0, 1, 2]), ("", []), ("2,0", [2, 0]), ("GPU-b", [1]), ("0,7,1", [0]), ("-1", []), ("NoDevFiles", [])],
)
def test_visible_devices_are_read_as_cuda_does(visible: str | None, chosen: list[int]) -> None:
    gpus = [dataclasses.replace(B200, free_bytes=number) for number in range(3)]
    devices = [(str(number), f"GPU-{'abc'[number]}{'f' * 8}", gpu) for number, gpu in enumerate(gpus)]
    assert [gpu.free_bytes for gpu in pick_visible(devices, visible)] == chosen


def test_launchers_variables_are_found() -> None:
    names = ["PATH", "SLURM_JOBID", "SLURM_CPUS_ON_NODE", "PMIX_RANK", "OMPI_MCA_btl", "TLLM_DISABLE_MPI"]
    assert list_launcher_variables(dict.fromkeys(names, "1")) == ("PMIX_RANK", "SLURM_JOBID", "TLLM_DISABLE_MPI")


def test_a_spawn_is_believed_only_whole() -> None:
    assert read_spawn("noise\nTrue Open MPI v4.1.8,  package\n", 0).is_spawning
    assert read_spawn("True Open MPI v4.1.8\n", 1).is_spawning is False
    assert read_spawn("False MPICH\n", 0).is_spawning is False
    told = read_spawn("There are not enough slots\n------\n", 1)
    assert told.reason == "it ended with 1 (There are not enough slots)"


def test_an_mpi_that_hangs_is_given_up_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for mpi4py whose import never ends, in the trial's process and in one that it starts."""
    marker = tmp_path / "child"
    (tmp_path / "mpi4py.py").write_text(
        "import pathlib, subprocess, sys, threading\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import threading; threading.Event().wait()'])\n"
        f"pathlib.Path({str(marker)!r}).write_text(str(child.pid))\n"
        "threading.Event().wait()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = try_mpi(2, {**os.environ, "PYTHONPATH": str(tmp_path)}, timeout_s=2)
    assert (found.is_spawning, found.reason) == (False, "no answer within 2 s")
    child = int(marker.read_text())
    while is_running(child):  # killed, and the kernel is still at it; the test's own time limit ends this
        threading.Event().wait(0.01)


def is_running(pid: int) -> bool:
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
