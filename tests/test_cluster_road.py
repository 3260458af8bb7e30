"""docs/cluster.md from an empty account to a head node and back: the real `aws`, `ray up` and `ray down` on moto's AWS.
A parameter that AWS would refuse for its form is refused here, before a node is paid for."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from shutil import copytree
from typing import Any

import boto3
import pytest
from s3_server import S3Server, run_s3_server

pytestmark = [pytest.mark.soak, pytest.mark.timeout(400)]

REPO = Path(__file__).parents[1]
PAGE = (REPO / "docs" / "cluster.md").read_text()
BIN = Path(sys.executable).parent
# What leaves this machine, and calls that moto lacks: these are checked by the command line alone (it prints what an answer
# would look like), and the image is one of moto's. Everything else of the page is run.
STUBS = """
hf() { mkdir -p weights/.cache && echo {} > weights/config.json && echo x > weights/.cache/x; }
curl() { echo 203.0.113.7; }
aws() {
  case "$1 $2" in
    "service-quotas get-service-quota" | "ec2 describe-capacity-block-offerings")
      command aws "$@" --generate-cli-skeleton output ;;
    "ssm get-parameter")
      command aws "$@" --generate-cli-skeleton output > /dev/null
      command aws ec2 describe-images --query 'Images[0].ImageId' --output text ;;
    *) command aws "$@" ;;
  esac
}
"""


@pytest.fixture(scope="module")
def account() -> Iterator[S3Server]:
    """An account of its own: other tests' buckets are not in it."""
    with run_s3_server() as server:
        yield server


def list_blocks(title: str) -> list[str]:
    (section,) = re.findall(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    return re.findall(r"```sh\n(.*?)```", section, re.DOTALL)


def make_shell_env(folder: Path, server: S3Server) -> dict[str, str]:
    """A user's shell with nothing of this machine's own accounts. No node of moto's answers to ssh."""
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / "ssh").write_text("#!/bin/sh\nexit 255\n")
    (folder / "bin" / "ssh").chmod(0o755)
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_"))}
    return (
        keep
        | server.env
        | {
            "HOME": str(folder),
            "TMPDIR": str(folder),
            "PATH": f"{folder / 'bin'}:{BIN}:{keep['PATH']}",
        }
    )


def paste(script: str, folder: Path, server: S3Server) -> str:
    aws = shutil.which("aws")
    if aws is None:
        pytest.skip("no AWS command line on this machine: pip install awscli, apart from our environment")
    command, env = ["bash", "-e", "-c", script], make_shell_env(folder, server)
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def clone(account: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which section 1 has been pasted."""
    folder = tmp_path_factory.mktemp("clone")
    copytree(REPO / "jobs", folder / "jobs", ignore=lambda _, names: {"__pycache__"} & set(names))
    shutil.copy(REPO / "cluster.yaml", folder)
    paste(STUBS + "\n".join(list_blocks("1. Once per account")), folder, account)
    return folder


def ask(account: S3Server, service: str) -> Any:
    return boto3.client(
        service,
        "us-east-1",
        endpoint_url=account.endpoint,
        aws_access_key_id=account.env["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=account.env["AWS_SECRET_ACCESS_KEY"],
    )


def test_the_account_is_set_up_as_the_page_says(clone: Path, account: S3Server) -> None:
    s3, iam, ec2 = (ask(account, service) for service in ("s3", "iam", "ec2"))
    (rule,) = s3.get_bucket_lifecycle_configuration(Bucket="my-batchgen")["Rules"]
    assert rule["AbortIncompleteMultipartUpload"] == {"DaysAfterInitiation": 2}
    keys = [item["Key"] for item in s3.list_objects_v2(Bucket="my-batchgen")["Contents"]]
    assert keys == ["models/DeepSeek-V3.2-NVFP4/config.json"], "without the downloader's own files"
    policy = iam.get_role_policy(RoleName="batchgen-worker", PolicyName="s3")["PolicyDocument"]
    assert [part["Resource"] for part in policy["Statement"]] == [
        "arn:aws:s3:::my-batchgen",
        "arn:aws:s3:::my-batchgen/*",
    ]
    nodes = json.dumps(iam.get_role_policy(RoleName="batchgen-head", PolicyName="nodes")["PolicyDocument"])
    assert "arn:aws:iam::123456789012:role/batchgen-worker" in nodes
    (group,) = ec2.describe_security_groups(GroupNames=["batchgen"])["SecurityGroups"]
    opened = {
        (
            rule.get("FromPort"),
            *(each["CidrIp"] for each in rule["IpRanges"]),
            *(each["GroupId"] for each in rule["UserIdGroupPairs"]),
        )
        for rule in group["IpPermissions"]
    }
    assert opened == {(22, "203.0.113.7/32"), (None, group["GroupId"])}, "its own members, and ssh from one address"
    filled = (clone / "cluster.yaml").read_text()
    assert group["GroupId"] in filled
    assert "CHANGE_ME" not in re.sub("#.*", "", filled)


def list_running(account: S3Server) -> list[dict[str, Any]]:
    found = ask(account, "ec2").describe_instances(
        Filters=[
            {"Name": "tag:ray-cluster-name", "Values": ["batchgen"]},
            {"Name": "instance-state-name", "Values": ["pending", "running"]},
        ]
    )
    return [instance for reservation in found["Reservations"] for instance in reservation["Instances"]]


def test_the_launcher_starts_a_head_and_ends_it(clone: Path, account: S3Server) -> None:
    """`ray up` is ended where it waits for ssh: behind the instance there is no machine."""
    up, *_ = [line for block in list_blocks("2. Up") for line in block.splitlines() if line.startswith("ray up ")]
    (token,) = [
        line for block in list_blocks("2. Up") for line in block.splitlines() if line.startswith("ray get-auth")
    ]
    down, look = list_blocks("5. Down")[0].split("\n", 1)
    paste(token, clone, account)
    command, env = ["bash", "-c", f"exec {up.split('#')[0]}"], make_shell_env(clone, account)
    with (clone / "up.log").open("w") as log:
        launcher = subprocess.Popen(command, cwd=clone, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        give_up_at = time.monotonic() + 60
        while not list_running(account):
            assert launcher.poll() is None, (clone / "up.log").read_text()[-3000:]
            assert time.monotonic() < give_up_at, (clone / "up.log").read_text()[-3000:]
            time.sleep(0.3)
    finally:
        os.killpg(launcher.pid, signal.SIGKILL)
        launcher.wait()
    (head,) = list_running(account)
    assert head["InstanceType"] == "m7i.4xlarge"
    assert head["IamInstanceProfile"]["Arn"].endswith("/batchgen-head")
    (group,) = head["SecurityGroups"]
    assert group["GroupName"] == "batchgen"
    paste(down, clone, account)
    assert json.loads(paste(look, clone, account)) == []
