"""What an attempt is told, what it says at its end, and where both lie. Orders are named by their content, and outcomes are
written by whoever holds the run: nothing here is ever read half written or from another attempt.
"""

import hashlib
import json
from dataclasses import asdict
from typing import Any

from pydantic import BaseModel, ConfigDict

from batchgen.errors import NotFound, OutputError
from batchgen.pipelines.decide import Outcome
from batchgen.pipelines.spec import PipelineSpec
from batchgen.storage import Storage


class Order(BaseModel):
    """One attempt at one partition of a run. `previous`: outputs of the previous successful run by the jobs' names;
    `length_priors`: those of them whose measured lengths are expected where a job does not say; `max_gpu_hours`: what it
    may use; `began_at`: of the run, Unix seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    spec: PipelineSpec
    key: str
    attempt: int
    previous: dict[str, str] | None
    length_priors: dict[str, str] = {}
    began_at: float
    partition: str = ""
    max_gpu_hours: float | None = None


def open_folder(spec: PipelineSpec) -> Storage:
    """The pipeline's own folder in its state."""
    return Storage(f"{spec.state}/{spec.name}")


def make_submission_id(name: str, key: str, partition: str, attempt: int) -> str:
    """One for each attempt, the same for everybody. A key has one form and an attempt no `-`, so none is like another."""
    return "-".join(filter(None, ["batchgen", name, key, partition, str(attempt)]))


def make_run_folder(key: str, partition: str) -> str:
    """Of one partition of a run."""
    return f"runs/{key}/{partition}" if partition else f"runs/{key}"


def make_outcome_path(key: str, partition: str, attempt: int) -> str:
    return f"{make_run_folder(key, partition)}/attempt-{attempt:03d}.json"


def make_started_path(key: str, partition: str, attempt: int) -> str:
    return f"{make_run_folder(key, partition)}/started-{attempt:03d}.json"


def write_order(storage: Storage, order: Order) -> str:
    """Its digest. Writing it again changes nothing."""
    data = order.model_dump_json().encode()
    digest = hashlib.sha256(data).hexdigest()[:32]
    storage.put(make_order_path(digest), data)
    return digest


def make_order_path(digest: str) -> str:
    return f"orders/{digest}.json"


def read_order(storage: Storage, digest: str) -> Order:
    """Raises OutputError, StorageError."""
    path = make_order_path(digest)
    try:
        return Order.model_validate_json(storage.read_bytes(path))
    except ValueError as error:
        raise OutputError(f"{storage.url(path)}: is damaged, or of another version; ask for the date again") from error


def write_outcome(storage: Storage, key: str, partition: str, attempt: int, outcome: Outcome) -> None:
    storage.put(make_outcome_path(key, partition, attempt), json.dumps(asdict(outcome)).encode())


def read_outcome(storage: Storage, key: str, partition: str, attempt: int) -> Outcome | None:
    """None where the attempt has not said how it ended."""
    path = make_outcome_path(key, partition, attempt)
    try:
        fields: dict[str, Any] = json.loads(storage.read_bytes(path))
        return Outcome(**fields)
    except NotFound:
        return None
    except (ValueError, TypeError) as error:
        raise OutputError(f"{storage.url(path)}: is damaged; delete it, and the attempt is made again") from error
