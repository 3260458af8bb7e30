"""The last run of a batch whose time is over: nothing is generated, and every shard is committed all the same.

What was finished is in the journal and is kept; each row that is missing ends as an error. So the folder of an expired or
cancelled batch is a whole job like any other, and conservation can be checked. Needs no engine and no cluster.
"""

from dataclasses import replace

from batchgen.driver.inline_pool import InlinePool
from batchgen.engines.base import Tokenizer
from batchgen.errors import EngineUnavailable
from batchgen.records import Generation, Lease, Request
from batchgen.spec import JobSpec, WorkersSpec
from batchgen.worker.worker import Worker, WorkerSetup


class NoEngine:
    """In the place of an engine that nothing is asked of."""

    version = "none"
    total_tokens = 0
    max_model_len: int | None = None
    tokenizer: Tokenizer | None = None

    def __init__(self, kind: str) -> None:
        self.kind = kind

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    async def generate(self, request: Request) -> Generation:
        del request
        raise EngineUnavailable("closing", "the batch is being closed: nothing is generated any more")


async def open_closing_worker(setup: WorkerSetup, node: str) -> Worker:
    worker = Worker(setup, NoEngine(setup.spec.engine.kind), node)
    await worker.open()
    return worker


class ClosingPool(InlinePool):
    """Each lease is a last resort: what the journal lacks becomes an error row."""

    def __init__(self, setup: WorkerSetup) -> None:
        super().__init__(setup, open_closing_worker)

    def assign(self, lease: Lease) -> None:
        super().assign(replace(lease, is_last_resort=True, only=(), reason="the batch was closed before it was done"))


def make_closing_spec(spec: JobSpec) -> JobSpec:
    """The same job, run by one thread here, with no second try of any error."""
    cluster = spec.cluster.model_copy(update={"pool": "inline", "workers": WorkersSpec(), "deadline": None})
    retry = spec.retry.model_copy(update={"errors": "none"})
    return spec.model_copy(update={"cluster": cluster, "retry": retry})
