"""The endpoint as one plain process: uvicorn and a conductor, no Ray of its own. For a laptop, a small server, and tests.

`python -m batchgen.serve.plain SPEC [--port 8000] [--keys FILE | --no-keys]`. Where a model's `cluster.pool` is `ray`, its
batches run on that cluster all the same, each with workers of its own. SIGTERM drains what runs; it goes on at the next
start.
"""

import argparse
import logging
import sys

from batchgen.errors import BatchgenError
from batchgen.serve.app import create_app
from batchgen.serve.conductor import Conductor
from batchgen.serve.endpoint import Endpoint
from batchgen.serve.keys import check_bind, load_keys
from batchgen.serve.load import check_models, load_endpoint
from batchgen.serve.state import State


def serve(spec_url: str, *, host: str, port: int, keys_url: str | None, has_keys: bool = True) -> None:
    """Until a signal. Raises SpecError, InputError, OutputError before anything is served."""
    import uvicorn

    spec = load_endpoint(spec_url)
    keys = load_keys(keys_url) if has_keys else None
    check_bind(host, keys)
    check_models(spec)
    state = State(spec.store)
    state.check_store()
    conductor = Conductor(spec, state)
    conductor.start()
    try:
        app = create_app(Endpoint(spec, state, keys, conductor.wake))
        uvicorn.run(app, host=host, port=port, access_log=False, log_level="warning", server_header=False)
    finally:
        conductor.stop()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m batchgen.serve.plain", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("spec", help="YAML file: a local path or a URL")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--keys", help="file of API keys; absent: BATCHGEN_API_KEYS")
    parser.add_argument("--no-keys", action="store_true", help="let every program of this machine in; loopback only")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    try:
        serve(args.spec, host=args.host, port=args.port, keys_url=args.keys, has_keys=not args.no_keys)
    except BatchgenError as error:
        print(f"batchgen: {error}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
