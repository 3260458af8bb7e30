"""Commands that take an output folder: what became of a job."""

from contextlib import nullcontext
from typing import Annotated, Any

import typer

from batchgen.cli.base import DebugOption, JsonOption, OutArgument, app, print_json, refusals, say


@app.command()
def status(
    out: OutArgument,
    watch: Annotated[bool, typer.Option("--watch", help="Until the run ends: a screen, or a line at a time.")] = False,
    interval: Annotated[float, typer.Option(min=0.2, metavar="S", help="Seconds between looks with --watch.")] = 5.0,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """What the run on OUT last said of itself, from any machine that reads the store."""
    from batchgen.driver.control import describe_status, read_status
    from batchgen.errors import OutputError
    from batchgen.storage import Storage

    with refusals(debug, as_json=as_json):
        storage = Storage(out)
        found = read_status(storage)
        if found is None:
            raise OutputError(
                f"{storage.root}: no run has worked on it; nothing to show; correct the path, or start one"
            )
        if watch:
            found = watch_status(storage, found, interval)
        for line in describe_status(storage, found):
            say(line)
    print_json({key: value for key, value in found.items() if key != "lost_batches"}, as_json)


def watch_status(storage: Any, found: dict[str, Any], interval_s: float) -> dict[str, Any]:
    """The last word, when the run has ended. At a terminal the screen goes on meanwhile; elsewhere there is a line for each
    word that is new."""
    import time

    from rich.console import Console
    from rich.live import Live

    from batchgen.driver.control import read_run_status, read_status
    from batchgen.driver.screen import format_line, make_screen

    console, told_at = Console(stderr=True), None
    with Live(console=console, transient=True, auto_refresh=False) if console.is_terminal else nullcontext() as live:
        while not (seen := read_run_status(storage, found)).is_over:
            if live is not None:
                live.update(make_screen(seen.progress, seen.heads), refresh=True)
            elif found["updated_at"] != told_at:
                told_at = found["updated_at"]
                say(format_line(seen.progress))
            time.sleep(interval_s)
            found = read_status(storage) or found
    return found


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
    from batchgen.verify.verify import verify as look

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
    from batchgen.driver.control import request_cancel
    from batchgen.storage import Storage

    with refusals(debug, as_json=as_json):
        epoch = request_cancel(Storage(out))
    say(f"asked the run of epoch {epoch} to stop; it looks every few seconds")
    print_json({"epoch": epoch}, as_json)
