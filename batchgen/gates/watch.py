"""The canary while a run goes on: the shards of the first rows go first, and once they are committed their rows are judged.

What was committed in an earlier run counts like any other, so a run that is started again is judged by the same rows, and
with other limits by those; but where errors among them are tried again it is judged by what comes of that. Nothing waits
for the verdict: until then workers go on with later shards, and rows that must be read are read in a thread.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from batchgen.errors import GateFailed, OutputError, StorageError
from batchgen.gates.decide import Counts, Failed, judge_canary, judge_final, list_canary
from batchgen.gates.scan import make_scan
from batchgen.lengths import find_quantile, merge_lengths
from batchgen.manifest import CommittedShard
from batchgen.records import Shard
from batchgen.spec import JobSpec
from batchgen.storage import Storage

Committed = Mapping[int, CommittedShard]


class GateWatch:
    """Of one run. `again`: committed shards whose errors it tries again. `failed` and `seen` say what became of the gates
    so far."""

    def __init__(
        self,
        spec: JobSpec,
        storage: Storage,
        wanted: Sequence[Shard],
        say: Callable[[str], None],
        again: Collection[int] = (),
    ) -> None:
        self._spec, self._storage, self._say = spec, storage, say
        self._wanted, self._again = wanted, again
        self._canary = list_canary(spec, wanted)
        self._counting: Future[Counts] | None = None
        self._is_judged = spec.gates.canary is None
        self.failed: list[Failed] = []
        self.seen: dict[str, Counts] = {}

    def check(self, committed: Committed, earlier: Committed) -> None:
        """At every turn, with what this run and earlier ones committed. Raises GateFailed once the canary's rows are there
        and not as they should be, and StorageError and OutputError where they can't be read."""
        self._judge_canary(committed, earlier)
        if self.failed:
            raise GateFailed(tell(self.failed))

    def judge_end(self, committed: Committed, earlier: Committed, *, is_whole: bool) -> str | None:
        """When the run ends: the canary of one that was done before anybody looked, and the final gate where every row of
        the job is there. Says why where the rows can't be read: then nothing is known of them."""
        try:
            self._judge_canary(committed, earlier, must_wait=True)
            if is_whole and (gate := self._spec.gates.final) is not None:
                shards = [committed.get(shard.number) or earlier[shard.number] for shard in self._wanted]
                self.seen["final"] = make_scan(self._storage, shards, self._spec, gate).run()
                lengths = merge_lengths(batch.lengths for shard in shards for batch in shard.footer.batches)
                p50, p99 = find_quantile(lengths, 0.5), find_quantile(lengths, 0.99)
                self.failed += judge_final(gate, self.seen["final"], p50, p99)
        except (StorageError, OutputError) as error:
            return f"gates could not be looked at: {error}; run it again"
        return None

    def _judge_canary(self, committed: Committed, earlier: Committed, *, must_wait: bool = False) -> None:
        """Once, when all of its shards are there and counted."""
        if self._is_judged:
            return
        self._counting = self._counting or self._start_counting(committed, earlier)
        if self._counting is None or not (must_wait or self._counting.done()):
            return
        self._is_judged = True
        gate, counts = self._spec.gates.canary, self._counting.result()
        assert gate is not None
        self.seen["canary"], self.failed = counts, judge_canary(gate, counts)
        if not self.failed:
            self._say(f"canary passed: {counts.rows:,} rows, {counts.errors:,} errors, {counts.truncated:,} cut off")

    def _start_counting(self, committed: Committed, earlier: Committed) -> Future[Counts] | None:
        gate, shards = self._spec.gates.canary, []
        assert gate is not None
        for number in (shard.number for shard in self._canary):
            found = committed.get(number) or (None if number in self._again else earlier.get(number))
            if found is None:
                return None
            shards.append(found)
        scan = make_scan(self._storage, shards, self._spec, gate, gate.rows * self._spec.sampling.n)
        if scan.must_read:
            threads = ThreadPoolExecutor(1, thread_name_prefix="canary")
            counting = threads.submit(scan.run)
            threads.shutdown(wait=False)
            return counting
        counted: Future[Counts] = Future()
        counted.set_result(scan.run())
        return counted


def tell(failed: Sequence[Failed]) -> str:
    return f"{'; '.join(map(str, failed))}; mend the job, or change gates and run it again"
