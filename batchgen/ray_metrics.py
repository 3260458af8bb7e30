"""Metrics (`metrics`) through Ray's own: each node's agent gives them to Prometheus. Thin, and loaded with Ray only."""

from collections.abc import Iterable, Mapping

from ray.util.metrics import Counter, Gauge, Histogram

from batchgen.metrics import METRICS, Point


class RayExporter:
    """Of one process that Ray knows. `labels`: of everything from here."""

    def __init__(self, labels: Mapping[str, str]) -> None:
        self._labels = dict(labels)
        self._made: dict[str, Counter | Gauge | Histogram] = {}

    def export(self, points: Iterable[Point]) -> None:
        for point in points:
            metric = self._made.get(point.name) or self._make(point.name)
            labels = self._labels | dict(point.labels)
            tags = {name: labels[name] for name in ("run", *METRICS[point.name].labels)}
            if isinstance(metric, Gauge):
                metric.set(point.value, tags)
            elif isinstance(metric, Histogram):
                metric.observe(point.value, tags)
            elif point.value > 0:  # Ray's counters refuse to add nothing
                metric.inc(point.value, tags)

    def _make(self, name: str) -> Counter | Gauge | Histogram:
        known = METRICS[name]
        tags = ("run", *known.labels)
        if known.kind == "histogram":
            made = Histogram(name, known.description, boundaries=list(known.buckets), tag_keys=tags)
        else:
            made = (Gauge if known.kind == "gauge" else Counter)(name, known.description, tag_keys=tags)
        self._made[name] = made
        return made
