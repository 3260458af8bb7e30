"""What the shared engines say of themselves, as Prometheus text."""

from collections.abc import Mapping

from batchgen.serve.host import HostReport

GAUGES = {
    "engine_bulk_inflight": ("gauge", "Rows of batches sent and not answered.", "num_bulk"),
    "engine_interactive_inflight": ("gauge", "Interactive requests under way.", "num_urgent"),
    "engine_workers": ("gauge", "Runs that have a worker on the engine.", "num_workers"),
    "engine_completion_tokens_total": ("counter", "Tokens generated since the engine started.", "total_tokens"),
    "engine_interactive_answered_total": ("counter", "Interactive requests answered.", "num_answered"),
}


def make_exposition(models: Mapping[str, Mapping[str, HostReport]]) -> str:
    lines = ["# HELP batchgen_engines_up Engines that answer.", "# TYPE batchgen_engines_up gauge"]
    lines += [f'batchgen_engines_up{{model="{model}"}} {len(reports)}' for model, reports in models.items()]
    for name, (kind, told, field) in GAUGES.items():
        lines += [f"# HELP batchgen_{name} {told}", f"# TYPE batchgen_{name} {kind}"]
        for model, reports in models.items():
            for engine, report in reports.items():
                labels = f'model="{model}",engine="{engine.rpartition("-")[2]}"'
                lines.append(f"batchgen_{name}{{{labels}}} {getattr(report, field)}")
    return "\n".join(lines) + "\n"
