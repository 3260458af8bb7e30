"""`batchgen replay`: one row of an output again."""

import asyncio
import json
from typing import Annotated

import typer

from batchgen.cli.base import DebugOption, JsonOption, OutArgument, SetOption, app, print_json, refusals, say


@app.command()
def replay(
    out: OutArgument,
    row: Annotated[str, typer.Option("--row", metavar="ID", help="custom_id, or source_file:source_row.")],
    sample: Annotated[int, typer.Option("--sample", help="sample_index of the row.")] = 0,
    is_run: Annotated[bool, typer.Option("--run", help="Send it once more, and compare.")] = False,
    show_text: Annotated[bool, typer.Option("--show-text", help="Print prompt and answer as text, too.")] = False,
    set: SetOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Rebuild the request of one row of OUT, token ids and parameters; --run sends it again. Changes nothing.

    Exit codes: 0; 1 where the request is another one than was sent, and with --run where the answer is, or there are no two
    to compare."""
    from batchgen.replay import Replay, describe, send
    from batchgen.storage import Storage

    with refusals(debug, as_json=as_json):
        found = Replay(Storage(out), row, sample, tuple(set or ()))
        told = asyncio.run(send(found, show_text=show_text)) if is_run else describe(found, show_text=show_text)
    if not as_json:
        typer.echo(json.dumps(told, indent=1, ensure_ascii=False, default=str))
    if told["is_same_request"] is False:
        say(
            "warning: this is not the request that was sent then: model files, template or input say something else now"
        )
    if is_run:
        say(describe_differences(told["differs"]))
    print_json(told, as_json)
    raise typer.Exit(1 if told["is_same_request"] is False or (is_run and told["differs"] != []) else 0)


def describe_differences(names: list[str] | None) -> str:
    if names is None:
        return "nothing to compare: OUT has no generation of this row, or there is none now"
    return f"differs: {', '.join(names)}" if names else "the same answer"
