"""A job as its output folder shows it: the frozen plan, what is committed, what is left. Reads; only `freeze` writes.

Opening the same job twice gives the same plan. New input files are left out with a warning once the plan stands; planned
ones that are missing or changed are refused by name.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from batchgen import manifest
from batchgen.engines import create_tokenizer
from batchgen.errors import Foreign, InputError, OutputError, Refusal, SpecError, StorageError
from batchgen.gates.decide import list_canary
from batchgen.journal import JournalIndex, list_segments, read_indexes
from batchgen.length_files import Measured, find_measured, measure_shards, read_prior
from batchgen.lengths import LengthPrior, choose_cost, choose_work, must_go_in_order
from batchgen.manifest import CommittedShard
from batchgen.plan import Plan, expected_tokens, make_plan
from batchgen.preflight.tokenizer_files import digest_tokenizer
from batchgen.queue.work_queue import QueuedShard
from batchgen.records import Shard
from batchgen.reuse.outputs import check_outputs
from batchgen.spec import JobSpec
from batchgen.specs.inputs import check_frozen, find_inputs, inspect_inputs
from batchgen.specs.validate import check_spec, render_first
from batchgen.storage import Storage
from batchgen.verify.damage import refusing_damage
from batchgen.worker.handoff import list_handoffs
from batchgen.worker.seal import seal_json
from batchgen.write import make_output_schema


@dataclass(frozen=True, slots=True)
class Job:
    """Everything known before any worker starts."""

    spec: JobSpec
    storage: Storage
    plan: Plan
    passthrough: pa.Schema
    committed: dict[int, CommittedShard]
    is_unique_checked: bool | None
    new_shards: tuple[Shard, ...]
    is_new: bool
    warnings: tuple[str, ...] = field(default=())
    prior: LengthPrior | None = None

    @property
    def todo(self) -> list[QueuedShard]:
        """Shards to be done: not committed, or holding errors that this run tries again."""
        canary = {shard.number for shard in list_canary(self.spec, self.plan.shards)}
        queued = (self._queue(each, is_canary=each.number in canary) for each in self.wanted)
        return [one for one in queued if one is not None]

    @property
    def is_in_order(self) -> bool:
        """Are shards lent as they come, until answers bear the hints out?"""
        spec, num_requests = self.spec, self.num_wanted_rows * self.spec.sampling.n
        is_hinted = any(shard.expected_tokens is not None for shard in self.plan.shards)
        return must_go_in_order(num_requests, spec.cluster.workers.max, spec.engine.max_inflight, is_hinted=is_hinted)

    @property
    def wanted(self) -> list[Shard]:
        """Planned shards that hold any of the first `input.limit` rows."""
        limit, position, wanted = self.spec.input.limit, 0, []
        for shard in self.plan.shards:
            if limit is None or position < limit:
                wanted.append(shard)
            position += shard.num_rows
        return wanted

    def _queue(self, shard: Shard, *, is_canary: bool) -> QueuedShard | None:
        done = self.committed.get(shard.number)
        known = self._make_length_facts()
        work = choose_work(shard, **known)
        cost = math.inf if is_canary else choose_cost(shard, **known)
        if done is None:
            return QueuedShard(shard, cost=cost, work=work)
        num_again = {
            "none": 0,
            "retryable": done.footer.num_rows_retryable,
            "all": done.footer.num_rows_error,
        }[self.spec.retry.errors]
        if num_again == 0:
            return None
        again = work * num_again / (self.spec.sampling.n * shard.num_rows)
        cost = math.inf if is_canary else again
        return QueuedShard(shard, done.footer.attempt + 1, replaces=done.info.version, cost=cost, work=again)

    def _make_length_facts(self) -> dict[str, Any]:
        sampling = self.spec.sampling
        return {
            "n": sampling.n,
            "window": self.spec.engine.max_inflight,
            "max_tokens": sampling.max_tokens,
            "prior": self.prior,
            "default_tokens": expected_tokens(self.spec) / sampling.n,
        }

    @property
    def num_wanted_rows(self) -> int:
        return sum(shard.num_rows for shard in self.wanted)

    @property
    def is_whole(self) -> bool:
        """Does the plan cover every row of the input?"""
        return self.plan.num_planned_rows == self.plan.num_rows


def check_fingerprint(storage: Storage, spec: JobSpec) -> None:
    """Raises OutputError when the folder holds another job, naming what differs; or files that are nobody's job."""
    saved = manifest.read_json(storage, manifest.SPEC)
    if saved is None:
        strays = storage.list_files("data", suffix=".parquet")
        if strays:
            raise OutputError(
                f"{storage.root}: has data/ but no job of batchgen; choose an empty folder for output.path"
            )
        return
    if saved.get("fingerprint") != spec.fingerprint():
        names = ", ".join(_list_differences(saved.get("fingerprint_fields"), spec.fingerprint_fields()))
        names = names or "content in its spec.json"
        raise OutputError(
            f"{storage.root}: holds a job with other {names}; choose another output.path, or restore what was changed"
        )


def _list_differences(old: object, new: object, path: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        names = dict.fromkeys([*old, *new])
        return [d for name in names for d in _list_differences(old.get(name), new.get(name), f"{path}.{name}")]
    return [] if old == new else [path.lstrip(".")]


@contextmanager
def refusing() -> Iterator[None]:
    """Nothing was started yet: a store that can't be used is a reason to refuse, not to stop."""
    try:
        yield
    except StorageError as error:
        raise Refusal(str(error)) from error


@refusing()
def open_job(spec: JobSpec, storage: Storage) -> Job:
    """Plan, or read the plan that stands. Raises Refusal with one sentence for whatever can't work."""
    check_spec(spec)
    check_fingerprint(storage, spec)
    found = find_inputs(spec)
    saved = manifest.read_plan(storage)
    spec = keep_saved_columns(storage, spec)
    check_outputs(spec)
    if saved is None:
        files, passthrough, is_unique, group_bytes = inspect_inputs(spec, found)
        planned: list[Shard] = []
        warnings: list[str] = []
        measured = find_measured(spec.input)
    else:
        files, passthrough, planned = saved
        group_bytes = {}
        facts = manifest.read_json(storage, manifest.SPEC) or {}
        is_unique = facts.get("is_unique_checked")
        measured = find_planned_measure(storage, facts)
        warnings = [*check_frozen(files, found), *check_tokenizer(spec, facts.get("tokenizer_sha256"))]
        if not planned:  # a driver died between files and shards: these are cut as it would have cut them
            frozen = {file.path for file in files}
            *_, group_bytes = inspect_inputs(spec, [info for info in found if info.path in frozen])
    prior = read_prior(spec)
    plan = make_plan(spec, files, planned, group_bytes, None if prior is None else prior.mean_tokens)
    plan = replace(plan, shards=tuple(measure_shards(plan.shards, spec, measured, prior)))
    make_output_schema(spec, passthrough)
    return Job(
        spec=spec,
        storage=storage,
        plan=plan,
        passthrough=passthrough,
        committed=manifest.load_committed(storage, spec.fingerprint()),
        is_unique_checked=is_unique,
        new_shards=plan.shards[len(planned) :],
        is_new=saved is None,
        warnings=tuple(warnings),
        prior=prior,
    )


def keep_saved_columns(storage: Storage, spec: JobSpec) -> JobSpec:
    """Raises OutputError where what the job began with can't be read, SpecError where this run needs other columns."""
    with refusing_damage(storage.url(manifest.SPEC), manifest.DAMAGED):
        facts = manifest.read_json(storage, manifest.SPEC)
        had = bool(facts["spec"]["output"].get("row_fingerprints", False)) if facts else spec.output.row_fingerprints
    if had == spec.output.row_fingerprints:
        return spec
    if spec.input.reuse_from:
        raise SpecError(
            f"input.reuse_from: the job in {storage.root} began without row fingerprints; leave it out, or start a new "
            "output.path"
        )
    return spec.model_copy(update={"output": spec.output.model_copy(update={"row_fingerprints": had})})


def find_planned_measure(storage: Storage, facts: Mapping[str, Any]) -> Measured | None:
    """What the sums in the frozen plan are of."""
    with refusing_damage(storage.url(manifest.SPEC), manifest.DAMAGED):
        saved = facts["spec"]["input"] if facts else {}
        found = ((name, saved.get(name)) for name in ("length_hint", "length_template"))
        return next(((name, str(column)) for name, column in found if column is not None), None)


def reopen(job: Job, storage: Storage) -> Job:
    """The job again, now that its folder is held: another run may have planned or committed meanwhile."""
    saved = manifest.read_plan(storage)
    committed = manifest.load_committed(storage, job.spec.fingerprint(), job.committed.values())
    if saved is not None and (job.is_new or len(saved[2]) != len(job.plan.shards) - len(job.new_shards)):
        return open_job(job.spec, storage)
    return replace(job, storage=storage, committed=committed)


def check_tokenizer(spec: JobSpec, planned_sha256: str | None) -> list[str]:
    """A warning where the tokenizer's files are not those that the job began with. Unknown is no change."""
    current = digest_tokenizer(spec)
    if None in (planned_sha256, current) or planned_sha256 == current:
        return []
    return [
        f"model.path: the tokenizer files of {spec.model.path} were changed since the job began; rows made from here on "
        "may differ from those that are there"
    ]


def freeze(job: Job) -> None:
    """Write down spec and plan: from here on they hold. Only the holder of the driver's lease may call it."""
    spec, storage = job.spec, job.storage
    if job.is_new:
        fields = {
            "fingerprint": spec.fingerprint(),
            "fingerprint_fields": spec.fingerprint_fields(),
            "spec": spec.model_dump(mode="json"),
            "is_unique_checked": job.is_unique_checked,
            "tokenizer_sha256": digest_tokenizer(spec),
        }
        storage.put(manifest.SPEC, seal_json(fields))
        manifest.write_plan_files(storage, job.plan.files, job.passthrough)
    if job.new_shards:
        manifest.write_plan_shards(storage, job.plan.files, job.new_shards)


def load_journal(job: Job, on_warning: Callable[[str], None]) -> JournalIndex:
    """What earlier runs journaled; segments whose shards are all committed are deleted here, and handoffs, which mean
    nothing to another run; what can't be deleted costs a few bytes. A damaged segment costs the work in it, for which
    nobody need be woken; raises OutputError for a file that somebody else put there."""
    index = JournalIndex()
    todo = {queued.shard.number for queued in job.todo}
    for number, committed in job.committed.items():
        if number in todo:
            index.settle(number, committed.footer.epoch)
        else:
            index.complete(number)
    segments = list_segments(job.storage)
    try:
        found = read_indexes(job.storage, segments, job.spec.fingerprint(), on_warning)
    except Foreign as error:
        raise OutputError(str(error)) from error
    free = [path for refs in found for path in index.add(refs)]
    try:
        job.storage.delete_many([*free, *list_handoffs(job.storage)])
    except StorageError as error:
        on_warning(f"journal segments were not deleted: {error}")
    return index


def render_first_prompt(job: Job) -> tuple[str, int | None]:
    """(text, tokens) of the first prompt, special tokens visible; tokens None where a server counts them."""
    return render_first(job.plan.shards, job.spec, create_tokenizer(job.spec))


def check_renders(job: Job) -> None:
    """Raises SpecError when the model can't render what the job asks for, before a worker finds that out. Only where the
    model can be looked at from here: its folder may be on the cluster's nodes alone. Bad rows are no reason: they become
    error rows."""
    path = job.spec.model.path
    if path == "embedded" or Path(path).is_dir():
        with suppress(InputError):
            render_first_prompt(job)


def limit_rows(spec: JobSpec, limit: int | None) -> JobSpec:
    """The spec of a trial: `--limit` wins where it is the smaller one."""
    if limit is None:
        return spec
    wanted = min(limit, spec.input.limit or limit)
    return spec.model_copy(update={"input": spec.input.model_copy(update={"limit": wanted})})
