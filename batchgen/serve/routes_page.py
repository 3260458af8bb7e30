"""The web page at `/`, and the one thing it needs beyond OpenAI's API: `/v1/batches/{id}/report`.

The page is static and open; all it shows it asks of the API with the key that its reader types in. Its policy lets the
browser load nothing from elsewhere and run no script but its own.
"""

import threading
import time
from collections.abc import Callable
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from batchgen.errors import OutputError
from batchgen.report.reading import find_report
from batchgen.serve.endpoint import Endpoint
from batchgen.serve.errors import ApiError, not_found
from batchgen.serve.ids import is_batch_id
from batchgen.serve.jobs import Jobs
from batchgen.serve.wire import TERMINAL
from batchgen.storage import Storage

PAGE = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
FRESH_S = 3.0
# Of a report, what tells of rows and time; no generated text, and neither spec nor message: their paths, nodes and reasons
# of engines are the operator's.
SHOWN = ("state", "made_at", "rows", "job", "histograms", "timeline", "errors")


def create_page_router(endpoint: Endpoint) -> APIRouter:
    router, state = APIRouter(), endpoint.state
    jobs, recent = Jobs(endpoint.spec.jobs), RecentReports()
    for path, (name, kind) in PAGE.items():
        router.add_api_route(path, make_handler(name, kind), include_in_schema=False)

    @router.get("/v1/batches/{batch_id}/report", tags=["batches"])
    def read_batch_report(request: Request, batch_id: str) -> dict[str, Any]:
        """Rows, latencies, throughput and errors of the batch's job so far, as in its `report.json`. Not OpenAI's."""
        tenant = request.state.tenant.name
        storage, is_over = None, False
        if is_batch_id(batch_id):
            if (record := state.read_batch(tenant, batch_id)) is not None:
                storage, is_over = Storage(state.job_url(tenant, batch_id)), record.is_over
            elif (job := jobs.find(tenant, batch_id)) is not None:
                storage, is_over = job.storage, job.read().status in TERMINAL
        if storage is None:
            raise not_found("batch", batch_id, "batch_id")
        try:
            found = find_report(storage) if is_over else recent.read(storage)
        except OutputError:
            raise ApiError(409, "The batch's job has not begun.", code="report_not_ready") from None
        return {name: found.get(name) for name in SHOWN}

    return router


class RecentReports:
    """Reports of running jobs as they were `FRESH_S` ago at most: each is made of all the shards' footers, and every page
    that is open asks again and again. Of one that is over there is a file, and an older one would stay on its page."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._reports: dict[str, tuple[float, dict[str, Any]]] = {}

    def read(self, storage: Storage) -> dict[str, Any]:
        """Raises OutputError as `find_report`."""
        with self._lock:
            now = self._clock()
            self._reports = {root: kept for root, kept in self._reports.items() if now - kept[0] < FRESH_S}
            if (kept := self._reports.get(storage.root)) is not None:
                return kept[1]
        found = find_report(storage)
        with self._lock:
            self._reports[storage.root] = self._clock(), found
        return found


def make_handler(name: str, kind: str) -> Any:
    body = (files("batchgen.serve.page") / name).read_bytes()
    headers = {"content-security-policy": POLICY, "referrer-policy": "no-referrer", "cache-control": "no-cache"}

    def read_page() -> Response:
        return Response(body, media_type=kind, headers=headers)

    return read_page
