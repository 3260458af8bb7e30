"""Fixtures that more than one test file needs."""

import ast
import functools
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import s3fs
from hypothesis import settings
from openai_server import OpenAIServer, run_openai_server
from ray_cluster import RayCluster, run_ray_cluster
from s3_server import S3Proxy, S3Server, make_env, run_s3_server

from batchgen.storage import Storage

# Two threads of torch that share two cores with another test process wait for each other most of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# An example that takes long on a machine that does other things as well is no finding.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


class _AwsEnvironment:
    """What its repr shows is part of the key of s3fs's cache of clients."""

    def __repr__(self) -> str:
        return repr(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))


# A client is made from the environment, which s3fs doesn't look at when it looks for one that it has: a test that sets
# another endpoint or no keys would get the last test's. Making one anew for every test costs 0.3 s each.
s3fs.S3FileSystem.aws_environment = _AwsEnvironment()
s3fs.S3FileSystem._extra_tokenize_attributes = (*s3fs.S3FileSystem._extra_tokenize_attributes, "aws_environment")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that take hours run only where `-m` names them, whatever else it says. Of several processes (`make test`), one
    begins with all that starts Ray, which takes longest."""
    if "soak" not in config.option.markexpr:
        soaks = [item for item in items if item.get_closest_marker("soak")]
        config.hook.pytest_deselected(items=soaks)
        items[:] = [item for item in items if item not in soaks]
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: find_group(item.nodeid) != "ray")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests stay in one process, with what they start for each other; all that start Ray in the same one, or two
    clusters would share two cores. (xdist's own groups are lost on pytest 9.2: they write an attribute that it no longer
    reads.)"""
    from xdist.scheduler import LoadScopeScheduling

    class Schedule(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return find_group(nodeid)

    config.option.loadscopereorder = False
    return Schedule(config, log)


def find_group(nodeid: str) -> str:
    path, _, name = nodeid.partition("::")
    marked = _list_marked(Path(__file__).parent / Path(path).name)
    return "ray" if marked & {name.partition("[")[0], "pytestmark"} else path


@functools.cache
def _list_marked(file: Path) -> set[str]:
    """Tests that the file marks with `ray`, by its text: the process that shares the tests out collects none. `pytestmark`
    where it marks them all."""
    found = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef) and any("mark.ray" in ast.unparse(each) for each in node.decorator_list):
            found.add(node.name)
        elif isinstance(node, ast.Assign) and "mark.ray" in ast.unparse(node.value):
            found |= {ast.unparse(target) for target in node.targets}
    return found


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    with run_s3_server() as server:
        yield server


@pytest.fixture(scope="session")
def cluster_proxy(s3_server: S3Server) -> Iterator[S3Proxy]:
    """Between the S3 server and all that runs on `cluster`."""
    with S3Proxy(s3_server.endpoint).running() as proxy:
        yield proxy


@pytest.fixture(scope="session")
def shared_cluster(cluster_proxy: S3Proxy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    with run_ray_cluster(tmp_path_factory.mktemp("home"), make_env(cluster_proxy.endpoint), num_gpus=1) as cluster:
        yield cluster


@pytest.fixture
def cluster(shared_cluster: RayCluster) -> Iterator[RayCluster]:
    """One for all files that take it as it comes, for a start takes ten seconds. Nodes are a test's own."""
    yield shared_cluster
    shared_cluster.stop_nodes()


@pytest.fixture(scope="session")
def openai_process() -> Iterator[OpenAIServer]:
    with run_openai_server() as server:
        yield server


@pytest.fixture
def openai_server(openai_process: OpenAIServer, monkeypatch: pytest.MonkeyPatch) -> OpenAIServer:
    """A server that behaves, until it is told otherwise; no key is set."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    openai_process.reset()
    return openai_process


@pytest.fixture
def s3_url(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh folder on the S3 server; the environment of this process and its children leads there."""
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    return f"s3://{s3_server.bucket}/{uuid.uuid4().hex} with space/é"


@pytest.fixture
def s3_proxy(s3_server: S3Server, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Proxy]:
    """Between this process (or its children) and the server; ask for `s3_url` too."""
    del s3_url
    with S3Proxy(s3_server.endpoint).running() as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


@pytest.fixture
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    kind = request.param
    if kind == "local":
        yield str(tmp_path / "a folder é%20#1")
    elif kind == "memory":
        url = f"memory://{uuid.uuid4().hex}/é x"
        yield url
        Storage(url).delete_many([info.path for info in Storage(url).list_files()])
    else:
        url = request.getfixturevalue("s3_url")
        if kind != "s3":
            proxy = request.getfixturevalue("s3_proxy")
            proxy.refuses_conditions, proxy.ignores_conditions = kind == "s3-refusing", kind == "s3-ignoring"
        yield url


@pytest.fixture
def store(request: pytest.FixtureRequest, root: str) -> Storage:
    """As a run would open it: knowing what its probe would have said."""
    is_sure = request.node.callspec.params["root"] in {"local", "memory", "s3"}
    return Storage(root, is_exclusive=is_sure, can_replace=is_sure)
