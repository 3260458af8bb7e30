"""The command that kills what it starts."""

from typing import Annotated, Any, Literal

import typer

from batchgen.cli.base import (
    DebugOption,
    JsonOption,
    LimitOption,
    SetOption,
    SpecArgument,
    app,
    print_json,
    refusals,
    say,
)


@app.command()
def chaos(
    spec: SpecArgument,
    store: Annotated[
        str, typer.Option("--store", metavar="URL", help="Where to work: below a fresh folder, which stays.")
    ],
    seed: Annotated[int, typer.Option("--seed", help="Chooses what is killed, and when.")] = 0,
    kills: Annotated[int, typer.Option("--kills", min=0, help="SIGKILLs before the job may end.")] = 10,
    pool: Annotated[
        Literal["inline", "ray"],
        typer.Option("--pool", help="inline: driver and workers are one process; ray: actors."),
    ] = "inline",
    set: SetOption = None,
    limit: LimitOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Run the job with a simulated engine on your own store, kill it again and again, and count its rows."""
    from batchgen.chaos.chaos import run_chaos
    from batchgen.driver.job import limit_rows
    from batchgen.specs.load import load_spec

    with refusals(debug, as_json=as_json):
        job_spec = limit_rows(load_spec(spec, set or ()), limit)
        verdict = run_chaos(job_spec, store, seed=seed, num_kills=kills, pool=pool, say=say)
    for name in ("calm", "chaos"):
        say_result(name, verdict[name])
    print_json(verdict, as_json)
    raise typer.Exit(verdict["exit_code"])


def say_result(name: str, result: dict[str, Any]) -> None:
    """Two lines, and one for each finding."""
    kills = ", ".join(f"{count} {whom}" for whom, count in result["kills"].items()) or "none"
    again = "unknown" if result["regenerated"] is None else f"{result['regenerated']:,}"
    say(f"{name}: {result['rows']:,} of {result['rows_wanted']:,} rows, {result['rows_error']:,} of them errors")
    say(f"  lost {result['lost']:,}, twice {result['twice']:,}, generated again {again}; killed: {kills}")
    say(
        f"  {result['num_runs']} runs, {result['elapsed_s']:g} s, useful work {result['useful_work']:.1%} of slots x time"
    )
    for finding in result["findings"]:
        say(f"  wrong: {finding}")
