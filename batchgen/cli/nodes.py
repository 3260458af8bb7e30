"""Commands for the node that they are run on."""

from typing import Annotated

import typer

from batchgen.cli.base import DebugOption, JsonOption, SetOption, SpecArgument, app, print_json, refusals, say


@app.command()
def doctor(
    spec: Annotated[
        str | None, typer.Argument(metavar="[SPEC]", help="Look at what this spec asks of the node, too.")
    ] = None,
    set: SetOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Will this node carry the job? Looks at GPUs, versions, MPI, the model's files, servers and the output, in seconds."""
    from rich.console import Console

    from batchgen.preflight.doctor import examine, make_value, print_checks
    from batchgen.specs.load import load_spec

    with refusals(debug, as_json=as_json):
        checks = examine(None if spec is None else load_spec(spec, set or ()))
    value = make_value(checks)
    print_checks(Console(stderr=True), checks)
    print_json(value, as_json)
    raise typer.Exit(value["exit_code"])


@app.command()
def stage(
    spec: SpecArgument,
    set: SetOption = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read a finished copy again, and mend what differs.")
    ] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Copy the spec's model to this node's disk (model.stage_dir), as its workers would at their start."""
    from batchgen.specs.load import load_spec
    from batchgen.staging.lock import make_log_progress
    from batchgen.staging.staging import stage as stage_now

    with refusals(debug, as_json=as_json):
        folder = stage_now(load_spec(spec, set or ()).model, verify=verify, on_progress=make_log_progress(say))
    say(f"ok: {folder}")
    print_json({"state": "ok", "folder": str(folder)}, as_json)
