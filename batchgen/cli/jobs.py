"""Commands that take a spec: look at a job, or run it."""

import json
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

import typer

from batchgen.cli.base import (
    DeadlineOption,
    DebugOption,
    GpuHoursOption,
    JsonOption,
    LimitOption,
    LogFormat,
    LogFormatOption,
    SetOption,
    SpecArgument,
    app,
    print_json,
    refusals,
    say,
)
from batchgen.records import Shard


@app.command()
def validate(
    spec: SpecArgument, set: SetOption = None, as_json: JsonOption = False, debug: DebugOption = False
) -> None:
    """Check spec, input and output without starting anything; show the first rendered prompt."""
    from batchgen.driver.job import open_job, render_first_prompt
    from batchgen.specs.load import load_spec
    from batchgen.storage import Storage
    from batchgen.stores.probe import probe

    with refusals(debug, as_json=as_json):
        job_spec = load_spec(spec, set or ())
        storage = Storage(job_spec.output.path)
        job = open_job(job_spec, storage)
        abilities = probe(storage)
        text, num_tokens = render_first_prompt(job)
    say_warnings(job.warnings, job.plan.shards)
    checked = "custom_id unique" if job.is_unique_checked else "custom_id not checked"
    say(f"ok: {len(job.plan.files):,} files, {job.plan.num_rows:,} rows, {len(job.plan.shards):,} shards, {checked}")
    if not abilities.is_exclusive:
        say(f"warning: the output's store has no conditional writes ({abilities.reason})")
    size = "as the server gets it" if num_tokens is None else f"{num_tokens} tokens"
    say(f"first prompt, {size}:")
    typer.echo(text)
    fields = {"files": len(job.plan.files), "rows": job.plan.num_rows, "shards": len(job.plan.shards)}
    print_json({**fields, "fingerprint": job_spec.fingerprint(), "first_prompt_tokens": num_tokens}, as_json)


@app.command()
def plan(
    spec: SpecArgument,
    set: SetOption = None,
    limit: LimitOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show files, rows, shards, read amplification and what is done already. Writes nothing."""
    from batchgen.driver.foresee import foresee
    from batchgen.driver.job import limit_rows, open_job
    from batchgen.plan import read_amplification
    from batchgen.specs.load import load_spec
    from batchgen.storage import Storage

    with refusals(debug, as_json=as_json):
        job_spec = limit_rows(load_spec(spec, set or ()), limit)
        job = open_job(job_spec, Storage(job_spec.output.path))
        expected = foresee(job)
    sizes = [shard.num_rows for shard in job.plan.shards]
    value = {
        "files": len(job.plan.files),
        "bytes": sum(file.num_bytes for file in job.plan.files),
        "rows": job.plan.num_rows,
        "rows_planned": job.plan.num_planned_rows,
        "shards": len(sizes),
        "rows_per_shard": [min(sizes), max(sizes)],
        "read_amplification": round(read_amplification(job.plan.shards), 3),
        "shards_committed": len(job.committed),
        "shards_to_do": len(job.todo),
        "is_frozen": not job.is_new,
    }
    say_warnings(job.warnings, job.plan.shards)
    for name, shown in value.items():
        say(f"{name.replace('_', ' '):20} {shown}")
    say(expected.describe())
    print_json({**value, "estimate": expected.to_json()}, as_json)


@app.command()
def run(
    spec: SpecArgument,
    set: SetOption = None,
    limit: LimitOption = None,
    deadline: DeadlineOption = None,
    max_gpu_hours: GpuHoursOption = None,
    log_format: LogFormatOption = "auto",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Run the job, or go on with it. Start it again after anything: nothing is lost and nothing is done twice."""
    from batchgen.specs.load import load_spec

    with refusals(debug, is_run=True, as_json=as_json):
        overrides = [*(set or ()), *make_limits(deadline, max_gpu_hours)]
        report = watch_run(load_spec(spec, overrides), limit, log_format)
    print_json(report, as_json)
    raise typer.Exit(report["exit_code"])


def make_limits(deadline: str | None, max_gpu_hours: float | None) -> list[str]:
    """The options as overrides of the spec. Raises SpecError for a time that is none."""
    from batchgen.errors import SpecError
    from batchgen.queue.governor import parse_deadline

    limits = [] if max_gpu_hours is None else [f"cluster.max_gpu_hours={max_gpu_hours}"]
    if deadline is not None:
        try:
            at = parse_deadline(deadline, datetime.now(UTC))
        except ValueError as error:
            raise SpecError(f"--deadline {deadline}: {error}") from error
        limits.append(f"cluster.deadline='{at.isoformat()}'")
    return limits


def watch_run(spec: Any, limit: int | None, log_format: LogFormat = "text") -> dict[str, Any]:
    """Run with the view that suits where standard error goes, then print the summary there; a log has it as an event."""
    from rich.console import Console

    from batchgen.driver.run import run_job
    from batchgen.driver.view import LineView, LogView, RichView, print_rows
    from batchgen.logs import writing_json
    from batchgen.report.text import make_text_rows

    console, interval_s = Console(stderr=True), spec.cluster.log_interval_s
    is_screen = console.is_terminal and not console.is_jupyter
    if log_format == "json" or (log_format == "auto" and not is_screen):
        with writing_json(sys.stderr):
            return run_job(spec, LogView(interval_s), limit=limit)
    if is_screen:
        with RichView(console) as view:
            report = run_job(spec, view, limit=limit)
    else:
        report = run_job(spec, LineView(interval_s, say), limit=limit)
    print_rows(console, report["output"], make_text_rows(report))
    return report


@app.command()
def schema() -> None:
    """Print the JSON schema of a spec."""
    from batchgen.spec import JobSpec

    typer.echo(json.dumps(JobSpec.model_json_schema(), indent=2))


def say_warnings(warnings: Iterable[str], shards: Sequence[Shard]) -> None:
    """Those of the job, and what reading its shards costs."""
    from batchgen.plan import describe_amplification

    for warning in filter(None, [*warnings, describe_amplification(shards)]):
        say(f"warning: {warning}")
