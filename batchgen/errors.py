"""Everything batchgen raises on purpose.

    BatchgenError
    ├── Refusal                  the job cannot work as asked; nothing was started     exit code 2
    │   ├── SpecError            a field of the spec is wrong
    │   ├── InputError           a file, a column or a type of the input is wrong
    │   ├── OutputError          the output folder cannot be used for this job
    │   └── LeaseHeld            another run holds the output folder
    ├── RunStopped               the run ended early; start it again and it goes on    exit code 3
    │   ├── LeaseLost            another driver took the folder over, or we could not renew
    │   ├── NoWorkers            no worker could be started
    │   ├── Cancelled            `batchgen cancel`, SIGINT or SIGTERM
    │   └── GateFailed           the first rows are beyond a limit of gates.canary    exit code 4
    ├── RowError                 one request failed; becomes an error row, never stops the run
    │   ├── BadRow               the input row itself is at fault                      not retryable
    │   ├── RequestRejected      the engine will never take this request               not retryable
    │   └── RequestFailed        the engine failed on this request                     retryable
    │       └── EngineUnavailable    it was not there or had no room; says nothing of the request
    │           └── EngineRestarted      it died with the request in flight, and starts anew by itself
    ├── EngineDied               the engine can't go on; its worker is lost
    └── StorageError             the store failed after its own retries
        ├── NotFound             no such object
        ├── AlreadyExists        create-if-absent found the object there
        ├── Conflict             replace-if-match found another version
        ├── Damaged              a journal segment is not what was written
        │   └── Foreign          it is another job's, or nobody's
        └── InputChanged         a planned input file is no longer what was planned

Every one of them pickles with its message, because they cross processes. No message ever holds prompt or generated
text, nor a secret. What is retryable is a class attribute, so nothing is ever classified by an error's text.
"""

from typing import ClassVar


class BatchgenError(Exception):
    """Root of the tree. `is_retryable`: would the same request, sent again later, have a chance?"""

    is_retryable: ClassVar[bool] = False


class Refusal(BatchgenError):
    """The job was refused before any engine started. The message names what, where, and the mend."""


class SpecError(Refusal):
    """A field of the spec is unknown, missing, of the wrong type or impossible with another one."""


class InputError(Refusal):
    """An input path, file, column or type can't be used."""


class OutputError(Refusal):
    """The output folder is unwritable or belongs to a job with another fingerprint."""


class LeaseHeld(Refusal):
    """Another live run holds the output folder; the message says who."""


class RunStopped(BatchgenError):
    """The run ended before all rows were done. Everything committed or journaled is kept."""


class LeaseLost(RunStopped):
    """This driver no longer holds the output folder and must not act for it."""


class NoWorkers(RunStopped):
    """No worker could be started; the message carries the first failure's reason."""


class Cancelled(RunStopped):
    """Somebody asked the run to stop."""


class GateFailed(RunStopped):
    """The first rows are not what `gates.canary` wants of them."""


class RowError(BatchgenError):
    """One request failed. `error_type` names the reason in the output (`error_type` column)."""

    def __init__(self, error_type: str, message: str) -> None:
        super().__init__(error_type, message)
        self.error_type = error_type
        self.message = message

    def __str__(self) -> str:
        return self.message


class BadRow(RowError):
    """The input row is at fault: null prompt, malformed messages, prompt too long for the model."""


class RequestRejected(RowError):
    """The engine refuses this request and would refuse it again."""


class RequestFailed(RowError):
    """The engine failed on this request; another attempt may succeed, but not before `retry_after_s` seconds where the
    engine knows when."""

    is_retryable = True

    def __init__(self, error_type: str, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(error_type, message)
        self.args = (error_type, message, retry_after_s)
        self.retry_after_s = retry_after_s


class EngineUnavailable(RequestFailed):
    """The engine did not take the request: it is absent, overloaded or restarting. Trying again costs the request no
    attempt. The engine bounds how long this goes on: it raises EngineDied when it has been of no use for too long."""


class EngineRestarted(EngineUnavailable):
    """The engine died with this request in flight, and starts anew by itself: every request that was in flight gets this
    at once. The worker gives all of them up, so that whichever killed it is found (`suspects`)."""


class EngineDied(BatchgenError):
    """The engine can't serve any more. Rows in flight are given back to the queue."""

    is_retryable = True


class StorageError(BatchgenError):
    """A storage operation failed for good (after the client's own retries)."""

    is_retryable = True


class NotFound(StorageError):
    """No object of that name."""

    is_retryable = False


class AlreadyExists(StorageError):
    """Create-if-absent: an object is there. It may be our own, after a lost reply: look at its content."""


class Conflict(StorageError):
    """Replace-if-match: the object is not the version that was read."""


class Damaged(StorageError):
    """A journal segment is not what was written, or not this job's. Without it its rows are generated again."""

    is_retryable = False


class Foreign(Damaged):
    """A file among the journal's segments that batchgen, or this job, didn't write."""


class InputChanged(StorageError):
    """A planned input file is missing or was changed since it was planned."""

    is_retryable = False
