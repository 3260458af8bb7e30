"""Jobs that were started elsewhere (`ray job submit`) under the endpoint's prefix, seen as batches. Blocking.

`PREFIX/TENANT/NAME` is such a job's output folder. Its id is made of when its first run began and of its folder, so
nothing is written for it here, and whoever can't see the folder can't find it by its id.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from batchgen.driver.control import find_lock, read_status, request_cancel
from batchgen.driver.lease import FOLDER, make_cancel_path, parse_holder, read_live_holder
from batchgen.errors import NotFound, OutputError
from batchgen.manifest import SPEC, read_json
from batchgen.serve.errors import ApiError
from batchgen.serve.ids import is_dated_digest, make_dated_digest
from batchgen.serve.wire import CHAT, COMPLETIONS, Batch, BatchError, BatchErrors, BatchStatus, RequestCounts
from batchgen.storage import Storage

log = logging.getLogger("batchgen.serve")


@dataclass(frozen=True, slots=True)
class OwnJob:
    """One job. `started_at`: of its first run (seconds since the epoch)."""

    id: str
    name: str
    storage: Storage
    started_at: float

    def read(self) -> Batch:
        """As a batch: what its spec, its status and its lease say."""
        spec = (read_json(self.storage, SPEC) or {}).get("spec", {})
        status = read_status(self.storage) or {}
        state, at = self._find_state(status), int(status.get("updated_at", self.started_at))
        progress = status.get("progress", {})
        done, failed = int(progress.get("num_rows_done", 0)), int(progress.get("num_rows_error", 0))
        total = int(progress.get("num_rows", 0))
        if state == "completed":
            total = done
        ends = {f"{state}_at": at} if state in ("completed", "cancelled", "failed", "cancelling") else {}
        lost = BatchError(code="run_lost", message="Its run ended without a word; submit it again, and it goes on.")
        return Batch(
            id=self.id,
            endpoint=COMPLETIONS if spec.get("prompt", {}).get("chat") is False else CHAT,
            model=spec.get("model", {}).get("path"),
            input_file_id=", ".join(spec.get("input", {}).get("paths", [])) or self.name,
            completion_window="none",
            status=state,
            errors=BatchErrors(data=[lost]) if state == "failed" else None,
            created_at=int(self.started_at),
            in_progress_at=int(self.started_at),
            request_counts=RequestCounts(total=total, completed=max(0, done - failed), failed=failed),
            metadata={"job": self.name, "output": self.storage.root},
            **ends,
        )

    def _find_state(self, status: dict[str, Any]) -> BatchStatus:
        if status.get("state") == "finished":
            return "completed"
        holder = read_live_holder(find_lock(self.storage))
        if holder is not None:
            is_asked = self.storage.info(make_cancel_path(holder.epoch)) is not None
            return "cancelling" if is_asked else "in_progress"
        return "cancelled" if status.get("state") == "stopped" else "failed"

    def cancel(self) -> Batch:
        """Ask its run to stop, as `batchgen cancel` does. Raises ApiError (409) where none is working on it."""
        try:
            request_cancel(self.storage)
        except OutputError:
            raise ApiError(409, "No run is working on this job.", code="batch_not_cancellable") from None
        return self.read()


class Jobs:
    """All jobs below the prefix; none where there is no prefix."""

    def __init__(self, prefix: str | None) -> None:
        self._prefix = None if prefix is None else Storage(prefix)

    def list(self, tenant: str) -> Iterator[OwnJob]:
        opened = (self._open(tenant, name) for name in self._list_names(tenant))
        return (job for job in opened if job is not None)

    def find(self, tenant: str, batch_id: str) -> OwnJob | None:
        """Opens only what its folder's name fits: an id that is nobody's costs a listing."""
        for name in self._list_names(tenant):
            if is_dated_digest(batch_id.removeprefix("batch_"), self._url(tenant, name)):
                job = self._open(tenant, name)
                return job if job is not None and job.id == batch_id else None
        return None

    def _list_names(self, tenant: str) -> Sequence[str]:
        return [] if self._prefix is None else self._prefix.list_folders(tenant)

    def _url(self, tenant: str, name: str) -> str:
        assert self._prefix is not None, "without a prefix there are no names"
        return self._prefix.url(f"{tenant}/{name}")

    def _open(self, tenant: str, name: str) -> OwnJob | None:
        """None for what is no job of ours, or none that has begun; one that is damaged is told of, and hides no other."""
        storage = Storage(self._url(tenant, name))
        try:
            started_at = parse_holder(find_lock(storage).read_bytes(f"{FOLDER}/{1:09d}.json")).started_at
        except (NotFound, ValueError):
            return None
        except OutputError as error:
            log.warning("a job is not shown: %s", error)
            return None
        return OwnJob(f"batch_{make_dated_digest(started_at, storage.root)}", name, storage, started_at)
