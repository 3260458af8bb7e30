"""The command line. Parses, calls, prints; what is decided elsewhere is not decided here.

Exit codes: 0 all rows done and the error rate within `retry.max_error_rate`; 1 done with too many errors; 2 refused
before anything was started; 3 stopped and resumable. People read standard error; `--json` ends standard output with one
JSON line for programs, also on a refusal. A traceback is shown only with `--debug`.
"""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from batchgen import __version__
from batchgen.errors import BatchgenError, Refusal
from batchgen.records import Shard

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Prompt Parquet in, generation Parquet out, on Ray, every row exactly once.",
)

SpecArgument = Annotated[str, typer.Argument(metavar="SPEC", help="YAML file: a local path or a URL such as s3://…")]
OutArgument = Annotated[str, typer.Argument(metavar="OUT", help="The job's output folder: a local path or a URL.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a field; may be repeated.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="End with one JSON line on standard output.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
LimitOption = Annotated[
    int | None, typer.Option("--limit", min=1, help="Only the first N rows: a trial whose rows the full run keeps.")
]


@contextmanager
def refusals(debug: bool, *, is_run: bool = False, as_json: bool = False) -> Iterator[None]:
    """One sentence and the exit code for whatever batchgen raises on purpose. Only a run can have been under way."""
    try:
        yield
    except BatchgenError as error:
        exit_code = 3 if is_run and not isinstance(error, Refusal) else 2
        state = "stopped" if exit_code == 3 else "refused"
        print_json({"state": state, "message": str(error), "exit_code": exit_code}, as_json)
        if debug:
            raise
        typer.echo(f"batchgen: {error}", err=True)
        raise typer.Exit(exit_code) from error


def print_json(value: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(value, ensure_ascii=False))


def say(text: str) -> None:
    typer.echo(text, err=True)


def say_warnings(warnings: Iterable[str], shards: Sequence[Shard]) -> None:
    """Those of the job, and what reading its shards costs."""
    from batchgen.plan import describe_amplification

    for warning in filter(None, [*warnings, describe_amplification(shards)]):
        say(f"warning: {warning}")


@app.command()
def validate(
    spec: SpecArgument, set: SetOption = None, as_json: JsonOption = False, debug: DebugOption = False
) -> None:
    """Check spec, input and output without starting anything; show the first rendered prompt."""
    from batchgen.job import open_job, render_first_prompt
    from batchgen.spec_load import load_spec
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
    from batchgen.job import limit_rows, open_job
    from batchgen.plan import read_amplification
    from batchgen.spec_load import load_spec
    from batchgen.storage import Storage

    with refusals(debug, as_json=as_json):
        job_spec = limit_rows(load_spec(spec, set or ()), limit)
        job = open_job(job_spec, Storage(job_spec.output.path))
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
    print_json(value, as_json)


@app.command()
def run(
    spec: SpecArgument,
    set: SetOption = None,
    limit: LimitOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Run the job, or go on with it. Start it again after anything: nothing is lost and nothing is done twice."""
    from batchgen.spec_load import load_spec

    with refusals(debug, is_run=True, as_json=as_json):
        report = watch_run(load_spec(spec, set or ()), limit)
    print_json(report, as_json)
    raise typer.Exit(report["exit_code"])


def watch_run(spec: Any, limit: int | None) -> dict[str, Any]:
    """Run with the view that suits where standard error goes, then print the summary there."""
    from rich.console import Console

    from batchgen.report import make_text_rows
    from batchgen.run import run_job
    from batchgen.view import LineView, RichView, print_rows

    console = Console(stderr=True)
    if console.is_terminal:
        with RichView(console) as view:
            report = run_job(spec, view, limit=limit)
    else:
        report = run_job(spec, LineView(spec.cluster.log_interval_s, say), limit=limit)
    print_rows(console, report["output"], make_text_rows(report))
    return report


@app.command()
def status(out: OutArgument, as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """What the run on OUT last said of itself."""
    from batchgen.control import describe_status, read_status
    from batchgen.errors import OutputError
    from batchgen.storage import Storage

    with refusals(debug, as_json=as_json):
        storage = Storage(out)
        found = read_status(storage)
        if found is None:
            raise OutputError(f"{storage.root}: no run has worked on it; nothing to show")
        lines = describe_status(storage, found)
    for line in lines:
        say(line)
    print_json({key: value for key, value in found.items() if key != "lost_batches"}, as_json)


@app.command()
def report(out: OutArgument, as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """The summary of the last run that ended on OUT."""
    from rich.console import Console

    from batchgen.errors import OutputError
    from batchgen.manifest import read_json
    from batchgen.report import REPORT_JSON, make_text_rows
    from batchgen.storage import Storage
    from batchgen.view import print_rows

    with refusals(debug, as_json=as_json):
        storage = Storage(out)
        found = read_json(storage, REPORT_JSON)
        if found is None:
            raise OutputError(f"{storage.root}: has no report; no run has ended here yet")
    print_rows(Console(stderr=True), storage.root, make_text_rows(found))
    print_json(found, as_json)


@app.command()
def verify(
    out: OutArgument,
    with_input: Annotated[
        bool, typer.Option("--input", help="Are the input files still the planned ones, too?")
    ] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Check every byte, row, key and count of OUT. Exit codes: 0 all right, 1 findings, 2 no job, 3 right but not done."""
    from batchgen.storage import Storage
    from batchgen.verify import verify as look

    with refusals(debug, as_json=as_json):
        storage = Storage(out)
        verdict = look(storage, with_input=with_input)
    for finding in verdict.findings:
        say(f"wrong: {finding}")
    for line in [*(f"not done: {line}" for line in verdict.todo), *(f"note: {line}" for line in verdict.notes)]:
        say(line)
    rows = verdict.counts["rows_ok"] + verdict.counts["rows_error"]
    checked = f"{verdict.counts['files']:,} of {verdict.counts['shards']:,} shards, {rows:,} rows"
    say(f"{storage.root}: {verdict.state}; checked {checked}, {len(verdict.findings)} findings")
    print_json(verdict.to_json(), as_json)
    raise typer.Exit(verdict.exit_code)


@app.command()
def cancel(out: OutArgument, as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """Ask the run on OUT to finish what is in flight, journal it and stop, wherever it runs."""
    from batchgen.control import request_cancel
    from batchgen.storage import Storage

    with refusals(debug, as_json=as_json):
        epoch = request_cancel(Storage(out))
    say(f"asked the run of epoch {epoch} to stop; it looks every few seconds")
    print_json({"epoch": epoch}, as_json)


@app.command()
def schema() -> None:
    """Print the JSON schema of a spec."""
    from batchgen.spec import JobSpec

    typer.echo(json.dumps(JobSpec.model_json_schema(), indent=2))


def _print_version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Prompt Parquet in, generation Parquet out, on Ray, every row exactly once."""


def main() -> None:
    sys.exit(app())


if __name__ == "__main__":
    main()
