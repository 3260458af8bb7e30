"""Ways to break reuse and duplicates, as `mutants` has them of other promises. Only worlds that reuse can find them."""

from collections.abc import Callable
from typing import Any

from . import patches  # isort: skip  # noqa: F401 - before anything of batchgen
import pytest

from batchgen.queue.claims import Claims
from batchgen.reuse.carrier import Carrier
from batchgen.reuse.fingerprint import Fingerprinter
from batchgen.reuse.lookout import Lookout
from batchgen.reuse.outputs import EarlierOutputs
from batchgen.worker.open_shard import OpenShard


def known_rows_are_sent(patch: pytest.MonkeyPatch) -> None:
    """Of what an earlier output has, the last row of a stretch is sent all the same."""
    take = Carrier.take

    def forget(self: Any, lease: Any, prepared: Any) -> Any:
        rows, left = take(self, lease, prepared)
        return (rows.slice(0, rows.num_rows - 1), [*left, prepared[-1]]) if rows.num_rows > 1 else (rows, left)

    patch.setattr(Carrier, "take", forget)


def other_rows_are_taken(patch: pytest.MonkeyPatch) -> None:
    """The earlier output's rows come in another order than they were asked for."""
    take = EarlierOutputs.take

    def turn(self: Any, fingerprints: Any) -> Any:
        numbers, rows = take(self, fingerprints)
        return numbers[::-1], rows

    patch.setattr(EarlierOutputs, "take", turn)


def fingerprints_forget_the_prompt(patch: pytest.MonkeyPatch) -> None:
    """All prompts of one length are the same."""
    make = Fingerprinter.make

    def blur(self: Any, token_ids: Any, *rest: Any) -> Any:
        return make(self, (1,) * len(token_ids), *rest)

    patch.setattr(Fingerprinter, "make", blur)


def carried_rows_are_not_kept(patch: pytest.MonkeyPatch) -> None:
    """What was taken over counts as finished, and is in no journal and no file."""
    carry = OpenShard.carry

    def drop(self: Any, rows: Any) -> None:
        parts = self._parts
        carry(self, rows)
        self._parts = parts

    patch.setattr(OpenShard, "carry", drop)


def each_worker_sends_its_own(patch: pytest.MonkeyPatch) -> None:
    """Whoever asks is sent."""

    def choose(self: Any, key: int, place: int, told: int) -> int:
        del self, key, told
        return place

    patch.setattr(Claims, "_choose_owner", choose)


def answers_of_others_are_anybodys(patch: pytest.MonkeyPatch) -> None:
    """The journal gives a row's neighbour's answer, and nobody compares."""
    settle = Lookout._settle

    def mix(self: Any, source: Any, found: Any) -> None:
        for place, answer in found.items():
            if (alike := source.places.get(place)) is not None and answer is not None:
                other = next(iter(source.places.values()))
                self._give(other if len(source.places) > 1 else alike, answer)
        settle(self, source, {})

    patch.setattr(Lookout, "_settle", mix)


REUSE_MUTANTS: list[Callable[[pytest.MonkeyPatch], None]] = [
    known_rows_are_sent,
    other_rows_are_taken,
    fingerprints_forget_the_prompt,
    carried_rows_are_not_kept,
    each_worker_sends_its_own,
    answers_of_others_are_anybodys,
]
