"""The canary while a run goes on: the shards of the first rows go first, and once they are committed their rows are judged.

What was committed in an earlier run counts like any other, so a run that is started again is judged by the same rows, and
with other limits by those. Nothing waits for the verdict: until then workers go on with later shards.
"""

from collections.abc import Callable, Mapping, Sequence

from batchgen.errors import GateFailed
from batchgen.gates.decide import Counts, Failed, judge_canary, judge_final, list_canary
from batchgen.gates.scan import scan
from batchgen.manifest import CommittedShard
from batchgen.records import Shard
from batchgen.spec import JobSpec
from batchgen.storage import Storage


class GateWatch:
    """Of one run. `failed` and `seen` say what became of the gates so far."""

    def __init__(self, spec: JobSpec, storage: Storage, wanted: Sequence[Shard], say: Callable[[str], None]) -> None:
        self._spec, self._storage, self._say = spec, storage, say
        self._wanted = wanted
        self._canary = list_canary(spec, wanted)
        self._is_judged = spec.gates.canary is None
        self.failed: list[Failed] = []
        self.seen: dict[str, Counts] = {}

    def check(self, committed: Mapping[int, CommittedShard], earlier: Mapping[int, CommittedShard]) -> None:
        """At every turn. Raises GateFailed once the canary's rows are there and not as they should be."""
        if not self._is_judged and all(s.number in committed or s.number in earlier for s in self._canary):
            self._judge_canary([committed.get(shard.number) or earlier[shard.number] for shard in self._canary])
            if self.failed:
                raise GateFailed(tell(self.failed))

    def judge_end(self, committed: Mapping[int, CommittedShard], *, is_whole: bool) -> None:
        """When the run ends: the canary of one that was done before anybody looked, and the final gate where every row of
        the job is there."""
        if not self._is_judged and all(shard.number in committed for shard in self._canary):
            self._judge_canary([committed[shard.number] for shard in self._canary])
        if is_whole and (gate := self._spec.gates.final) is not None:
            self.seen["final"] = scan(self._storage, [committed[s.number] for s in self._wanted], self._spec, gate)
            self.failed += judge_final(gate, self.seen["final"])

    def _judge_canary(self, shards: Sequence[CommittedShard]) -> None:
        self._is_judged, gate = True, self._spec.gates.canary
        assert gate is not None
        counts = scan(self._storage, shards, self._spec, gate, gate.rows * self._spec.sampling.n)
        self.seen["canary"], self.failed = counts, judge_canary(gate, counts)
        if not self.failed:
            self._say(f"canary passed: {counts.rows:,} rows, {counts.errors:,} errors, {counts.truncated:,} cut off")


def tell(failed: Sequence[Failed]) -> str:
    return f"{'; '.join(map(str, failed))}; mend the job, or change gates and run it again"
