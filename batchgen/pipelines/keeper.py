"""Keeps one pipeline going: reads its log, asks `decide` what comes next, writes it down, then does it.

Written down first and done after: whoever finds it written and not done does it (again), because submitting the same id,
publishing the same run and deleting the same files twice is as good as once. So a keeper may be killed anywhere, and any
number of them may keep the same pipeline.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from batchgen.errors import StorageError
from batchgen.pipelines.arrival import Watch
from batchgen.pipelines.calendar import parse_key
from batchgen.pipelines.cleanup import delete_some
from batchgen.pipelines.decide import (
    Arrival,
    Outcome,
    choose_retired,
    decide_begin,
    decide_first,
    decide_outcome,
    decide_start,
    find_previous,
    is_late,
    is_open,
)
from batchgen.pipelines.events import Began, Deleted, Ended, History, Notified, Retired, Run, Submitted
from batchgen.pipelines.graph import make_date_values, make_jobs
from batchgen.pipelines.hooks import make_payload
from batchgen.pipelines.log import Log
from batchgen.pipelines.orders import Order, open_folder, read_order, read_outcome, write_order
from batchgen.pipelines.publish import read_published
from batchgen.pipelines.spec import HookSpec, PipelineSpec
from batchgen.pipelines.submit import SILENCE_S, LifeSigns, Submission, Submitter, SubmitterAway
from batchgen.storage import Storage

# Files deleted in one go: a run of 100,000 files must not hold up the others' starts.
DELETE_FILES = 500
# Another scheduler's hooks are its own for so long; then it is taken for dead.
HOOK_GRACE_S = 300.0


class HookTeller(Protocol):
    """Tells hooks in the background."""

    def start(self, key: str, number: int, hook: HookSpec, payload: dict[str, Any]) -> None: ...

    def collect(self) -> list[tuple[str, int, str | None]]: ...


@dataclass(slots=True)
class Keeper:
    """Of one pipeline, by one scheduler. `only`: keeps nothing but the run of this date, and begins it at once. `say` and
    `warn` are told what happens. `now` is Unix seconds; `monotonic` never jumps."""

    spec: PipelineSpec
    submitter: Submitter
    teller: HookTeller
    monotonic: Callable[[], float]
    say: Callable[[str], None]
    warn: Callable[[str], None]
    only: str | None = None
    folder: Storage = field(init=False)
    log: Log = field(init=False)
    _watch: Watch = field(init=False)
    _signs: LifeSigns = field(init=False)
    _own_ends: set[str] = field(default_factory=set)
    _told: set[tuple[str, float | None]] = field(default_factory=set)  # ends: a date that failed may have another one
    _retired_at: int = -1
    _seen_ends: dict[str, float] = field(default_factory=dict)
    _silent_since: dict[str, float] = field(default_factory=dict)
    _arrivals: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder = open_folder(self.spec)
        self.log = Log(self.folder)
        self._watch, self._signs = Watch(self.monotonic), LifeSigns(self.monotonic)

    @property
    def history(self) -> History:
        return self.log.history

    def keep(self, now: float) -> None:
        """One look, and all that follows from it. Raises SubmitterAway, StorageError, OutputError: look again later."""
        self.log.catch_up()
        if (first := decide_first(self.spec, self.history, now)) is not None:
            self.log.append(first)
        self._begin(now)
        self._write_told(now)
        away: SubmitterAway | None = None
        for key in self._list_kept():
            # As it is now: an append that lost has folded in what another scheduler wrote, perhaps of this very run.
            if (run := self.history.runs.get(key)) is None or not run.is_active:
                continue
            try:
                self._advance(run, now)
            except SubmitterAway as error:
                away = error
        self._tell_ends()
        self._retire(now)
        if away is not None:
            raise away

    def _list_kept(self) -> list[str]:
        return [key for key in self.history.active if self.only in (None, key)]

    # ---- runs --------------------------------------------------------------------------------------------------------

    def _begin(self, now: float) -> None:
        while (event := self._decide_begin(now)) is not None:
            if self.log.append(event):
                skipped = f"; dates from {event.skipped_from} on are skipped" if event.skipped_from else ""
                self.say(f"{self.spec.name} {event.key}: begun ({event.cause}){skipped}")

    def _decide_begin(self, now: float) -> Began | None:
        if self.only is None:
            return decide_begin(self.spec, self.history, now)
        has_room = len(self.history.list_active()) < self.spec.max_active_runs
        is_wanted = self.only in self.history.asked and is_open(self.history, self.only)
        return Began(self.only, "asked", now) if has_room and is_wanted else None

    def _advance(self, run: Run, now: float) -> None:
        if run.state == "running":
            self._look_after(run, now)
            return
        decision = decide_start(self.spec, run, self._look_for_input(run, now), now)
        if isinstance(decision, Ended):
            self._end(decision)
        elif decision:
            self._start(run, now)

    def _look_for_input(self, run: Run, now: float) -> Arrival:
        if run.state != "waiting" or not self.spec.wait_for or is_late(self.spec, run, now):
            return Arrival(True)
        try:
            arrival = self._watch.look(self.spec, run.key)
        except StorageError as error:
            arrival = Arrival(False, str(error))
        if not arrival.is_there and self._arrivals.get(run.key) != arrival.missing:
            self.say(f"{self.spec.name} {run.key}: waits for its input: {arrival.missing}")
        self._arrivals[run.key] = arrival.missing
        return arrival

    def _start(self, run: Run, now: float) -> None:
        previous = find_previous(self.history, run.key)
        order = Order(
            spec=self.spec,
            key=run.key,
            attempt=run.attempt + 1,
            previous=None if previous is None else self.list_outputs(previous),
            began_at=run.began_at,
            spent_gpu_hours=run.gpu_hours,
        )
        digest = write_order(self.folder, order)
        event = Submitted(run.key, order.attempt, digest, self.submitter.kind, now, previous.key if previous else "")
        if self.log.append(event):
            self.say(f"{self.spec.name} {run.key}: attempt {order.attempt} is submitted")
            self.submitter.submit(self._make_submission(self.history.runs[run.key]))

    def _look_after(self, run: Run, now: float) -> None:
        outcome = self._find_outcome(run, now)
        if outcome is None:
            if is_late(self.spec, run, now) and run.submitter == self.submitter.kind:
                self.submitter.stop(self._make_submission(run))
            return
        event = decide_outcome(self.spec, run, outcome, now)
        if isinstance(event, Ended):
            self._end(event)
        elif self.log.append(event):
            wait_s = event.retry_at - now
            self.warn(
                f"{self.spec.name} {run.key}: attempt {run.attempt} failed: {event.message}; again in {wait_s:.0f} s"
            )

    def _find_outcome(self, run: Run, now: float) -> Outcome | None:
        """None while it is at work. An attempt that is not known where it belongs is submitted again."""
        submission = self._make_submission(run)
        is_ours = run.submitter == self.submitter.kind
        status = self.submitter.get_status(submission) if is_ours else self._signs.read_status(submission)
        if status == "running":
            self._silent_since.pop(submission.id, None)
            return None
        outcome = read_outcome(self.folder, run.key, run.attempt)
        if outcome is not None:
            return outcome
        if not is_ours and not self._is_silent(submission.id):
            return None
        if status == "unknown" and is_ours:
            if not is_late(self.spec, run, now):
                self.submitter.submit(submission)
                return None
            return Outcome(False, "no attempt got to its end")
        return Outcome(False, f"attempt {run.attempt} ended without a word: killed, or see the log of {submission.id}")

    def _is_silent(self, name: str) -> bool:
        """Of an attempt that another kind of submitter started."""
        since = self._silent_since.setdefault(name, self.monotonic())
        return self.monotonic() - since >= SILENCE_S

    def _end(self, event: Ended) -> None:
        if self.log.append(event):
            self._own_ends.add(event.key)
            tell = self.say if event.state == "succeeded" else self.warn
            tell(f"{self.spec.name} {event.key}: {event.state}{': ' if event.message else ''}{event.message}")

    def _make_submission(self, run: Run) -> Submission:
        return Submission(self.folder, self.spec.name, run.key, run.attempt, run.order)

    def list_outputs(self, run: Run) -> dict[str, str]:
        """Output folders of a run by its jobs' names; {} where it never got so far."""
        if not run.order:
            return {}
        order = read_order(self.folder, run.order)
        jobs = make_jobs(order.spec, parse_key(run.key), order.previous, only_outputs=True)
        return {job.name: Storage(job.output).root for job in jobs}

    # ---- after their end ---------------------------------------------------------------------------------------------

    def _write_told(self, now: float) -> None:
        for key, number, problem in self.teller.collect():
            if problem is not None:
                self.warn(f"{self.spec.name} {key}: hook {number + 1} was not told, after four tries: {problem}")
            event = Notified(key, number, problem is None, problem or "", now)
            while not self._is_told(key, number) and not self.log.append(event):
                continue

    def _is_told(self, key: str, number: int) -> bool:
        run = self.history.runs.get(key)
        return run is None or number in run.notified

    def _tell_ends(self) -> None:
        for key in sorted(self.history.runs.keys() - self.history.active.keys()):
            run = self.history.runs[key]
            if self.only not in (None, key) or (key, run.ended_at) in self._told:
                continue
            hooks = self.spec.list_hooks(run.state == "succeeded")
            left = [number for number in range(len(hooks)) if number not in run.notified]
            if not left:
                self._told.add((key, run.ended_at))
            if not left or not self._may_tell(key):
                continue
            values = make_date_values(self.spec, parse_key(run.key))
            payload = make_payload(self.spec, run, values, self.list_outputs(run))
            for number in left:
                self.teller.start(run.key, number, hooks[number], payload)

    def _may_tell(self, key: str) -> bool:
        """Who wrote the end tells it; others do when it takes them too long."""
        since = self._seen_ends.setdefault(key, self.monotonic())
        return key in self._own_ends or self.monotonic() - since >= HOOK_GRACE_S

    def _retire(self, now: float) -> None:
        if self.spec.retention is None or self.only is not None or self.history.length == self._retired_at:
            return
        # The pointer is read only where there is something to retire: once a run, not once a look.
        key = choose_retired(self.spec, self.history, ())
        key = key and choose_retired(self.spec, self.history, self._list_protected())
        if key is not None and self.log.append(Retired(key, now)):
            self.say(f"{self.spec.name} {key}: its outputs are deleted, by retention.keep")
        for run in [run for run in self.history.runs.values() if run.is_retired and not run.is_deleted]:
            outputs = list(self.list_outputs(run).values())
            if delete_some(outputs, self.spec.publish, run.key, DELETE_FILES):
                self.log.append(Deleted(run.key, now))
            return
        if key is None:
            self._retired_at = self.history.length  # nothing is to go until something happens

    def _list_protected(self) -> Iterable[str]:
        """What is published, and what active runs read."""
        published = None if self.spec.publish is None else read_published(Storage(self.spec.publish))
        return [*filter(None, [published]), *(run.previous for run in self.history.list_active())]
