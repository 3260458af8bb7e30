"""What a run's limits leave to one job of it. Pure."""

from datetime import datetime
from typing import Any


def with_limits(tree: dict[str, Any], deadline: str | None, max_gpu_hours: float | None) -> dict[str, Any]:
    """The job under a run's limits, where its own are not tighter."""
    cluster = dict(tree.get("cluster") or {})
    if deadline is not None and not _is_before(cluster.get("deadline"), deadline):
        cluster["deadline"] = deadline
    if max_gpu_hours is not None:
        own = cluster.get("max_gpu_hours")
        cluster["max_gpu_hours"] = min(max_gpu_hours, own) if isinstance(own, int | float) else max_gpu_hours
    return {**tree, "cluster": cluster} if cluster else tree


def _is_before(own: Any, deadline: str) -> bool:
    """Of a job's own deadline, unchecked: YAML makes a date of one that has no quotes. What is no time is left for the spec
    to refuse."""
    if own is None:
        return False
    try:
        instant = own if isinstance(own, datetime) else datetime.fromisoformat(str(own))
        return instant < datetime.fromisoformat(deadline)
    except (ValueError, TypeError):  # no time, or one without its UTC offset
        return True
