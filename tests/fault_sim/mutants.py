"""Ways to break the production code, one promise each: proof that a world would find it. Undone by `MonkeyPatch`."""

# ruff: noqa: ARG005

from collections.abc import Callable
from typing import Any

from . import patches  # isort: skip  # noqa: F401 - before anything of batchgen
import pyarrow.compute as pc
import pytest

from batchgen import journal, manifest
from batchgen.driver import fence, finish
from batchgen.driver import lease as driver_lease
from batchgen.queue import suspects
from batchgen.queue.work_queue import WorkQueue
from batchgen.storage import Storage
from batchgen.worker import shard_files
from batchgen.worker.open_shard import OpenShard
from batchgen.worker.shard_files import ShardFiles


def commit_overwrites(patch: pytest.MonkeyPatch) -> None:
    """A second attempt's file replaces the first one's."""
    create = Storage.create

    def overwrite(self: Any, path: str, data: Any) -> str:
        return str(self.put(path, data) if path.startswith("data/") else create(self, path, data))

    patch.setattr(Storage, "create", overwrite)


def replace_overwrites(patch: pytest.MonkeyPatch) -> None:
    """Error rows are replaced in whatever file is there by now."""
    patch.setattr(Storage, "replace", lambda self, path, data, version: self.put(path, data))


def retry_touches_generations(patch: pytest.MonkeyPatch) -> None:
    """A later run makes all rows of a file with errors anew."""
    patch.setattr(shard_files, "find_again", lambda rows, errors: pc.is_valid(rows["status"]))


def lost_leases_are_forgotten(patch: pytest.MonkeyPatch) -> None:
    """A shard that was lent once reaches no worker again."""
    lease_next = WorkQueue.lease_next

    def forget(self: Any, now: float) -> Any:
        lease = lease_next(self, now)
        return None if lease is None or lease.attempt > 1 else lease

    patch.setattr(WorkQueue, "lease_next", forget)


def last_words_are_not_fenced(patch: pytest.MonkeyPatch) -> None:
    """A driver that was frozen overwrites the manifest of its successor."""
    patch.setattr(fence.Fence, "put", lambda self, path, data: self._storage.put(path, data))


def commit_lies(patch: pytest.MonkeyPatch) -> None:
    """A shard counts as committed though the store refused it."""
    publish = ShardFiles._publish

    def lie(self: Any, lease: Any, data: Any, footer: Any) -> Any:
        try:
            return publish(self, lease, data, footer)
        except Exception:  # noqa: BLE001 - that is the mutation
            return shard_files.CommittedShard(
                shard_files.FileInfo(lease.shard.data_path, data.size, "x"), footer, shard_files.digest_footer(data)
            )

    patch.setattr(ShardFiles, "_publish", lie)


def success_is_early(patch: pytest.MonkeyPatch) -> None:
    """`_SUCCESS` without a look at what is there."""
    seal = finish.seal_json
    patch.setattr(
        finish,
        "mark_success",
        lambda job, put, report, epoch, is_trial: put(manifest.SUCCESS, seal({"epoch": epoch, "made_at": 0.0})),
    )


def epochs_are_shared(patch: pytest.MonkeyPatch) -> None:
    """Who loses the race for an epoch believes that it won."""
    create = driver_lease._create
    patch.setattr(driver_lease, "_create", lambda storage, holder: create(storage, holder) or True)


def stats_forget_the_lost(patch: pytest.MonkeyPatch) -> None:
    """Batches of which only journaled rows are left have no line in batch_stats."""
    patch.setattr(ShardFiles, "_list_earlier", lambda self, lease, recovered: [])


def journal_is_read_twice(patch: pytest.MonkeyPatch) -> None:
    """Rows of two segments are both taken, whoever finished them first."""
    patch.setattr(journal, "drop_repeated", lambda rows: rows)
    mark = OpenShard._mark
    patch.setattr(OpenShard, "_mark", lambda self, row, sample: mark(self, row, sample) or True)


def answers_change_after_a_retry(patch: pytest.MonkeyPatch) -> None:
    """A lost reply of a commit is taken for another's, and the shard is put there once more."""
    publish = ShardFiles._publish

    def again(self: Any, lease: Any, data: Any, footer: Any) -> Any:
        standing = publish(self, lease, data, footer)
        if standing.footer.batch_id != lease.batch_id:
            self._storage.put(lease.shard.data_path, memoryview(data))
        return standing

    patch.setattr(ShardFiles, "_publish", again)


def culprits_are_cleared(patch: pytest.MonkeyPatch) -> None:
    """A row with which an engine died alone counts as tried."""
    blame = suspects.blame

    def forgive(state: Any, group_number: int, inflight: Any, now: float) -> Any:
        is_alone = suspects.count_suspects(inflight) == 1
        return suspects.clear(state, group_number) if is_alone else blame(state, group_number, inflight, now)

    patch.setattr(suspects, "blame", forgive)


# By the step whose cells of the matrix find it; None: a seed does.
MUTANTS: dict[Callable[[pytest.MonkeyPatch], None], str | None] = {
    commit_overwrites: "create",
    replace_overwrites: "create",
    retry_touches_generations: "create",
    lost_leases_are_forgotten: "create",
    commit_lies: None,
    last_words_are_not_fenced: "manifest",
    success_is_early: None,
    epochs_are_shared: None,
    stats_forget_the_lost: "journal",
    journal_is_read_twice: None,
    answers_change_after_a_retry: "create",
    culprits_are_cleared: None,
}
