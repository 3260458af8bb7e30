"""The Grafana dashboard as Grafana takes it: its own published models know every field, and what they can't say holds too."""

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from promql import list_metrics

from batchgen.metrics import METRICS

BOARD: dict[str, Any] = json.loads((Path(__file__).parents[1] / "batchgen" / "grafana" / "dashboard.json").read_text())
PANELS: list[dict[str, Any]] = BOARD["panels"]
# Grafana's own names of units: a wrong one is shown as text behind the number.
UNITS = {"s", "short", "percentunit"}


def test_panels_lie_beside_each_other_on_the_24_columns() -> None:
    assert len({panel["id"] for panel in PANELS}) == len(PANELS) > 15
    for panel in PANELS:
        at = panel["gridPos"]
        assert 0 <= at["x"] < at["x"] + at["w"] <= 24, panel["title"]
    for one, other in combinations([panel["gridPos"] for panel in PANELS], 2):
        is_beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        assert is_beside or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_panel_asks_the_chosen_prometheus_for_the_chosen_runs(panel: dict[str, Any]) -> None:
    assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
    refs = [target["refId"] for target in panel["targets"]]
    assert len(set(refs)) == len(refs) > 0
    for target in panel["targets"]:
        expression = target["expr"]
        assert expression.count('{run=~"$run"}') == len(re.findall(r"\bray_batchgen_\w+", expression))
        (grouped, *others) = [set(re.split(r",\s*", by)) for by in re.findall(r"by \(([^)]*)\)", expression)]
        assert all(by == grouped for by in others)
        shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
        assert shown == grouped - {"le"}, "the legend tells the lines apart"
        for name in list_metrics(expression):
            metric = METRICS[re.sub("_(bucket|sum|count)$", "", name.removeprefix("ray_"))]
            assert grouped - {"le", "run"} <= set(metric.labels), expression
            assert ("rate(" in expression) == (metric.kind != "gauge" and "runs_ended" not in name), "a counter's slope"


def test_variables_are_those_that_panels_use() -> None:
    named = {variable["name"] for variable in BOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)\}?", json.dumps([PANELS, BOARD["templating"]])))
    assert used - {"__rate_interval", "__all"} == named
