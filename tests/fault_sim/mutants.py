"""Ways to break the production code, one promise each: proof that a world would find it. Applied to a whole process."""

from collections.abc import Callable
from typing import Any

from . import patches  # isort: skip  # noqa: F401 - before anything of batchgen
import pyarrow.compute as pc

from batchgen import driver_lease, finish, journal, manifest, shard_files
from batchgen.errors import AlreadyExists
from batchgen.open_shard import OpenShard
from batchgen.shard_files import ShardFiles
from batchgen.storage import Storage
from batchgen.work_queue import WorkQueue


def _set(owner: Any, name: str, value: Any) -> None:
    setattr(owner, name, value)


def commit_overwrites() -> None:
    """A second attempt's file replaces the first one's."""
    create = Storage.create
    _set(Storage, "create", lambda self, path, data: (self.put if path.startswith("data/") else create.__get__(self))(path, data))


def replace_overwrites() -> None:
    """Error rows are replaced in whatever file is there by now."""
    _set(Storage, "replace", lambda self, path, data, version: self.put(path, data))


def retry_touches_generations() -> None:
    """A later run makes all rows of a file with errors anew."""
    _set(shard_files, "find_again", lambda rows, errors: pc.is_valid(rows["status"]))


def lost_leases_are_forgotten() -> None:
    """A dead worker's shards are never lent again."""
    _set(WorkQueue, "_wait", lambda self, number: None)


def commit_lies() -> None:
    """A shard counts as committed though the store refused it."""
    publish = ShardFiles._publish

    def lie(self: Any, lease: Any, data: Any, footer: Any) -> Any:
        try:
            return publish(self, lease, data, footer)
        except Exception:  # noqa: BLE001 - that is the mutation
            return shard_files.CommittedShard(
                shard_files.FileInfo(lease.shard.data_path, data.size, "x"), footer, shard_files.digest_footer(data)
            )

    _set(ShardFiles, "_publish", lie)


def success_is_early() -> None:
    """`_SUCCESS` without a look at what is there."""
    seal = finish.seal_json
    _set(
        finish,
        "mark_success",
        lambda job, report, epoch, is_trial: job.storage.put(manifest.SUCCESS, seal({"epoch": epoch, "made_at": 0.0})),
    )


def epochs_are_shared() -> None:
    """Who loses the race for an epoch believes that it won."""
    create = driver_lease._create
    _set(driver_lease, "_create", lambda storage, holder: create(storage, holder) or True)


def stats_forget_the_lost() -> None:
    """Batches of which only journaled rows are left have no line in batch_stats."""
    _set(ShardFiles, "_list_earlier", lambda self, lease, recovered: [])


def journal_is_read_twice() -> None:
    """Rows of two segments are both taken, whoever finished them first."""
    _set(journal, "drop_repeated", lambda rows: rows)
    mark = OpenShard._mark
    _set(OpenShard, "_mark", lambda self, row, sample: mark(self, row, sample) or True)


def answers_change_after_a_retry() -> None:
    """A lost reply of a commit is taken for another's, and the shard is put there once more."""
    publish = ShardFiles._publish

    def again(self: Any, lease: Any, data: Any, footer: Any) -> Any:
        standing = publish(self, lease, data, footer)
        if standing.footer.batch_id != lease.batch_id:
            self._storage.put(lease.shard.data_path, memoryview(data))
        return standing

    _set(ShardFiles, "_publish", again)


MUTANTS: dict[str, Callable[[], None]] = {
    work.__name__: work
    for work in (
        commit_overwrites,
        replace_overwrites,
        retry_touches_generations,
        lost_leases_are_forgotten,
        commit_lies,
        success_is_early,
        epochs_are_shared,
        stats_forget_the_lost,
        journal_is_read_twice,
        answers_change_after_a_retry,
    )
}
__all__ = ["MUTANTS", "AlreadyExists"]
