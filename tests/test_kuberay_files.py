"""jobs/kuberay/ against the fields of KubeRay's custom resource definitions that it uses: `kuberay_schema.yaml`."""

import copy
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from batchgen.serve.deployment import AppArgs
from batchgen.spec import ClusterSpec

REPO = Path(__file__).parents[1]
FOLDER = REPO / "jobs" / "kuberay"
SCHEMA = yaml.safe_load((REPO / "tests" / "kuberay_schema.yaml").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
NAMES = ["raycluster.yaml", "rayjob.yaml", "rayservice.yaml", "cronjob.yaml"]


def read_documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def read_file(name: str) -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load((FOLDER / name).read_text())
    return tree


def read_cluster() -> dict[str, Any]:
    spec: dict[str, Any] = read_file("raycluster.yaml")["spec"]
    return spec


def list_containers() -> list[dict[str, Any]]:
    spec = read_cluster()
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    return [container for group in groups for container in group["template"]["spec"]["containers"]]


def list_objects(tree: Any) -> Iterator[dict[str, Any]]:
    """Every mapping of a file, outermost first."""
    if isinstance(tree, dict):
        yield tree
    for value in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from list_objects(value)


def test_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("name", NAMES)
def test_every_field_is_one_of_kuberays(name: str) -> None:
    for tree in read_documents(name):
        VALIDATOR.validate(tree)


@pytest.mark.parametrize("name", NAMES)
def test_a_misspelt_field_fails_wherever_it_is(name: str) -> None:
    """Each field of each object in turn gets a letter too many. Only maps of free names may take that."""
    assert sum(map(misspell_each_field, read_documents(name))) > 40


def misspell_each_field(tree: dict[str, Any]) -> int:
    """How many fields there were."""
    free = {"rayStartParams", "nodeSelector", "limits", "requests"}
    num_fields = 0
    for number, found in enumerate(list_objects(tree)):
        parents = [key for other in list_objects(tree) for key, value in other.items() if value is found]
        if parents and parents[-1] in free:
            continue
        for field in found:
            changed = copy.deepcopy(tree)
            target = list(list_objects(changed))[number]
            target[f"{field}x"] = target.pop(field)
            with pytest.raises(jsonschema.ValidationError):
                VALIDATOR.validate(changed)
            num_fields += 1
    return num_fields


def set_replicas(tree: dict[str, Any]) -> None:
    tree["spec"]["workerGroupSpecs"][0]["maxReplicas"] = "8"


def set_param(tree: dict[str, Any]) -> None:
    tree["spec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0


def set_mode(tree: dict[str, Any]) -> None:
    tree["spec"]["authOptions"]["mode"] = "tokens"


def set_memory(tree: dict[str, Any]) -> None:
    tree["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"] = "1 TB"


@pytest.mark.parametrize("change", [set_replicas, set_param, set_mode, set_memory])
def test_a_value_of_the_wrong_kind_fails(change: Callable[[dict[str, Any]], None]) -> None:
    tree = read_file("raycluster.yaml")
    change(tree)
    with pytest.raises(jsonschema.ValidationError):
        VALIDATOR.validate(tree)


def test_the_jobs_cluster_is_the_cluster() -> None:
    assert read_file("rayjob.yaml")["spec"]["rayClusterSpec"] == read_cluster()


def test_the_services_cluster_is_the_cluster_with_a_port_and_keys() -> None:
    cluster = read_file("rayservice.yaml")["spec"]["rayClusterConfig"]
    head = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert head["ports"].pop() == {"name": "serve", "containerPort": 8000}
    keys = {"secretKeyRef": {"name": "batchgen-keys", "key": "keys"}}
    assert head["env"].pop() == {"name": "BATCHGEN_API_KEYS", "valueFrom": keys}
    assert cluster == read_cluster()


def test_the_services_application_is_jobs_serve_yaml_open_to_the_pods_neighbours() -> None:
    from ray.serve.schema import ServeDeploySchema  # loads all of Serve

    deployed = ServeDeploySchema.model_validate(yaml.safe_load(read_file("rayservice.yaml")["spec"]["serveConfigV2"]))
    ours = ServeDeploySchema.model_validate(yaml.safe_load((REPO / "jobs" / "serve.yaml").read_text()))
    assert deployed.applications == ours.applications
    assert (deployed.http_options.host, ours.http_options.host) == ("0.0.0.0", "127.0.0.1")
    AppArgs.model_validate(ours.applications[0].args)


def test_versions_are_those_of_the_pinned_ones() -> None:
    pins = (REPO / "constraints.txt").read_text().splitlines()
    assert f"ray=={read_cluster()['rayVersion']}" in pins
    assert len({container["image"] for container in list_containers()}) == 1


def test_nothing_secret_is_written_down() -> None:
    """Credentials come by secretKeyRef; the token by authOptions, which does the same."""
    assert read_cluster()["authOptions"] == {"mode": "token"}
    env = [variable for container in list_containers() for variable in container["env"]]
    assert env
    assert all(set(variable) == {"name", "valueFrom"} and "secretKeyRef" in variable["valueFrom"] for variable in env)


def test_the_gpu_group_scales_from_nothing_and_the_head_takes_no_worker() -> None:
    spec = read_cluster()
    (group,) = spec["workerGroupSpecs"]
    assert spec["enableInTreeAutoscaling"]
    assert (group["minReplicas"], group["replicas"]) == (0, 0)
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_a_gpu_pod_fits_one_worker_and_no_second() -> None:
    (group,) = read_cluster()["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    has = container["resources"]["limits"]
    assert has == container["resources"]["requests"], "Ray counts the limits, Kubernetes places by the requests"
    jobs = sorted((REPO / "jobs").glob("deepseek*.yaml"))
    assert jobs
    for job in jobs:
        wants = ClusterSpec(**yaml.safe_load(job.read_text())["cluster"])
        assert 1 <= int(has["nvidia.com/gpu"]) / wants.gpus_per_worker < 2
        assert wants.cpus_per_worker <= int(has["cpu"])


def test_every_mount_has_its_volume() -> None:
    for group in read_cluster()["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        mounted = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_the_entry_point_exists() -> None:
    program, script, spec = read_file("rayjob.yaml")["spec"]["entrypoint"].split()
    assert (program, spec.endswith(".yaml")) == ("python", True)
    assert (REPO / Path(script).relative_to("/app/batchgen")).is_file()
    assert "WORKDIR /app/batchgen" in (REPO / "jobs" / "Dockerfile").read_text()


def test_the_cron_job_makes_a_ray_job_named_by_its_date(tmp_path: Path) -> None:
    """Its own shell command, run with a kubectl that only writes down what it is given."""
    documents = {tree["kind"]: tree for tree in yaml.safe_load_all((FOLDER / "cronjob.yaml").read_text())}
    pod = documents["CronJob"]["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["serviceAccountName"] == documents["ServiceAccount"]["metadata"]["name"]
    assert documents["RoleBinding"]["subjects"][0]["name"] == pod["serviceAccountName"]
    assert documents["RoleBinding"]["roleRef"]["name"] == documents["Role"]["metadata"]["name"]
    assert {volume["name"] for volume in pod["volumes"]} == {mount["name"] for mount in container["volumeMounts"]}
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(f"#!/bin/sh\necho $@ > {tmp_path}/arguments\ncat > {tmp_path}/made.yaml\n")
    kubectl.chmod(0o755)
    shell, options, script = container["command"]
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run([shell, options, script.replace("/rayjob/", f"{FOLDER}/")], env=env, check=True, timeout=100)
    made = yaml.safe_load((tmp_path / "made.yaml").read_text())
    VALIDATOR.validate(made)
    date = made["metadata"]["name"].removeprefix("batchgen-")
    assert made["spec"]["entrypoint"].split()[-2:] == ["--date", date]
    assert made["spec"]["rayClusterSpec"] == read_cluster()
    assert (tmp_path / "arguments").read_text().split() == ["create", "--filename", "-"]
