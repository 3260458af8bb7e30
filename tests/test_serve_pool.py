"""A run's workers on shared engines of a real Ray: letting go of one waits for nobody."""

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray

from batchgen.queue.events import PoolEvent, WorkerStarted, WorkerStartFailed
from batchgen.serve.batch_spec import make_batch_spec
from batchgen.serve.ray_engines import SharedEngines
from batchgen.serve.ray_shared_pool import SharedPool
from batchgen.serve.spec import ServedModel
from batchgen.storage import Storage
from batchgen.worker.setup import WorkerSetup

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    folder = tempfile.mkdtemp(prefix="bg", dir="/tmp")
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        namespace="batchgen",
        log_to_driver=False,
        _temp_dir=folder,
    )
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def make_pool(folder: Path, num_engines: int, **cluster: Any) -> tuple[SharedEngines, SharedPool]:
    workers = {"min": 1, "max": num_engines}
    served = ServedModel.model_validate({"engine": {"kind": "simulated"}, "cluster": {"workers": workers, **cluster}})
    engines = SharedEngines(str(folder), "m", served)
    spec = make_batch_spec(served, "text", input_url=str(folder / "in"), out_url=str(folder / "out"))
    setup = WorkerSetup("w0", spec, 1, Storage(spec.output.path), pa.schema([]))
    return engines, SharedPool(setup, engines, "batch", time.time() + 3600)


def wait_for(pool: SharedPool, engines: SharedEngines, kind: type[PoolEvent]) -> Any:
    while True:
        engines.look()
        for event in pool.poll(0.2):
            if isinstance(event, WorkerStartFailed):
                assert kind is WorkerStartFailed, event.reason
            if isinstance(event, kind):
                return event


def end(engines: SharedEngines) -> None:
    for name in [each.name for each in engines._engines.values()]:
        engines.retire(engines._engines[name])


def test_workers_on_engines_that_wait_for_room_go_at_once(tmp_path: Path) -> None:
    engines, pool = make_pool(tmp_path, 3, cpus_per_worker=1000)
    engines.look()
    for number in range(3):
        pool.start_worker(f"w{number}")
    for number in range(3):
        pool.kill(f"w{number}")
    assert pool.num_leaving == 0
    pool.start_worker("w3")  # the engine is still there for the next one
    assert pool.poll(0.0) == []
    pool.close()
    end(engines)


def test_an_engine_is_no_others_until_its_worker_has_let_go(tmp_path: Path) -> None:
    engines, pool = make_pool(tmp_path, 1)
    engines.look()
    pool.start_worker("w0")
    wait_for(pool, engines, WorkerStarted)
    pool.kill("w0")
    assert pool.num_leaving == 1  # told, and not waited for
    pool.start_worker("w1")
    assert wait_for(pool, engines, WorkerStarted).info.worker_id == "w1"
    assert pool.num_leaving == 0
    pool.start_worker("w2")
    assert wait_for(pool, engines, WorkerStartFailed).worker_id == "w2"
    pool.close()
    assert pool.num_leaving == 0
    end(engines)
