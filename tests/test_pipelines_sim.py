"""Each logical date once: schedulers killed at store operations, two at a time, heads that forget, clocks that jump."""

import json
import time

import pytest
from pipeline_sim import Faults, World

from batchgen.pipelines.partitions import list_partitions
from batchgen.pipelines.spec import PipelineSpec
from batchgen.stores.opening import opening_through


def make_spec(**changes: object) -> PipelineSpec:
    job = {
        "input": {"paths": "memory://in/{{ logical_date }}"},
        "prompt": {"column": "q"},
        "engine": {"kind": "simulated"},
        "output": {"path": "memory://out/{{ logical_time }}"},
        "cluster": {"pool": "inline"},
    }
    fields = {
        "name": "nightly",
        "state": "memory://state",
        "schedule": {
            "cron": "30 2 * * *",
            "timezone": "Europe/Berlin",
            "start": "2026-01-01T00:00:00Z",
            "catchup": True,
        },
        "max_active_runs": 2,
        "retries": {"max": 100, "delay": "10m"},
        "stages": [{"name": "generate", "job": job}],
        "publish": "memory://published",
        "retention": {"keep": 3},
        "on_success": [{"webhook": "https://example.com/x"}],
    }
    return PipelineSpec.model_validate({**fields, **changes})


def run_world(seed: int, num_days: int, **changes: object) -> World:
    world = World(make_spec(**changes), seed)
    with opening_through(lambda _: world.client):
        world.run(num_days)
    return world


def check_each_date_once(world: World, num_days: int) -> None:
    with opening_through(lambda _: world.client):
        history = world.check_log()
    dates = world.list_dates(world.start + num_days * 86_400)
    assert len(dates) >= num_days - 1
    parts = [(key, name) for key in dates for name in list_partitions(world.spec)]
    done = [part for part in parts if world.ray.num_done[part] != 1]
    assert done == [], "each partition of each logical date is carried through once"
    assert not [run for run in history.list_active() if run.key <= dates[-1]]
    assert all(history.get_state(key) == "succeeded" for key in dates)
    told = {name.rpartition("-")[0] for name in world.num_told}
    assert len(told) >= len(dates)


@pytest.mark.parametrize("seed", range(4))
def test_every_date_exactly_once(seed: int) -> None:
    world = run_world(seed, 250)
    check_each_date_once(world, 250)
    assert world.client.num_kills > 5
    assert world.num_priors > 200
    standing = {name.split("/")[3] for name in world.client.held if name.startswith("memory://out/")}
    assert len(standing) == 3, "retention keeps the newest, whatever was killed while it deleted"


def test_a_kill_at_every_twentieth_operation() -> None:
    world = World(make_spec(), 7, Faults(kills=0.05, loses=0.05))
    with opening_through(lambda _: world.client):
        world.run(100)
    check_each_date_once(world, 100)
    assert world.num_starts > 100


def test_without_catchup_a_date_is_run_once_or_skipped() -> None:
    schedule = {"cron": "0 */6 * * *", "start": "2026-01-01T00:00:00Z"}
    num_done = 0
    for seed in range(3):
        world = run_world(seed, 100, schedule=schedule, max_active_runs=1)
        with opening_through(lambda _, world=world: world.client):
            world.check_log()
        assert max(world.ray.num_done.values()) == 1
        num_done += len(world.ray.num_done)
    assert num_done > 300


# Values that can't stand in a submission id as they are, four of them, of which two may be at work.
PARTITIONED = {"partitions": {"lang": ["en", "zh Hant"], "size": ["s/m", "l"]}, "max_active_partitions": 2}


def make_partitioned() -> dict[str, object]:
    """With a folder for each."""
    stages = make_spec().model_dump(mode="json")["stages"]
    stages[0]["job"]["output"]["path"] = "memory://out/{{ logical_time }}/{{ lang }}-{{ size }}"
    return {**PARTITIONED, "stages": stages}


@pytest.mark.parametrize("seed", range(2))
def test_every_partition_of_every_date_exactly_once(seed: int) -> None:
    world = run_world(seed, 100, **make_partitioned())
    check_each_date_once(world, 100)
    assert world.client.num_kills > 5
    assert len(world.ray.num_done) >= 400
    published = json.loads(world.client.held["memory://published/latest.json"][0])
    assert list(published["outputs"]) == [f"generate/{name}" for name in list_partitions(world.spec)]
    standing = {name.split("/")[3] for name in world.client.held if name.startswith("memory://out/")}
    assert len(standing - world.ray.list_at_work()) == 3


def run_killed_at(kill_at: tuple[int, bool] | None) -> World:
    """Three dates of four partitions, one of two schedulers killed once."""
    calm = Faults(kills=0, loses=0, yields=0.05, head_dies=0, clock_jumps=0, job_fails=0.1)
    world = World(make_spec(**{**make_partitioned(), "retention": {"keep": 1}}), 3, calm)
    world.client.kill_at = kill_at
    with opening_through(lambda _: world.client):
        world.run(3)
    return world


@pytest.mark.parametrize("step", [61, pytest.param(1, marks=pytest.mark.soak)])
@pytest.mark.timeout(1800)
def test_a_kill_at_each_operation_in_turn(step: int) -> None:
    """Before it and after it: whatever was written down and not done is done by the next."""
    num_operations = run_killed_at(None).client.num_of_schedulers
    numbers, num_kills = range(1, num_operations, step), 0
    for number in numbers:
        for is_after in (False, True):
            world = run_killed_at((number, is_after))
            check_each_date_once(world, 3)
            num_kills += world.client.num_kills
    assert num_kills >= len(numbers), "after an operation that failed there is none"
    print(f"\n{num_operations} operations of two schedulers in three days, {num_kills} kills")


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("is_partitioned", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_ten_thousand_days(seed: int, is_partitioned: bool) -> None:
    started = time.monotonic()
    world = run_world(seed, 10_000, **(make_partitioned() if is_partitioned else {}))
    took_s = time.monotonic() - started
    check_each_date_once(world, 10_000)
    kind = " of four partitions" if is_partitioned else ""
    print(
        f"\n10,000 days{kind}, seed {seed}: {took_s:.1f} s, {world.client.num_operations:,} store operations, "
        f"{world.client.num_kills} kills, {world.num_starts} starts of two schedulers"
    )
