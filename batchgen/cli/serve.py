"""`batchgen serve`: the endpoint from one command, on this machine's Ray or a cluster's."""

from typing import Annotated

import typer

from batchgen.cli.base import DebugOption, app, refusals, say


@app.command()
def serve(
    spec: Annotated[str, typer.Argument(metavar="SPEC", help="The endpoint's YAML: a local path or a URL.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    keys: Annotated[str | None, typer.Option(help="File of API keys; absent: BATCHGEN_API_KEYS.")] = None,
    no_keys: Annotated[
        bool, typer.Option("--no-keys", help="Let every program of this machine in; loopback only.")
    ] = False,
    debug: DebugOption = False,
) -> None:
    """Serve OpenAI's API: files, batches, and completions beside them, on shared engines. Ctrl-C drains and stops."""
    from batchgen.serve.keys import check_bind, load_keys
    from batchgen.serve.local import serve_until_stopped

    with refusals(debug):
        check_bind(host, None if no_keys else load_keys(keys))
        serve_until_stopped(spec, host=host, port=port, keys=keys, no_keys=no_keys, say=say)
