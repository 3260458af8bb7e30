"""Keeps one pipeline going: reads its log, asks `decide` what comes next, writes it down, then does it.

Written down first and done after: whoever finds it written and not done does it (again), because submitting the same id,
publishing the same run and deleting the same files twice is as good as once. So a keeper may be killed anywhere, and any
number of them may keep the same pipeline.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from batchgen.errors import OutputError, StorageError
from batchgen.pipelines.aftermath import Aftermath, HookTeller, list_run_outputs
from batchgen.pipelines.arrival import Watch
from batchgen.pipelines.calendar import parse_key
from batchgen.pipelines.decide import (
    Arrival,
    Outcome,
    choose_previous,
    decide_begin,
    decide_first,
    decide_gone,
    decide_outcome,
    decide_start,
    describe_failures,
    has_room,
    is_late,
    is_open,
    lend_gpu_hours,
    make_began,
    make_ended,
)
from batchgen.pipelines.events import AttemptFailed, Began, Ended, PartitionEnded, Submitted
from batchgen.pipelines.graph import make_date_values
from batchgen.pipelines.history import History, Run, State
from batchgen.pipelines.log import Log
from batchgen.pipelines.orders import Order, open_folder, read_order, read_outcome, write_order
from batchgen.pipelines.partitions import Partition, list_partitions
from batchgen.pipelines.priors import find_length_priors
from batchgen.pipelines.publish import publish, unpublish
from batchgen.pipelines.spec import PipelineSpec
from batchgen.pipelines.submit import SILENCE_S, LifeSigns, Submission, Submitter, SubmitterAway
from batchgen.storage import Storage

# Schedulers get a new file one after the other; so long one with an old file leaves alone what it does not know.
GONE_GRACE_S = 3600.0


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
    aftermath: Aftermath = field(init=False)
    _partitions: dict[str, dict[str, str]] = field(init=False)
    _watch: Watch = field(init=False)
    _signs: LifeSigns = field(init=False)
    _silent_since: dict[tuple[str, str, int], float] = field(default_factory=dict)
    _arrivals: dict[tuple[str, str], str] = field(default_factory=dict)
    _gone_since: dict[tuple[str, str], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder = open_folder(self.spec)
        self.log = Log(self.folder)
        self.aftermath = Aftermath(
            self.spec, self.folder, self.log, self.teller, self.monotonic, self.say, self.warn, self.only
        )
        self._partitions = list_partitions(self.spec)
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
        self.aftermath.write_told(now)
        away: SubmitterAway | None = None
        for key in [key for key in self.history.active if self.only in (None, key)]:
            try:
                self._advance(key, now, is_away=away is not None)
            except SubmitterAway as error:
                away = error  # for every run: it may take a minute to find that out, and others wait for us
                self._advance(key, now, is_away=True)
        self.aftermath.tell_ends()
        self.aftermath.retire(now)
        self._forget()
        if away is not None:
            raise away

    def _forget(self) -> None:
        """What only runs that have ended needed."""
        active = self.history.active
        self._silent_since = {name: since for name, since in self._silent_since.items() if name[0] in active}
        self._arrivals = {name: missing for name, missing in self._arrivals.items() if name[0] in active}
        self._gone_since = {name: since for name, since in self._gone_since.items() if name[0] in active}
        self._watch.forget()
        self.aftermath.forget()

    # ---- runs --------------------------------------------------------------------------------------------------------

    def _begin(self, now: float) -> None:
        while (event := self._decide_begin(now)) is not None:
            if self.log.append(event):
                skipped = f"; dates from {event.skipped_from} on are skipped" if event.skipped_from else ""
                self.say(f"{self.spec.name} {event.key}: begun ({event.cause}){skipped}")

    def _decide_begin(self, now: float) -> Began | None:
        if self.only is None:
            return decide_begin(self.spec, self.history, now)
        has_place = len(self.history.active) < self.spec.max_active_runs
        is_wanted = self.only in self.history.asked and is_open(self.history, self.only)
        return make_began(self.spec, self.only, "asked", now) if has_place and is_wanted else None

    def _advance(self, key: str, now: float, *, is_away: bool) -> None:
        """All that is to be done for a run; where the submitter is away, what can be done without it."""
        for run, name in () if is_away else self._iterate_parts(key, "running"):
            self._look_after(run, name, now)
        for run, name in self._iterate_parts(key, "retrying", "waiting"):
            if name not in self._partitions:
                self._give_up(run, name, now)
            elif has_room(self.spec, run) or is_late(self.spec, run, now):
                self._consider(run, name, now, is_away=is_away)
        self._finish(key, now)

    def _iterate_parts(self, key: str, *states: State) -> Iterator[tuple[Run, str]]:
        """As the run is when its turn comes: an append that lost has folded in what another scheduler wrote."""
        known = self.history.runs.get(key)
        for name in [] if known is None else list(known.parts):
            run = self.history.runs.get(key)
            if run is not None and run.is_active and name in run.parts and run.parts[name].state in states:
                yield run, name

    def _finish(self, key: str, now: float) -> None:
        """The end of a run whose partitions have ended."""
        run = self.history.runs.get(key)
        if run is None or not run.is_active or any(part.is_active for part in run.parts.values()):
            return
        if run.list_parts("failed"):
            self._end(make_ended(self.spec, run, "failed", describe_failures(run), now))
            return
        try:
            message = self._publish(run, now)
        except OutputError as error:  # something else stands in the pointer's place: no look mends that
            self._end(make_ended(self.spec, run, "failed", f"all is made, nothing is published: {error}", now))
            return
        self._end(make_ended(self.spec, run, "succeeded", message, now))
        ended = self.history.runs.get(key)
        if ended is not None and ended.is_retired and self.spec.publish is not None:
            # We slept after we had looked, and another scheduler did all of this and more.
            unpublish(Storage(self.spec.publish), key)

    def _publish(self, run: Run, now: float) -> str:
        """What there is to say of it. Raises OutputError."""
        if self.spec.publish is None:
            return ""
        outputs: dict[str, object] = {}
        for name, part in run.parts.items():
            outcome = read_outcome(self.folder, run.key, name, part.attempt)
            if outcome is None:
                raise OutputError(f"how attempt {part.attempt} at {run.key} {name} ended was deleted; ask for it again")
            outputs.update(outcome.outputs)
        value = {
            **make_date_values(self.spec, parse_key(run.key)),
            "attempt": run.attempt,
            "published_at": now,
            "outputs": outputs,
        }
        is_newest = publish(Storage(self.spec.publish), run.key, value)
        return "" if is_newest else "a newer date is published; latest.json names it still"

    def _end(self, event: Ended) -> None:
        if self.log.append(event):
            self.aftermath.own_ends.add(event.key)
            tell = self.say if event.state == "succeeded" else self.warn
            tell(f"{self.spec.name} {event.key}: {event.state}{': ' if event.message else ''}{event.message}")

    # ---- partitions --------------------------------------------------------------------------------------------------

    def _consider(self, run: Run, name: str, now: float, *, is_away: bool) -> None:
        decision = decide_start(self.spec, run, name, self._look_for_input(run, name, now), now)
        if isinstance(decision, PartitionEnded):
            self._note(decision)
        elif decision and not is_away:
            self._start(run, name, now)

    def _give_up(self, run: Run, name: str, now: float) -> None:
        """A partition that the file doesn't have: another scheduler may have a newer one, and get to it in a while."""
        since = self._gone_since.setdefault((run.key, name), self.monotonic())
        if self.monotonic() - since >= GONE_GRACE_S or is_late(self.spec, run, now):
            self._note(decide_gone(run, name, now))

    def _look_for_input(self, run: Run, name: str, now: float) -> Arrival:
        if run.parts[name].state != "waiting" or not self.spec.wait_for or is_late(self.spec, run, now):
            return Arrival(True)
        partition: Partition = self._partitions[name]
        try:
            arrival = self._watch.look(self.spec, run.key, partition, len(run.list_parts("waiting")))
        except StorageError as error:
            arrival = Arrival(False, str(error))
        if not arrival.is_there and self._arrivals.get((run.key, name)) != arrival.missing:
            self.say(f"{self._describe(run.key, name)}: waits for its input: {arrival.missing}")
        self._arrivals[run.key, name] = arrival.missing
        return arrival

    def _start(self, run: Run, name: str, now: float) -> None:
        previous = choose_previous(self.history, run, name)
        outputs = None if previous is None else list_run_outputs(self.folder, previous, name)
        order = Order(
            spec=self.spec,
            key=run.key,
            attempt=run.parts[name].attempt + 1,
            previous=outputs,
            length_priors={} if previous is None else self._find_priors(previous, name, outputs or {}),
            began_at=run.began_at,
            partition=name,
            max_gpu_hours=lend_gpu_hours(self.spec, run),
        )
        event = Submitted(
            key=run.key,
            attempt=order.attempt,
            order=write_order(self.folder, order),
            submitter=self.submitter.kind,
            at=now,
            previous=previous.key if previous else "",
            partition=name,
            max_gpu_hours=order.max_gpu_hours,
            length_prior=previous.key if previous and order.length_priors else "",
        )
        if self.log.append(event):
            self.say(f"{self._describe(run.key, name)}: attempt {order.attempt} is submitted")
            self.submitter.submit(self._make_submission(self.history.runs[run.key], name))

    def _find_priors(self, previous: Run, name: str, outputs: dict[str, str]) -> dict[str, str]:
        earlier = read_order(self.folder, previous.parts[name].order).spec if outputs else self.spec
        return find_length_priors(self.spec, self._partitions[name], earlier, outputs, self.warn)

    def _look_after(self, run: Run, name: str, now: float) -> None:
        outcome = self._find_outcome(run, name, now)
        if outcome is not None:
            self._note(decide_outcome(self.spec, run, name, outcome, now))
        elif is_late(self.spec, run, now) and run.parts[name].submitter == self.submitter.kind:
            self.submitter.stop(self._make_submission(run, name))

    def _find_outcome(self, run: Run, name: str, now: float) -> Outcome | None:
        """None while it is at work. An attempt that is not known where it belongs is submitted again."""
        submission, attempt = self._make_submission(run, name), run.parts[name].attempt
        is_ours = run.parts[name].submitter == self.submitter.kind
        status = self.submitter.get_status(submission) if is_ours else self._signs.read_status(submission)
        if status == "running":
            self._silent_since.pop((run.key, name, attempt), None)
            return None
        outcome = read_outcome(self.folder, run.key, name, attempt)
        if outcome is not None:
            return outcome
        if not is_ours and not self._is_silent((run.key, name, attempt)):
            return None
        if status == "unknown" and is_ours:
            if not is_late(self.spec, run, now):
                self.submitter.submit(submission)
                return None
            return Outcome(False, "no attempt got to its end")
        return Outcome(False, f"attempt {attempt} ended without a word: killed, or see the log of {submission.id}")

    def _is_silent(self, name: tuple[str, str, int]) -> bool:
        """Of an attempt that another kind of submitter started."""
        since = self._silent_since.setdefault(name, self.monotonic())
        return self.monotonic() - since >= SILENCE_S

    def _note(self, event: AttemptFailed | PartitionEnded) -> None:
        if not self.log.append(event):
            return
        where = self._describe(event.key, event.partition)
        if isinstance(event, AttemptFailed):
            again = f"again in {event.retry_at - event.at:.0f} s"
            self.warn(f"{where}: attempt {event.attempt} failed: {event.message}; {again}")
        elif event.partition and event.state == "failed":
            self.warn(f"{where}: failed: {event.message}")
        elif event.partition:
            self.say(f"{where}: succeeded")

    def _describe(self, key: str, partition: str) -> str:
        return " ".join(filter(None, [self.spec.name, key, partition]))

    def _make_submission(self, run: Run, name: str) -> Submission:
        part = run.parts[name]
        return Submission(self.folder, self.spec.name, run.key, part.attempt, part.order, name)
