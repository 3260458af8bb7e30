"""What every command of the command line shares: the app, the options, how a refusal is told."""

import json
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import typer

from batchgen import __version__
from batchgen.errors import BatchgenError, Refusal
from batchgen.logs import name_fault

app = typer.Typer(
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

DeadlineOption = Annotated[
    str | None,
    typer.Option(
        metavar="TIME", help="Stop by then, drained and resumable: 2026-11-28T06:00Z, or a time from now such as 8h."
    ),
]
GpuHoursOption = Annotated[
    float | None, typer.Option("--max-gpu-hours", metavar="H", help="Stop before this run has used more GPU-hours.")
]
# As a shell says it of a program that Ctrl-C ended, and as sysexits.h says it of one that is at fault itself.
INTERRUPTED, BROKEN = 130, 70

LogFormat = Literal["auto", "text", "json"]
LogFormatOption = Annotated[
    LogFormat,
    typer.Option(
        "--log-format",
        envvar="BATCHGEN_LOG_FORMAT",
        help="What goes to standard error: text, or one JSON event a line. auto: text at a terminal, JSON elsewhere.",
    ),
]


@contextmanager
def refusals(debug: bool, *, is_run: bool = False, as_json: bool = False) -> Iterator[None]:
    """One sentence and the exit code for whatever ends a command. Only a run can have been under way. What batchgen raises
    on purpose has a sentence of its own; of anything else only kind and place are told, because its text may quote a
    prompt."""
    try:
        yield
    except BatchgenError as error:
        exit_code = 3 if is_run and not isinstance(error, Refusal) else 2
        tell_end("stopped" if exit_code == 3 else "refused", str(error), exit_code, debug=debug, as_json=as_json)
        raise typer.Exit(exit_code) from error
    except KeyboardInterrupt as error:  # the second Ctrl-C, or one where nothing can be drained
        typer.echo("batchgen: interrupted; start it again and it goes on", err=True)
        raise typer.Exit(INTERRUPTED) from error
    except (typer.Exit, typer.Abort):
        raise
    # The edge: nobody above could tell it better, and what is in the output folder is safe whatever it was.
    except Exception as error:
        tell_end("broken", describe_fault(error), BROKEN, debug=debug, as_json=as_json)
        raise typer.Exit(BROKEN) from error


def tell_end(state: str, message: str, exit_code: int, *, debug: bool, as_json: bool) -> None:
    """Of the exception that is being handled."""
    print_json({"state": state, "message": message, "exit_code": exit_code}, as_json)
    if debug:
        typer.echo(traceback.format_exc(), err=True)
    typer.echo(f"batchgen: {message}", err=True)


def describe_fault(error: Exception) -> str:
    """Of an error that is nobody's purpose: kind and place, without its text."""
    return f"{name_fault(error)}, which is a fault of batchgen's; run it again with --debug and report it"


def print_json(value: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(value, ensure_ascii=False))


def say(text: str) -> None:
    typer.echo(text, err=True)


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
