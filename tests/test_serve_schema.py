"""Requests made of the OpenAPI description by schemathesis: no 5xx, and every answer as it is described."""

import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from serve_process import Server, make_endpoint_tree, make_jsonl, make_line, running, upload

from batchgen.serve.app import create_app
from batchgen.serve.endpoint import Endpoint
from batchgen.serve.load import make_endpoint
from batchgen.serve.state import State

NUM_EXAMPLES = 20
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


def describe() -> dict[str, Any]:
    """As the process below describes itself."""
    with tempfile.TemporaryDirectory() as store:
        spec = make_endpoint(make_endpoint_tree(store))
        return create_app(Endpoint(spec, State(store), None)).openapi()


schema = schemathesis.openapi.from_dict(describe())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("endpoint")
    limits = {"max_open_batches": 1_000_000}
    with running(Server(folder, make_endpoint_tree(str(folder / "store"), limits=limits))) as started:
        upload(started.client(), make_jsonl([make_line("a")]))
        yield started


@schema.parametrize()
@settings(
    max_examples=NUM_EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_every_answer_is_as_described(server: Server, case: schemathesis.Case) -> None:
    headers = {"Authorization": f"Bearer {server.keys['acme']}"}
    case.call_and_validate(base_url=server.url[:-3], headers=headers, checks=CHECKS)


def test_the_description_is_the_processs_own(server: Server) -> None:
    import httpx

    served = httpx.get(f"{server.url[:-3]}/openapi.json").json()
    assert served == describe()
    assert "422" not in str(served["paths"])
