"""cluster.yaml through the cluster launcher's own code: filled out, validated and resolved as `ray up` does it, against
moto's EC2 (its table of instances is AWS's), up to the first instance."""

import copy
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import click
import pytest
import yaml
from moto import mock_aws
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.cli_logger import SilentClickException
from ray.autoscaler._private.command_runner import _with_interactive
from ray.autoscaler._private.resource_demand_scheduler import _fits, _inplace_subtract
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.sdk import get_docker_host_mount_location

from batchgen.spec import ClusterSpec

REPO = Path(__file__).parents[1]
CLUSTER = yaml.safe_load((REPO / "cluster.yaml").read_text())
HEAD, ENGINE = (CLUSTER["available_node_types"][name] for name in ("head", "engine"))
PINS = (REPO / "constraints.txt").read_text().splitlines()
JOBS = sorted((REPO / "jobs").glob("deepseek*.yaml"))


@pytest.fixture(scope="module")
def aws(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """EC2 in this process: no request leaves it. Ray writes the key pair that it makes below HOME."""
    with pytest.MonkeyPatch.context() as patch, mock_aws():
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        yield boto3.client("ec2", CLUSTER["provider"]["region"])


@pytest.fixture(scope="module")
def filled_once(aws: Any) -> dict[str, Any]:  # noqa: ARG001 - what Ray asks is answered by it
    """What `ray up` makes of the file before it asks AWS for anything but the table of instances."""
    # What is written of the engine's node is left out, to be compared with what the table says.
    silent = copy.deepcopy(CLUSTER)
    silent["available_node_types"]["engine"]["resources"] = {}
    filled: dict[str, Any] = AWSNodeProvider.fillout_available_node_types_resources(prepare_config(silent))
    engine = filled["available_node_types"]["engine"]["resources"]
    assert engine.items() >= ENGINE["resources"].items(), "as in AWS's table, or a node never has what it promised"
    validate_config(filled)
    return filled


@pytest.fixture
def filled(filled_once: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(filled_once)


def test_the_launcher_fills_out_and_accepts_it(filled: dict[str, Any]) -> None:
    validate_config(prepare_config(copy.deepcopy(CLUSTER)))
    engine = filled["available_node_types"]["engine"]["resources"]
    assert engine["accelerator_type:B200"] == 1
    assert engine["memory"] > 2**40
    assert filled["available_node_types"]["head"]["resources"]["CPU"] == 0
    commands = [*filled["head_setup_commands"], *filled["worker_setup_commands"]]
    assert commands == [], "Ray's defaults install a nightly Ray"


def test_a_misspelt_field_is_refused() -> None:
    changed = copy.deepcopy(CLUSTER) | {"idle_timeout_minuts": 15}
    with pytest.raises(Exception, match="idle_timeout_minuts"):
        validate_config(prepare_config(changed))


@pytest.mark.parametrize("job", JOBS, ids=lambda path: path.name)
def test_an_engine_node_takes_one_worker_and_no_second(filled: dict[str, Any], job: Path) -> None:
    wants = ClusterSpec(**yaml.safe_load(job.read_text())["cluster"])
    actor = {"CPU": wants.cpus_per_worker, "GPU": wants.gpus_per_worker}
    types = filled["available_node_types"]
    node = dict(types["engine"]["resources"])
    assert _fits(node, actor)
    _inplace_subtract(node, actor)
    assert not _fits(node, actor)
    assert not _fits(types["head"]["resources"], actor)
    assert not _fits(types["head"]["resources"], {"CPU": 1})
    assert wants.workers.max <= ENGINE["max_workers"] <= CLUSTER["max_workers"]


def test_jobs_for_the_cluster_are_there() -> None:
    assert [job.stem for job in JOBS] == ["deepseek_v32", "deepseek_v32_throughput"]


def test_forgotten_placeholders_stop_it(filled: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((AssertionError, SilentClickException)):  # which one: whether it prints for a terminal
        bootstrap_aws(filled)
    assert "the configured SecurityGroupIds" in capsys.readouterr().err
    assert [node["node_config"]["ImageId"] for node in (HEAD, ENGINE)] == ["ami-CHANGE_ME"] * 2


def test_resolved_nodes_have_our_group_and_role_and_nothing_is_opened(aws: Any, filled: dict[str, Any]) -> None:
    (vpc,) = aws.describe_vpcs()["Vpcs"]
    made = aws.create_security_group(GroupName="batchgen", Description="batchgen", VpcId=vpc["VpcId"])["GroupId"]
    for node in filled["available_node_types"].values():
        node["node_config"]["SecurityGroupIds"] = [made]
        node["node_config"]["ImageId"] = "ami-12345678"
    resolved = bootstrap_aws(filled)["available_node_types"]
    for name in ("head", "engine"):
        config = resolved[name]["node_config"]
        assert config["SecurityGroupIds"] == [made]
        assert config["SubnetIds"]
        assert config["IamInstanceProfile"] == {"Name": {"head": "batchgen-head", "engine": "batchgen-worker"}[name]}
    (group,) = aws.describe_security_groups(GroupIds=[made])["SecurityGroups"]
    assert group["IpPermissions"] == [], "the launcher adds no rule to a group of ours"
    names = {group["GroupName"] for group in aws.describe_security_groups()["SecurityGroups"]}
    assert names == {"default", "batchgen"}, "and makes none that is open to the world"


def test_disks_are_such_as_ebs_gives() -> None:
    for node in (HEAD, ENGINE):
        for mapping in node["node_config"]["BlockDeviceMappings"]:
            disk = mapping["Ebs"]
            assert disk["Throughput"] <= 0.25 * disk["Iops"], "gp3's limit"
            assert disk["Encrypted"]


def test_all_nodes_have_one_image_with_the_pinned_ray() -> None:
    (build,) = CLUSTER["initialization_commands"]
    assert ENGINE["initialization_commands"][0] == build
    tag, base, version = re.findall(r"--tag (\S+) .*BASE=(\S+) .*RAY_VERSION=(\S+)", build)[0]
    assert tag == CLUSTER["docker"]["image"]
    assert base == "nvcr.io/nvidia/tensorrt-llm/release:1.2.1"
    assert f"ray=={version}" in PINS
    recipe = (REPO / "jobs" / "Dockerfile").read_text()
    assert f"ARG BASE={base}\n" in recipe
    assert f"ARG RAY_VERSION={version}\n" in recipe
    assert not {"head_image", "worker_image"} & set(CLUSTER["docker"])
    (names,) = re.findall(r"grep -E '\^\((.*?)\)=='", recipe)
    assert set(names.split("|")) <= {pin.split("==")[0] for pin in PINS}


def test_the_image_is_built_from_what_is_mounted() -> None:
    (mount,) = (remote for remote, local in CLUSTER["file_mounts"].items() if local == ".")
    host = get_docker_host_mount_location(CLUSTER["cluster_name"]) + mount
    words = shlex.split(CLUSTER["initialization_commands"][0])
    assert words[-1] == host
    assert words[words.index("--file") + 1] == f"{host}/jobs/Dockerfile"
    copied = re.findall(r"^COPY (.*) \S+$", (REPO / "jobs" / "Dockerfile").read_text(), re.MULTILINE)
    for name in " ".join(copied).split():
        assert (REPO / name).exists(), name
        assert f"{name}/" not in CLUSTER["rsync_exclude"]


def test_only_token_holders_and_the_head_itself_get_in() -> None:
    docker = CLUSTER["docker"]
    assert "--env RAY_AUTH_MODE=token" in docker["run_options"]
    assert CLUSTER["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    (start,) = (command for command in CLUSTER["head_start_ray_commands"] if "--head" in command)
    assert "--dashboard-host=127.0.0.1" in start
    assert "0.0.0.0" not in (REPO / "cluster.yaml").read_text()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("part", ["head", "worker"])
def test_ray_start_understands_its_options(part: str) -> None:
    from ray.scripts import scripts  # imports Ray Serve, and warns of its models

    commands = [shlex.split(command) for command in CLUSTER[f"{part}_start_ray_commands"]]
    assert [command[:2] for command in commands] == [["ray", "stop"], ["ray", "start"]]
    parsed = scripts.start.make_context("ray start", commands[1][2:]).params
    assert parsed["head"] == (part == "head")
    if part == "head":
        assert parsed["num_cpus"] == 0
        assert parsed["autoscaling_config"] == "~/ray_bootstrap_config.yaml"
    with pytest.raises(click.UsageError):
        scripts.start.make_context("ray start", [*commands[1][2:], "--dashboard-hosts=127.0.0.1"])


def list_shell_commands() -> list[str]:
    commands = [*CLUSTER["initialization_commands"], *ENGINE["initialization_commands"]]
    return [*commands, *CLUSTER["head_start_ray_commands"], *CLUSTER["worker_start_ray_commands"]]


@pytest.mark.parametrize("command", list_shell_commands(), ids=lambda command: command.split("\n")[0][:30])
def test_shell_commands_survive_the_launchers_quoting(command: str) -> None:
    """The launcher puts each into parentheses, quoted, as an argument of a login shell."""
    (inner,) = shlex.split(_with_interactive(command)[-1])
    assert command in inner
    subprocess.run(["bash", "-n", "-c", inner], check=True, capture_output=True, text=True)


STUB = '#!/bin/bash\necho "$(basename "$0") $*" >> "$LOG"\n'


def run_nvme_script(folder: Path, mounted: str, *, has_service: bool = False, mount: str = "exit 0") -> list[str]:
    """Run it with stand-ins for what it calls; their calls."""
    (folder / "log").touch()
    stubs = {
        "mountpoint": f'[[ " {mounted} " == *" $2 "* ]]',
        "systemctl": f"exit {0 if has_service else 1}",
        "sudo": f'[ "$1" != mount ] || {mount}',
        "readlink": "printf '/dev/nvme%sn1\\n' 2 1 2 1",
    }
    for name, action in stubs.items():
        (folder / name).write_text(f"{STUB}{action}\n")
        (folder / name).chmod(0o755)
    script = ENGINE["initialization_commands"][1]
    env = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "LOG": str(folder / "log")}
    done = subprocess.run(["bash", "-c", f"true && ({script})"], env=env, capture_output=True, text=True)
    calls = (folder / "log").read_text().splitlines()
    return [call for call in calls if call.startswith("sudo ")] + [f"exit {done.returncode}"]


def test_nvme_that_is_there_is_left_alone(tmp_path: Path) -> None:
    assert run_nvme_script(tmp_path, mounted="/nvme") == ["exit 0"]


def test_nvme_of_the_image_is_taken(tmp_path: Path) -> None:
    calls = run_nvme_script(tmp_path, mounted="/opt/dlami/nvme", has_service=True)
    assert "sudo systemctl start dlami-nvme.service" in calls
    assert "sudo mount --bind /opt/dlami/nvme /nvme" in calls
    assert not any("mdadm" in call for call in calls)
    assert calls[-1] == "exit 0"


def test_bare_nvme_becomes_one_disk(tmp_path: Path) -> None:
    calls = run_nvme_script(tmp_path, mounted="")
    assert "sudo mdadm --create /dev/md0 --run --force --level=0 --raid-devices=2 /dev/nvme1n1 /dev/nvme2n1" in calls
    assert "sudo mount -o noatime /dev/md0 /nvme" in calls
    assert calls[-2:] == ["sudo mkdir -p -m 1777 /nvme/models /nvme/ray", "exit 0"]


def test_a_node_without_its_nvme_is_not_used(tmp_path: Path) -> None:
    calls = run_nvme_script(tmp_path, mounted="", mount="exit 32")
    assert calls[-1] != "exit 0"
    assert not any("/nvme/models" in call for call in calls)
