"""Attempts as Ray jobs, through Ray's job API, under submission ids of our own: Ray refuses an id that it has.

A head that is away (dead, starting, unreachable) is `SubmitterAway`. A head that was started anew has forgotten its jobs:
they are submitted again under the same id, and what they find done they don't do again.
"""

import json
import os
import shlex
import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NoReply
from typing import Any

from ray.exceptions import RayError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from batchgen.pipelines.submit import Status, Submission, SubmitterAway

REPLY_TIMEOUT_S = 60.0
# What Ray's client raises: requests' errors (OSErrors), its own authentication's, RuntimeError for every refusal.
_ERRORS = (OSError, RuntimeError, RayError, ValueError)


class RaySubmitter:
    """`address`: http://HEAD:8265. `runtime_env`: of every job; absent, that of the job in which we run ourselves."""

    def __init__(self, address: str | None, runtime_env: dict[str, Any] | None = None) -> None:
        self._address = address
        self._runtime_env = find_own_runtime_env() if runtime_env is None else runtime_env
        self._client: JobSubmissionClient | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._away_until = 0.0

    @property
    def kind(self) -> str:
        return "ray"

    def submit(self, submission: Submission) -> None:
        try:
            self._call(
                lambda client: client.submit_job(
                    entrypoint=make_entrypoint(submission),
                    submission_id=submission.id,
                    runtime_env=self._runtime_env,
                    metadata=make_metadata(submission),
                )
            )
        except SubmitterAway:
            # Ray says 'there is one of this id' as it says anything else: only looking tells.
            if self.get_status(submission) == "unknown":
                raise

    def get_status(self, submission: Submission) -> Status:
        found = self._call(lambda client: _find_job(client, submission.id))
        if found is None:
            return "unknown"
        if submission.arguments[-1] not in shlex.split(found.entrypoint):
            raise SubmitterAway(
                f"Ray has another job of the id {submission.id}: of a pipeline with the same name whose state lies "
                "elsewhere; give one of them another name"
            )
        return "running" if found.status in (JobStatus.PENDING, JobStatus.RUNNING) else "ended"

    def stop(self, submission: Submission) -> None:
        if self.get_status(submission) == "running":
            self._call(lambda client: client.stop_job(submission.id))

    def _call(self, ask: Any) -> Any:
        """In a thread: Ray's client waits for a reply for ever."""
        if time.monotonic() < self._away_until:
            raise SubmitterAway(f"Ray's job API did not answer within {REPLY_TIMEOUT_S:g} s")
        thread = self._thread = self._thread or ThreadPoolExecutor(1, "ray-jobs")
        try:
            return thread.submit(lambda: ask(self._open())).result(REPLY_TIMEOUT_S)
        except NoReply as error:
            self._thread = self._client = None  # it may hang in there; the next call has its own
            self._away_until = time.monotonic() + REPLY_TIMEOUT_S  # or each pipeline would wait as long
            raise SubmitterAway(f"Ray's job API did not answer within {REPLY_TIMEOUT_S:g} s") from error
        except _ERRORS as error:
            raise SubmitterAway(f"Ray's job API: {describe(error)}") from error

    def _open(self) -> JobSubmissionClient:
        if self._client is None:
            self._client = JobSubmissionClient(self._address)
        return self._client


def _find_job(client: JobSubmissionClient, submission_id: str) -> JobDetails | None:
    """None where the head knows none of this id. Ray's client says that as it says anything else, a RuntimeError, so only
    then are all its jobs listed, which may be many."""
    try:
        return client.get_job_info(submission_id)
    except RuntimeError:
        return next((job for job in client.list_jobs() if job.submission_id == submission_id), None)


def make_entrypoint(submission: Submission) -> str:
    return shlex.join(["python", "-m", "batchgen.cli", *submission.arguments])


def make_metadata(submission: Submission) -> dict[str, str]:
    """For people who look at the head's jobs."""
    return {"pipeline": submission.name, "run": submission.key, "partition": submission.partition}


def describe(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def find_own_runtime_env() -> dict[str, Any]:
    """Of the Ray job that this process is the driver of: its runs get the same files and packages. {} elsewhere."""
    described = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    runtime_env: dict[str, Any] = dict(described.get("runtime_env") or {})
    return {name: value for name, value in runtime_env.items() if not name.startswith("_")}
