"""The FastAPI app: routers, and every error in OpenAI's body (faults of our own: `guard`). All else is behind them.

`create_app` takes the routers of whoever answers interactively. All handlers here are plain functions, run in threads;
none keeps anything between two requests but what the store can say again.
"""

import time
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from batchgen import __version__
from batchgen.errors import StorageError
from batchgen.serve.endpoint import Endpoint
from batchgen.serve.errors import ApiError, bad_request, not_found
from batchgen.serve.guard import Guard, make_response
from batchgen.serve.routes_batches import create_batches_router
from batchgen.serve.routes_files import UploadPlaces, create_files_router
from batchgen.serve.routes_page import create_page_router
from batchgen.serve.routes_uploads import create_uploads_router
from batchgen.serve.wire import ErrorBody, Model, ModelList

STORE_RETRY_S = 5
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (400, 401, 403, 404, 405, 409, 413, 416, 429, 500, 503)
}


def create_app(endpoint: Endpoint, routers: Sequence[APIRouter] = ()) -> FastAPI:
    """The whole API. No page of documentation: it would fetch its scripts from elsewhere."""
    app = FastAPI(
        title="batchgen", version=__version__, docs_url=None, redoc_url=None, responses=ERRORS, redirect_slashes=False
    )
    places = UploadPlaces(endpoint.spec.limits.max_uploads)
    files, uploads = create_files_router(endpoint, places), create_uploads_router(endpoint, places)
    own = (files, uploads, create_batches_router(endpoint), create_facts_router(endpoint), create_page_router(endpoint))
    for router in (*own, *routers):
        app.include_router(router)
    app.add_exception_handler(ApiError, _answer)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(StorageError, _answer_store)
    app.add_exception_handler(ClientDisconnect, _answer_gone)
    app.add_middleware(Guard, endpoint=endpoint)
    _drop_422(app)
    return app


def create_facts_router(endpoint: Endpoint) -> APIRouter:
    router, started_at = APIRouter(), int(time.time())
    models = [Model(id=name, created=started_at) for name in endpoint.spec.models]

    @router.get("/v1/models", tags=["models"])
    def list_models() -> ModelList:
        return ModelList(data=models)

    @router.get("/v1/models/{model:path}", tags=["models"])
    def retrieve_model(model: str) -> Model:
        found = next((each for each in models if each.id == model), None)
        if found is None:
            raise not_found("model", model, "model")
        return found

    @router.get("/health", tags=["health"])
    def health() -> dict[str, str]:
        """This process answers."""
        return {"status": "ok"}

    @router.get("/ready", tags=["health"])
    def ready() -> dict[str, str]:
        """And its store does."""
        endpoint.state.storage.info("ready")
        return {"status": "ok"}

    return router


def _drop_422(app: FastAPI) -> None:
    """FastAPI documents a 422 of its own for what is a 400 here."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        made = make()
        for operations in made["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            made.get("components", {}).get("schemas", {}).pop(name, None)
        return made

    app.openapi = openapi  # type: ignore[method-assign]


# ---- errors


async def _answer(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return make_response(error)


async def _answer_invalid(_: Request, error: Exception) -> JSONResponse:
    """Names the field, never its value."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return make_response(bad_request("The body is not valid JSON.", None, "invalid_json"))
    where, *parts = first["loc"]
    # The name of a header is ours, what stands in a body may be anybody's.
    place = [str(part) for part in parts if where == "header" or isinstance(part, int) or str(part).isidentifier()]
    param = ".".join(place)[:128] or None
    code = {"missing": "missing_required_parameter", "extra_forbidden": "unknown_parameter"}.get(first["type"])
    return make_response(bad_request(f"{param or 'body'}: {first['msg']}", param, code or "invalid_value"))


async def _answer_http(_: Request, error: Exception) -> JSONResponse:
    """No such path, or no such method on it."""
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, ApiError):  # FastAPI's word for what went wrong while it read the body
        return make_response(error.__cause__)
    told = {404: "No such path.", 405: "This method is not known here."}.get(error.status_code, "Bad request.")
    response = make_response(ApiError(error.status_code, told))
    response.headers.update(error.headers or {})
    return response


async def _answer_store(_: Request, error: Exception) -> JSONResponse:
    """The store is away: what was asked was not done, or will be found done when it is asked again."""
    del error
    told = "The store does not answer; try again later."
    return make_response(
        ApiError(503, told, kind="server_error", code="store_unavailable", retry_after_s=STORE_RETRY_S)
    )


async def _answer_gone(_: Request, error: Exception) -> JSONResponse:
    del error
    return make_response(bad_request("The body breaks off.", None, "invalid_body"))
