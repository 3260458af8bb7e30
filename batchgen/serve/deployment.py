"""The endpoint as a Ray Serve application: an ingress, and one controller that holds the engines and conducts the batches.

`serve run batchgen.serve.deployment:app spec=endpoint.yaml no_keys=true`, `serve deploy jobs/serve.yaml`, or `batchgen
serve SPEC`. Nothing is kept here but what the store and the engines themselves can say again: either deployment may be
killed at any moment, and Serve starts another.
"""

import threading
import time
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.exceptions import RayError
from ray.serve import Application
from ray.serve.exceptions import RayServeException

from batchgen.engines import create_tokenizer
from batchgen.queue.events import WorkerPool
from batchgen.serve.abilities import find_abilities
from batchgen.serve.app import create_app
from batchgen.serve.batch_spec import make_served_spec
from batchgen.serve.conductor import Conductor
from batchgen.serve.door import BulkJob
from batchgen.serve.endpoint import Endpoint
from batchgen.serve.exposition import make_exposition
from batchgen.serve.gateway import Gateway, make_away
from batchgen.serve.host import HostReport
from batchgen.serve.interpreter import freeze_loaded, hiding_torch
from batchgen.serve.keys import load_keys
from batchgen.serve.load import check_models, load_endpoint
from batchgen.serve.ray_engines import SharedEngines
from batchgen.serve.ray_shared_pool import SharedPool
from batchgen.serve.routes_completions import create_completions_router
from batchgen.serve.spec import EndpointSpec
from batchgen.serve.state import State
from batchgen.worker.setup import WorkerSetup

LOOK_S = 1.0
CONTROLLER = "Controller"
# Runs get `cluster.drain_s` at a stop, and the margin that a pool gives them to journal.
STOP_MARGIN_S = 20.0


class AppArgs(BaseModel):
    """Arguments of the application, as `serve run` and a Serve file give them."""

    model_config = ConfigDict(extra="forbid")

    spec: str = Field(description="The endpoint's YAML: a path on the cluster's nodes, or a URL.")
    keys: str | None = Field(default=None, description="File of API keys, likewise; absent: BATCHGEN_API_KEYS.")
    no_keys: bool = Field(
        default=False, description="Let everybody in as one tenant: where only this machine reaches it."
    )
    ingresses: int = Field(default=1, ge=1, description="Ingress replicas.")


def app(args: AppArgs) -> Application:
    """Build the application. Raises SpecError, InputError, OutputError for what can't be served."""
    spec = load_endpoint(args.spec)
    check_models(spec)
    State(spec.store).check_store()
    drain_s = max(served.cluster.drain_s for served in spec.models.values())
    controller = serve.deployment(
        Controller,
        name=CONTROLLER,
        num_replicas=1,
        max_ongoing_requests=1000,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=drain_s + STOP_MARGIN_S,
        health_check_period_s=5,
        health_check_timeout_s=30,
    ).bind(spec)

    def make_app() -> FastAPI:
        return create_endpoint_app(spec, args)

    ingress = serve.deployment(
        serve.ingress(make_app)(Ingress),
        name="Ingress",
        num_replicas=args.ingresses,
        max_ongoing_requests=5000,
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=5,
        health_check_timeout_s=30,
    )
    built: Application = ingress.bind(controller)
    return built


class Ingress:
    """Its app finds the controller by name; that it is bound here makes both one application."""

    def __init__(self, controller: Any) -> None:
        self._controller = controller


def create_endpoint_app(spec: EndpointSpec, args: AppArgs) -> FastAPI:
    """The whole API, in an ingress."""
    controller = serve.get_deployment_handle(CONTROLLER)
    keys = None if args.no_keys else load_keys(args.keys)
    with hiding_torch():
        tokenizers = {name: create_tokenizer(make_served_spec(served)) for name, served in spec.models.items()}
    abilities = {
        name: find_abilities(served, tokenizers[name], spec.limits.max_choices) for name, served in spec.models.items()
    }
    completions = create_completions_router(Gateway(controller), abilities, tokenizers)
    endpoint = Endpoint(spec, State(spec.store), keys, lambda: controller.wake.remote() and None, has_front_ids=True)
    made = create_app(endpoint, [completions, create_metrics_router(controller)])
    freeze_loaded()
    return made


def create_metrics_router(controller: Any) -> APIRouter:
    router = APIRouter()

    @router.get("/metrics", tags=["health"], response_class=PlainTextResponse)
    async def metrics() -> str:
        """Prometheus text: engines, what they have in flight, tokens."""
        try:
            return make_exposition(await controller.list_reports.remote())
        except (RayError, RayServeException):  # it is being started anew
            raise make_away() from None

    return router


class Controller:
    """Holds the shared engines of every model, and conducts the batches onto them."""

    def __init__(self, spec: EndpointSpec) -> None:
        self._engines = {name: SharedEngines(spec.store, name, served) for name, served in spec.models.items()}
        self._is_over = threading.Event()
        self._looked_at = time.monotonic()
        self._looking = threading.Thread(target=self._look, name="engines", daemon=True)
        self._looking.start()
        self._conductor = Conductor(spec, State(spec.store), self._create_pool)
        self._conductor.start()

    def wake(self) -> None:
        """A batch was created."""
        self._conductor.wake()

    def list_engines(self) -> dict[str, list[str]]:
        return {name: engines.list_up() for name, engines in self._engines.items()}

    def list_reports(self) -> dict[str, dict[str, HostReport]]:
        return {name: engines.list_reports() for name, engines in self._engines.items()}

    def check_health(self) -> None:
        if not self._looking.is_alive():
            raise RuntimeError("the thread that looks after the engines ended")

    def __del__(self) -> None:
        """Serve's goodbye: runs drain. The engines stay warm for a while, for whoever comes next."""
        self._conductor.stop()
        self._is_over.set()

    def _create_pool(self, setup: WorkerSetup, bulk: BulkJob) -> WorkerPool:
        return SharedPool(setup, self._engines[bulk.model], bulk.batch_id, bulk.expires_at)

    def _look(self) -> None:
        while not self._is_over.wait(LOOK_S):
            for engines in self._engines.values():
                engines.look()
