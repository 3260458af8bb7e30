"""What a run tells Prometheus: every request counted, latencies drawn evenly and boundedly, nothing said of the unknown."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import yaml
from makers import make_job_spec
from promql import list_metrics

from batchgen.driver.control import StatusWriter
from batchgen.driver.view import QuietView
from batchgen.driver.watch import Watch
from batchgen.metrics import MAX_OBSERVED, MAX_UNCOUNTED, METRICS, Meter, Point, measure_begin, measure_end, measure_run
from batchgen.queue.events import Heartbeat
from batchgen.queue.pulse import Snapshot
from batchgen.records import Failure, Generation, Result, RowId, ShardProgress, Timing, Usage
from batchgen.storage import Storage
from batchgen.worker.result_batch import make_result_batch
from batchgen.write import make_result_schema

REPO = Path(__file__).parents[1]
RESULTS = make_result_schema(make_job_spec())


def make_answer(number: int, latency_s: float = 2.0) -> Result:
    usage = Usage(10, 21, 4)
    return Result(
        RowId("f", number, 0), 2, Timing(0.1, 1.0, latency_s), Generation("secret", (1,), "stop", usage), text="secret"
    )


BEAT = Heartbeat("w", 500, 3, 0.0, (ShardProgress("b", 1, 0, 7), ShardProgress("c", 1, 0, 5)))


def note(meter: Meter, results: Sequence[Result], schema: pa.Schema = RESULTS, size: int = 256) -> None:
    for start in range(0, len(results), size):
        meter.note(make_result_batch(results[start : start + size], "b", schema))


def add_up(points: Iterable[Point]) -> Counter[tuple[str, tuple[tuple[str, str], ...]]]:
    sums: Counter[tuple[str, tuple[tuple[str, str], ...]]] = Counter()
    for point in points:
        sums[point.name, point.labels] += point.value  # type: ignore[assignment]
    return sums


def test_all_requests_are_counted_once_and_latencies_are_a_bounded_draw() -> None:
    meter = Meter(is_wanted=True)
    note(meter, [make_answer(number, latency_s=float(number)) for number in range(5000)])
    note(meter, [Result(RowId("f", 1, 0), 1, Timing(), failure=Failure("timed_out", "no answer", True))])
    note(meter, [replace(make_answer(1), reused_from="its batch")])
    points = meter.take(BEAT, 8)
    sums = add_up(points)
    assert sums["batchgen_request_success_total", (("finished_reason", "stop"),)] == 5000
    assert sums["batchgen_request_failure_total", (("error_type", "timed_out"),)] == 1
    assert sums["batchgen_request_retries_total", ()] == 5000
    assert sums["batchgen_prompt_tokens_total", ()] == 50_000
    assert sums["batchgen_prefix_cache_hit_rate", ()] == 0.4
    assert sums["batchgen_generation_tokens_total", ()] == 500
    assert sums["batchgen_num_requests_waiting", ()] == 12
    drawn = [point.value for point in points if point.name == "batchgen_e2e_request_latency_seconds"]
    assert MAX_OBSERVED / 2 <= len(drawn) <= MAX_OBSERVED
    steps = {after - before for before, after in pairwise(drawn)}
    assert (drawn[0], len(steps)) == (0.0, 1), "every so manieth, neither the first nor the last"
    per_token = [p.value for p in points if p.name == "batchgen_request_time_per_output_token_seconds"]
    assert all(value < 250 for value in per_token)
    again = meter.take(BEAT, 8)
    assert {point.value for point in again if METRICS[point.name].kind != "gauge"} == {0}
    assert "secret" not in repr(points)


def test_nothing_is_kept_where_nobody_looks_and_little_where_somebody_does() -> None:
    idle, busy = Meter(), Meter(is_wanted=True)
    for meter in (idle, busy):
        note(meter, [make_answer(number) for number in range(MAX_UNCOUNTED + 5)], size=1)
    assert [len(meter._uncounted) for meter in (idle, busy)] == [0, 5]
    assert add_up(idle.take(BEAT, 8))["batchgen_request_success_total", (("finished_reason", "stop"),)] == 0
    assert add_up(busy.take(BEAT, 8))["batchgen_request_success_total", (("finished_reason", "stop"),)] == 69


def test_a_batch_of_all_kinds_of_rows_is_counted_as_its_rows_one_by_one() -> None:
    failed = Result(RowId("f", 1, 0), 3, Timing(), failure=Failure("timed_out", "x", True), prompt_tokens=7)
    never_sent = Result(RowId("f", 2, 0), 0, Timing(), failure=Failure("null_prompt", "x", False))
    unknown = replace(
        make_answer(3), generation=Generation("x", (1,), "length", Usage(None, None, None)), timing=Timing()
    )
    rows = [make_answer(0), failed, never_sent, unknown, replace(make_answer(4), reused_from="b"), make_answer(5)]
    for schema in (RESULTS, RESULTS.remove(RESULTS.get_field_index("reused_from"))):
        kept = rows if schema is RESULTS else [row for row in rows if row.reused_from is None]
        together, apart = Meter(is_wanted=True), Meter(is_wanted=True)
        note(together, kept, schema)
        note(apart, kept, schema, size=1)
        sums = add_up(together.take(BEAT, 8))
        assert sums == add_up(apart.take(BEAT, 8))
        assert sums["batchgen_request_retries_total", ()] == 2 + 1 + 1 + 1, "none of the row that was never sent"
        assert sums["batchgen_prompt_tokens_total", ()] == 20, "of answered requests"
        assert sums["batchgen_prefix_cache_hit_rate", ()] == 0.4, "of those of which it is known"


def test_a_run_tells_what_it_knows() -> None:
    seen = Snapshot(100, 10, 1, 20, 3, 0, 50, 2, 0, 4, 8, 1, 5.0, eta_s=9.0, worker_states={"busy": 2})
    values = {(point.name, point.labels): point.value for point in measure_run(seen, 77.0)}
    assert values["batchgen_rows_done", ()] == 20
    assert values["batchgen_workers", (("state", "busy"),)] == 2
    assert values["batchgen_workers", (("state", "idle"),)] == 0
    assert values["batchgen_eta_seconds", (("bound", "middle"),)] == 9
    assert ("batchgen_eta_seconds", (("bound", "low"),)) not in values
    assert ("batchgen_gpu_hours", ()) not in values


def test_every_point_has_a_metric_with_its_labels() -> None:
    meter = Meter(is_wanted=True)
    note(
        meter, [make_answer(1), Result(RowId("f", 1, 0), 1, Timing(), failure=Failure("timed_out", "no answer", True))]
    )
    seen = Snapshot(1, 1, 1, 1, 0, 0, 1, 1, 0, 1, 1, 0, 1.0, eta_s=1, eta_low_s=1, eta_high_s=2, gpu_hours=1.0)
    points = [*meter.take(BEAT, 8), *measure_run(seen, 1.0), *measure_end("finished")]
    for point in points:
        assert {name for name, _ in point.labels} <= set(METRICS[point.name].labels)
    assert {point.name for point in points} == METRICS.keys()


def test_a_run_says_that_the_one_before_is_over_and_last_of_all_how_it_ended() -> None:
    told: list[Point] = []
    watch = Watch(
        QuietView(), StatusWriter(Storage("memory://x"), 2, 5.0), publish=told.extend, run_before="3f2a91c0-e1"
    )
    assert told == measure_begin("3f2a91c0-e1")
    assert told[0].labels == (("run", "3f2a91c0-e1"), ("state", "followed"))
    watch.tell_end("stopped")
    assert told[1:] == [Point("batchgen_runs_ended_total", 1, (("state", "stopped"),))]
    assert measure_begin(None) == [], "the first of its job"


# ---- the dashboard and the alerts ------------------------------------------------------------------------------------


def list_expressions() -> dict[str, str]:
    """{where: PromQL} of the dashboard and of the alert rules."""
    board = json.loads((REPO / "batchgen" / "grafana" / "dashboard.json").read_text())
    found = {
        f"{panel['title']} {target['refId']}": target["expr"]
        for panel in board["panels"]
        for target in panel["targets"]
    }
    (group,) = yaml.safe_load((REPO / "batchgen" / "grafana" / "alerts.yaml").read_text())["groups"]
    return found | {rule["alert"]: rule["expr"] for rule in group["rules"]}


def strip(name: str) -> str:
    """The metric behind a series of Ray's endpoint."""
    return re.sub("_(bucket|sum|count)$", "", name.removeprefix("ray_"))


def test_dashboard_and_alerts_read_our_metrics_and_no_others() -> None:
    expressions = list_expressions()
    assert len(expressions) > 25
    for where, expression in expressions.items():
        names = list_metrics(expression)
        assert names, where
        assert {strip(name) for name in names} <= METRICS.keys(), where
        assert all(name.startswith("ray_") for name in names), where
        histograms = {name for name in names if METRICS[strip(name)].kind == "histogram"}
        assert all(name.endswith("_bucket") for name in histograms), where
        assert expression.count("(") == expression.count(")"), where


def test_every_metric_is_documented_and_on_the_board() -> None:
    page = (REPO / "docs" / "metrics.md").read_text()
    assert [name for name in METRICS if f"`{name}`" not in page] == []
    shown = {strip(name) for expression in list_expressions().values() for name in list_metrics(expression)}
    assert METRICS.keys() == shown


def test_alerts_say_what_and_the_mend() -> None:
    (group,) = yaml.safe_load((REPO / "batchgen" / "grafana" / "alerts.yaml").read_text())["groups"]
    for rule in group["rules"]:
        assert rule["annotations"].keys() == {"summary", "mend"}
        assert "$labels.run" in rule["annotations"]["summary"]


def test_no_alert_waits_for_what_a_series_of_ray_never_shows() -> None:
    """A gauge not set again is gone in 20 s, so it has no age; a run younger than an `offset` has no value then."""
    (group,) = yaml.safe_load((REPO / "batchgen" / "grafana" / "alerts.yaml").read_text())["groups"]
    for rule in group["rules"]:
        assert "time()" not in rule["expr"]
        assert " offset " not in rule["expr"]


def test_names_are_found_in_promql() -> None:
    text = 'histogram_quantile(0.5, sum by (le) (rate(a_bucket{run=~"b"}[5m]))) / max(c) > 1 and d offset 1h > 0'
    assert list_metrics(text) == {"a_bucket", "c", "d"}
