"""After a run's end: hooks are told, and what retention no longer keeps is deleted. Of one pipeline, by one scheduler.

As all of a keeper's doings: written down in the log, done again by whoever finds it undone.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from batchgen.pipelines.calendar import parse_key
from batchgen.pipelines.cleanup import delete_some
from batchgen.pipelines.decide import choose_retired
from batchgen.pipelines.events import Deleted, Notified, Retired
from batchgen.pipelines.graph import make_date_values, make_jobs
from batchgen.pipelines.history import History, Run
from batchgen.pipelines.hooks import make_payload
from batchgen.pipelines.log import Log
from batchgen.pipelines.orders import read_order
from batchgen.pipelines.publish import read_published
from batchgen.pipelines.spec import HookSpec, PipelineSpec
from batchgen.storage import Storage

# Files deleted in one go: a run of 100,000 files must not hold up the others' starts.
DELETE_FILES = 500
# Another scheduler's hooks are its own for so long; then it is taken for dead.
HOOK_GRACE_S = 300.0


class HookTeller(Protocol):
    """Tells hooks in the background."""

    def start(self, key: str, hook: HookSpec, payload: dict[str, Any]) -> None: ...

    def collect(self) -> list[tuple[str, str, str | None]]: ...


def list_run_outputs(folder: Storage, run: Run, partition: str | None = None) -> dict[str, str]:
    """Output folders of a run, or of one of its partitions, by the jobs' names; none of what never got so far."""
    found: dict[str, str] = {}
    for name, part in run.parts.items():
        if part.order and partition in (None, name):
            order = read_order(folder, part.order)
            jobs = make_jobs(order.spec, parse_key(run.key), order.previous, only=name, only_outputs=True)
            found.update({job.name: Storage(job.output).root for job in jobs})
    return found


@dataclass(slots=True)
class Aftermath:
    """`only`: knows nothing but the run of this date, and retires none."""

    spec: PipelineSpec
    folder: Storage
    log: Log
    teller: HookTeller
    monotonic: Callable[[], float]
    say: Callable[[str], None]
    warn: Callable[[str], None]
    only: str | None = None
    own_ends: set[str] = field(default_factory=set)
    _told: set[tuple[str, float | None]] = field(default_factory=set)  # ends: a date that failed may have another one
    _seen_ends: dict[str, float] = field(default_factory=dict)
    _retired_at: int = -1

    @property
    def history(self) -> History:
        return self.log.history

    def forget(self) -> None:
        """Runs that the history does not know in full any more."""
        known = self.history.runs.keys()
        self.own_ends &= known
        self._told = {end for end in self._told if end[0] in known}
        self._seen_ends = {key: since for key, since in self._seen_ends.items() if key in known}

    # ---- hooks -------------------------------------------------------------------------------------------------------

    def write_told(self, now: float) -> None:
        for key, hook, problem in self.teller.collect():
            if problem is not None:
                self.warn(
                    f"{self.spec.name} {key}: hook {self._get_number(hook)}was not told, in four tries: {problem}"
                )
            event = Notified(key, hook, problem is None, problem or "", now)
            while not self._is_told(key, hook) and not self.log.append(event):
                continue

    def _get_number(self, hook: str) -> str:
        hooks = [known.id for known in (*self.spec.on_success, *self.spec.on_failure)]
        return f"{hooks.index(hook) + 1} " if hook in hooks else ""

    def _is_told(self, key: str, hook: str) -> bool:
        run = self.history.runs.get(key)
        return run is None or hook not in run.hooks_left

    def tell_ends(self) -> None:
        for key in sorted(self.history.runs.keys() - self.history.active.keys()):
            run = self.history.runs[key]
            if self.only not in (None, key) or (key, run.ended_at) in self._told:
                continue
            left = list_hooks_left(self.spec, run)
            if not left:
                self._told.add((key, run.ended_at))
            if not left or not self._may_tell(key):
                continue
            values = make_date_values(self.spec, parse_key(run.key))
            payload = make_payload(self.spec, run, values, list_run_outputs(self.folder, run))
            for hook in left:
                self.teller.start(run.key, hook, payload)

    def _may_tell(self, key: str) -> bool:
        """Who wrote the end tells it; others do when it takes them too long."""
        since = self._seen_ends.setdefault(key, self.monotonic())
        return key in self.own_ends or self.monotonic() - since >= HOOK_GRACE_S

    # ---- retention ---------------------------------------------------------------------------------------------------

    def retire(self, now: float) -> None:
        if self.spec.retention is None or self.only is not None or self.history.length == self._retired_at:
            return
        # The pointer is read only where there is something to retire: once a run, not once a look.
        key = choose_retired(self.spec, self.history, ())
        key = key and choose_retired(self.spec, self.history, self._list_protected())
        if key is not None and self.log.append(Retired(key, now)):
            self.say(f"{self.spec.name} {key}: its outputs are deleted, by retention.keep")
        for run in [run for run in self.history.runs.values() if run.is_retired and not run.is_deleted]:
            outputs = list(list_run_outputs(self.folder, run).values())
            if delete_some(outputs, self.spec.publish, run.key, DELETE_FILES):
                self.log.append(Deleted(run.key, now))
            return
        if key is None:
            self._retired_at = self.history.length  # nothing is to go until something happens

    def _list_protected(self) -> Iterable[str]:
        """What is published, and what active runs read."""
        published = None if self.spec.publish is None else read_published(Storage(self.spec.publish))
        read = (part.previous for run in self.history.list_active() for part in run.parts.values())
        return [*filter(None, [published]), *filter(None, read)]


def list_hooks_left(spec: PipelineSpec, run: Run) -> list[HookSpec]:
    """Hooks of an ended run that are still to be told, and still in the file; each once."""
    hooks = {hook.id: hook for hook in spec.list_hooks(run.end == "succeeded")}
    return [hooks[name] for name in run.hooks_left if name in hooks]
