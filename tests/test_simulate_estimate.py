"""From a spec and lengths to an estimate: aggregated against exact, intervals, policies, refusals, the command."""

import json
import math
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from makers import make_job_spec

from batchgen.errors import InputError, SpecError
from batchgen.simulate.engine import EngineModel
from batchgen.simulate.estimate import estimate, find_utilisation, spread
from batchgen.simulate.fluid import run_aggregated
from batchgen.simulate.from_spec import Asked, list_variants, make_scenario
from batchgen.simulate.plot import bin_run, make_sparkline, make_svg
from batchgen.simulate.policies import Policies, WorkerModel
from batchgen.simulate.profile import measure
from batchgen.simulate.record import ClusterModel, Moment, Surroundings, VirtualRun
from batchgen.simulate.scenario import Scenario, run_exactly
from batchgen.simulate.sources import choose_lengths, read_lengths
from batchgen.simulate.step_cost import StepCost
from batchgen.simulate.workload import MAX_RESAMPLED, Workload, make_lengths, make_lognormal
from batchgen.spec import ClusterSpec, JobSpec

LENGTHS = make_lognormal(200, 0.8, 100)
SLOTS = 32


def make_spec(**engine: Any) -> JobSpec:
    engine = {"kind": "tensorrt_llm"} | engine
    return JobSpec.model_validate(
        {
            "input": {"paths": "in"},
            "prompt": {"column": "p"},
            "engine": engine,
            "sampling": {"max_tokens": 20_000},
            "output": {"path": "out"},
            "cluster": {"workers": {"min": 2, "max": 2}, "gpus_per_worker": 8},
        }
    )


def make_small(num_workers: int = 2, losses_per_hour: float = 0.0) -> Scenario:
    cluster = ClusterSpec.model_validate({"workers": {"min": num_workers, "max": num_workers}, "max_starting": 8})
    engine = EngineModel(StepCost(0.02, 1e-4, 1e-8, 1e-8), num_ranks=2, max_batch_size=SLOTS // 2)
    return Scenario(
        num_rows=1500,
        rows_per_shard=50,
        worker=WorkerModel(engine, Policies(), window=SLOTS),
        cluster=ClusterModel(cluster, Surroundings(20.0, 0.1, losses_per_hour), tail=None),
        workload=Workload(LENGTHS, 2000),
    )


# ---- aggregated


@pytest.mark.parametrize("num_workers", [1, 3])
def test_aggregated_takes_as_long_as_row_by_row(num_workers: int) -> None:
    scenario = make_small(num_workers)
    profile = measure(scenario)
    exact = sum(run_exactly(scenario.with_seed(seed)).makespan_s for seed in range(3)) / 3
    shards = sum(run_aggregated(scenario.with_seed(seed), profile).makespan_s for seed in range(3)) / 3
    assert shards == pytest.approx(exact, rel=0.05)


def test_aggregated_loses_no_row_when_workers_are_lost() -> None:
    scenario = make_small(3, losses_per_hour=30.0)
    profile = measure(scenario)
    records = [run_aggregated(scenario.with_seed(seed), profile) for seed in range(5)]
    assert {record.num_rows for record in records} == {1500}
    assert sum(record.num_losses for record in records) > 0


def test_a_thousand_engines_are_run_by_shards_in_a_moment() -> None:
    scenario = make_small(1000)
    large = replace(
        scenario, num_rows=10**7, rows_per_shard=2000, cluster=replace(scenario.cluster, beat_s=30.0, moment_s=300.0)
    )
    profile = measure(scenario)
    record = run_aggregated(large, profile)
    assert record.num_rows == 10**7
    assert record.num_shards == 5000
    assert record.makespan_s > 10**7 / profile.rows_per_s / 1000


# ---- the estimate


def test_the_interval_holds_the_middle_and_grows_with_what_is_not_known() -> None:
    known = make_small()
    few = make_lengths({(100, tokens): 1 for tokens in (10, 20, 50, 100, 200, 500, 1500)})
    sure = estimate(known, num_runs=9, seed=1)
    unsure = estimate(replace(known, workload=replace(known.workload, lengths=few)), num_runs=9, seed=1)
    for found in (sure, unsure):
        low, middle, high = found.makespan_s
        assert low <= middle <= high
        assert 0 < found.utilisation <= 1
    widths = [(found.makespan_s[2] - found.makespan_s[0]) / found.makespan_s[1] for found in (sure, unsure)]
    assert widths[1] > 2 * widths[0]


def test_the_same_seed_gives_the_same_estimate() -> None:
    assert estimate(make_small(), num_runs=3, seed=5) == estimate(make_small(), num_runs=3, seed=5)


def test_nine_of_ten_values_lie_in_the_interval() -> None:
    assert spread([5.0]) == (5.0, 5.0, 5.0)
    assert spread([3.0, 1.0, 2.0]) == (1.0, 2.0, 3.0)
    low, middle, high = spread([float(value) for value in range(1, 100)])
    assert (low, middle, high) == (5.0, 50.0, 95.0)


def test_utilisation_counts_slots_of_workers_that_are_up() -> None:
    moments = [
        Moment(0, 0, 0, 0, 1),
        Moment(10, 0, SLOTS, 1, 0),
        Moment(20, 9, SLOTS / 2, 1, 0),
        Moment(30, 9, 0, 1, 0),
    ]
    assert find_utilisation(VirtualRun(moments=moments), make_small()) == pytest.approx(0.75)


def test_a_large_sample_is_not_drawn_again() -> None:
    lengths = make_lengths({(1, 5): 10**9, (1, 50): 10**9})
    assert lengths.num_rows > MAX_RESAMPLED
    assert lengths.resample("1") is lengths


# ---- the run's limits


def test_gpu_hours_end_a_virtual_run_as_they_end_a_real_one() -> None:
    scenario = make_small()
    limited = scenario.cluster.cluster.model_copy(update={"max_gpu_hours": 0.5, "gpus_per_worker": 8.0})
    record = run_exactly(replace(scenario, cluster=replace(scenario.cluster, cluster=limited)))
    assert record.stop is not None
    assert 0 < record.num_rows < 1500
    assert record.gpu_s <= 0.5 * 3600


def test_a_deadline_counts_from_when_the_run_would_begin() -> None:
    deadline = datetime(2026, 11, 28, 6, tzinfo=UTC)
    spec = make_job_spec(engine={"kind": "simulated", "slots": 4}, cluster={"deadline": deadline, "drain_s": 60})
    lengths = make_lognormal(100, 1.0, 100)

    def run(left_s: float) -> VirtualRun:
        asked = Asked(50, Surroundings(10.0, 0.0), began_at=deadline.timestamp() - left_s)
        return run_exactly(make_scenario(spec, lengths, asked))

    assert run(10 * 86_400).stop is None
    assert "is reached" in (run(70).stop or "")
    assert "50 of 50 rows are missing" in (run(-1).stop or "")


def test_a_job_whose_workers_all_die_at_once_is_given_up() -> None:
    """No row would ever be finished: told, and not simulated for ever."""
    scenario = make_small()
    lost = replace(scenario.cluster, surroundings=Surroundings(10.0, 0.0, losses_per_hour=1e9))
    assert "hardly ends" in (run_exactly(replace(scenario, cluster=lost)).stop or "")


# ---- from a spec


def test_a_scenario_is_what_the_spec_asks_for() -> None:
    scenario = make_scenario(make_spec(max_batch_size=64, max_inflight=512), LENGTHS, Asked(1000, Surroundings()))
    assert scenario.worker.engine.max_batch_size == 64
    assert scenario.worker.engine.num_ranks == 8
    assert scenario.worker.window == 512
    assert scenario.workload.max_tokens == 20_000
    assert scenario.cluster.cluster.workers.max == 2
    other = make_scenario(make_spec(), LENGTHS, Asked(1000, Surroundings(), num_engines=7))
    assert other.cluster.cluster.workers.min == other.cluster.cluster.workers.max == 7
    assert scenario.workload.hint_sigma is None


def test_each_policy_is_turned_round_once() -> None:
    spec = make_spec()
    scenario = make_scenario(spec, LENGTHS, Asked(1000, Surroundings()))
    for name, is_on, variant in list_variants(scenario, spec):
        assert variant != scenario, name
        again = {other: back for other, _, back in list_variants(variant, spec)}
        if name == "split of the tail":
            assert (variant.cluster.tail is None) is not is_on
        else:
            assert again[name] == scenario or name == "token budgets"
    simulated = make_spec(kind="simulated")
    names = [
        name for name, _, _ in list_variants(make_scenario(simulated, LENGTHS, Asked(9, Surroundings())), simulated)
    ]
    assert names == ["order by length", "split of the tail"]


@pytest.mark.parametrize(
    ("engine", "named"),
    [
        ({"kind": "transformers"}, "engine.kind: 'transformers' has no model"),
        (
            {"tensor_parallel_size": 4},
            "engine.tensor_parallel_size: 4 has no model; simulate with --set engine.tensor_parallel_size=8",
        ),
        ({"scheduler_policy": "MAX_UTILIZATION"}, "engine.scheduler_policy: MAX_UTILIZATION has no model"),
        ({"kv_cache_dtype": "auto"}, "engine.kv_cache_dtype: auto has no model"),
        ({"enable_attention_dp": False}, "engine.enable_attention_dp: False has no model"),
    ],
)
def test_what_has_no_model_is_refused(engine: dict[str, Any], named: str) -> None:
    with pytest.raises(SpecError, match=named):
        make_scenario(make_spec(**engine), LENGTHS, Asked(10, Surroundings()))


# ---- lengths


def choose(**given: Any) -> Any:
    options = {"lengths_file": None, "from_out": None, "mean_tokens": None, "sigma": 1.0, "prompt_tokens": 77} | given
    return choose_lengths(make_spec(), **options)


def test_lengths_come_from_a_parquet_file(tmp_path: Path) -> None:
    path = str(tmp_path / "rows.parquet")
    pq.write_table(pa.table({"completion_tokens": [5, 5, None, 9, 0], "prompt_tokens": [1, 1, 1, 2, 3]}), path)
    assert read_lengths(path, 77) == make_lengths({(1, 5): 2, (2, 9): 1})
    pq.write_table(pa.table({"completion_tokens": [5]}), path)
    assert choose(lengths_file=path) == (make_lengths({(77, 5): 1}), path)


def test_stated_lengths_say_that_they_are_stated() -> None:
    lengths, source = choose(mean_tokens=100.0)
    assert lengths.mean() == pytest.approx(100, rel=0.02)
    assert source.startswith("stated")


def test_lengths_come_from_an_earlier_run(tmp_path: Path) -> None:
    (tmp_path / "_batchgen").mkdir()
    facts = {"format_version": 1, "lengths": "7.20:10 .24:5"}
    (tmp_path / "_batchgen/lengths.json").write_text(json.dumps(facts))
    lengths, source = choose(from_out=str(tmp_path))
    assert source == str(tmp_path)
    assert lengths.num_rows == 15
    assert {prompt for prompt, _ in lengths.pairs} == {77, round(2**7 * math.sqrt(0.5))}


def test_lengths_that_are_not_there_are_refused_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    for table, named in [
        (pa.table({"tokens": [1]}), "has no column completion_tokens"),
        (pa.table({"completion_tokens": ["a"]}), "must be a whole number"),
        (pa.table({"completion_tokens": [0]}), "no row has completion_tokens above 0"),
    ]:
        pq.write_table(table, path)
        with pytest.raises(InputError, match=named):
            choose(lengths_file=str(path))
    path.write_text("text")
    with pytest.raises(InputError, match="can't be read as Parquet"):
        choose(lengths_file=str(path))
    with pytest.raises(InputError, match="nothing says how long the answers are: give --lengths"):
        choose()
    with pytest.raises(InputError, match="--lengths and --mean-tokens"):
        choose(lengths_file=str(path), mean_tokens=3.0)
    with pytest.raises(InputError, match="no measured lengths"):
        choose(from_out=str(tmp_path))


# ---- pictures


def test_bins_keep_the_tokens() -> None:
    moments = [Moment(0, 0, 0, 0, 1), Moment(7, 10, 0, 1, 0), Moment(9, 40, 0, 1, 0), Moment(20, 100, 0, 2, 0)]
    tokens, ready = bin_run(VirtualRun(makespan_s=20.0, moments=moments), 6)
    assert sum(tokens) * 20 / 6 == pytest.approx(100)
    assert max(ready) <= 2
    assert make_sparkline([0.0, 0.5, 1.0]) == " ▄█"
    assert make_sparkline([0.0]) == " "


def test_the_svg_is_well_formed_and_says_its_title() -> None:
    record = run_exactly(make_small())
    root = ET.fromstring(make_svg(record, "rows & <more>"))
    texts = [element.text or "" for element in root.iter() if element.tag.endswith("text")]
    assert texts[0] == "rows & <more>"
    assert sum(1 for element in root.iter() if element.tag.endswith("polyline")) == 2


# ---- the command

SPEC = """
input: {paths: /nowhere/in}
prompt: {column: p}
engine: {kind: simulated, slots: 16, max_inflight: 20}
sampling: {max_tokens: 500}
output: {path: /nowhere/out}
cluster: {workers: {min: 2, max: 2}, gpus_per_worker: 8}
"""


def run_command(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "spec.yaml").write_text(SPEC)
    command = [sys.executable, "-m", "batchgen.cli", "simulate", str(tmp_path / "spec.yaml"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_command_tells_time_gpus_cost_and_policies(tmp_path: Path) -> None:
    plot = tmp_path / "run.svg"
    given = ["--rows", "400", "--mean-tokens", "100", "--runs", "4", "--price", "5", "--plot", str(plot), "--json"]
    done = run_command(tmp_path, *given)
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout.splitlines()[-1])
    assert value["state"] == "modelled"
    assert value["rows"] == 400
    assert value["time_s"]["low"] <= value["time_s"]["middle"] <= value["time_s"]["high"]
    assert value["cost"] == pytest.approx(5 * value["gpu_hours"]["middle"], rel=0.01)
    assert set(value["policies"]) == {"order by length", "split of the tail"}
    assert "modelled, not measured" in done.stderr
    assert plot.read_text().startswith("<svg")
    assert run_command(tmp_path, *given).stdout == done.stdout


def test_the_command_tells_no_cost_without_a_price_and_refuses_in_one_sentence(tmp_path: Path) -> None:
    done = run_command(tmp_path, "--rows", "50", "--mean-tokens", "50", "--runs", "1", "--no-policies", "--json")
    assert json.loads(done.stdout.splitlines()[-1])["cost"] is None
    assert "cost" not in done.stderr
    refused = run_command(tmp_path, "--rows", "50", "--json")
    assert refused.returncode == 2
    assert json.loads(refused.stdout)["state"] == "refused"
    assert refused.stderr.startswith("batchgen: nothing says how long the answers are")
