"""The canary while a run goes on: the shards of the first rows go first, and once they are committed their rows are judged.

What was committed in an earlier run counts like any other, so a run that is started again is judged by the same rows, and
with other limits by those; but where errors among them are tried again it is judged by what comes of that. Nothing waits
for the verdict: until then workers go on with later shards.
"""

from collections.abc import Callable, Collection, Mapping, Sequence

from batchgen.errors import GateFailed
from batchgen.gates.decide import Counts, Failed, judge_canary, judge_final, list_canary
from batchgen.gates.scan import scan
from batchgen.manifest import CommittedShard
from batchgen.records import Shard
from batchgen.spec import JobSpec
from batchgen.storage import Storage


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
        self._is_judged = False
        self.failed: list[Failed] = []
        self.seen: dict[str, Counts] = {}

    def check(self, committed: Mapping[int, CommittedShard], earlier: Mapping[int, CommittedShard]) -> None:
        """At every turn, with what this run and earlier ones committed. Raises GateFailed once the canary's rows are there
        and not as they should be."""
        self._judge_canary(committed, earlier)
        if self.failed:
            raise GateFailed(tell(self.failed))

    def judge_end(
        self, committed: Mapping[int, CommittedShard], earlier: Mapping[int, CommittedShard], *, is_whole: bool
    ) -> None:
        """When the run ends: the canary of one that was done before anybody looked, and the final gate where every row of
        the job is there."""
        self._judge_canary(committed, earlier)
        if is_whole and (gate := self._spec.gates.final) is not None:
            shards = [committed.get(shard.number) or earlier[shard.number] for shard in self._wanted]
            self.seen["final"] = scan(self._storage, shards, self._spec, gate)
            self.failed += judge_final(gate, self.seen["final"])

    def _judge_canary(self, committed: Mapping[int, CommittedShard], earlier: Mapping[int, CommittedShard]) -> None:
        """Once, when all of its shards are there."""
        gate = self._spec.gates.canary
        if gate is None or self._is_judged:
            return
        shards = []
        for number in (shard.number for shard in self._canary):
            found = committed.get(number) or (None if number in self._again else earlier.get(number))
            if found is None:
                return
            shards.append(found)
        self._is_judged = True
        counts = scan(self._storage, shards, self._spec, gate, gate.rows * self._spec.sampling.n)
        self.seen["canary"], self.failed = counts, judge_canary(gate, counts)
        if not self.failed:
            self._say(f"canary passed: {counts.rows:,} rows, {counts.errors:,} errors, {counts.truncated:,} cut off")


def tell(failed: Sequence[Failed]) -> str:
    return f"{'; '.join(map(str, failed))}; mend the job, or change gates and run it again"
