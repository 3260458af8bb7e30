"""The Grafana dashboard: Grafana's own published models know every field of it, and what they can't tell holds too."""

import copy
import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard
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


def list_unknown(given: Any, known: Any, where: str = "") -> list[str]:
    """What of `given` is lost on the way through Grafana's models, or comes back as something else."""
    if isinstance(given, dict) and isinstance(known, dict):
        return [
            lost
            for name, value in given.items()
            for lost in (list_unknown(value, known[name], f"{where}/{name}") if name in known else [f"{where}/{name}"])
        ]
    if isinstance(given, list) and isinstance(known, list) and len(given) == len(known):
        pairs = enumerate(zip(given, known, strict=True))
        return [lost for at, (value, other) in pairs for lost in list_unknown(value, other, f"{where}/{at}")]
    return [] if given == known else [where]


def read_back(board: dict[str, Any]) -> dict[str, Any]:
    """Through Grafana's own models, which keep what they know."""
    plugins.register_default_plugins()
    text = JSONEncoder(sort_keys=True).encode(Dashboard.from_json(board))
    kept: dict[str, Any] = json.loads(text)
    return kept


def test_grafanas_models_know_every_field() -> None:
    assert list_unknown(BOARD, read_back(BOARD)) == []


@pytest.mark.parametrize(
    "path",
    [
        ("refresh",),
        ("panels", 2, "gridPos"),
        ("panels", 2, "targets", 0, "legendFormat"),
        ("templating", "list", 1, "refresh"),
    ],
)
def test_a_misspelt_field_would_be_seen(path: tuple[str | int, ...]) -> None:
    changed = copy.deepcopy(BOARD)
    at: Any = changed
    for step in path[:-1]:
        at = at[step]
    at[f"{path[-1]}x"] = at.pop(path[-1])
    assert list_unknown(changed, read_back(changed)) == ["/" + "/".join(map(str, path)) + "x"]
