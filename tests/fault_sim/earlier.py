"""An earlier output that worlds reuse, and prompts that stand in several rows: what of it a seed has, and what must hold.

The output is made once a process, by a world that nothing befalls, of two thirds of all prompts that a world may have.
"""

import functools
import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from batchgen.records import Request, RowId

from .checker import Violation, read_rows

EARLIER = "sim://earlier"
NUM_PROMPTS = 3
MAX_TOKENS = 40
# A prompt, and which of its samples.
Asked = tuple[str, int]


def draw(seed: int, what: str) -> float:
    """Apart, so that a seed meets what it met before there was this."""
    return random.Random(f"{seed}:{what}").random()


class Earlier:
    """Of one world. `files`: of the earlier output that it reuses, by their paths below its folder."""

    def __init__(self, seed: int) -> None:
        self.has_duplicates = draw(seed, "duplicates") < 0.2
        self.files = make_earlier_files() if draw(seed, "reuse") < 0.2 else {}
        self._known = find_answers(self.files)
        self._made: dict[Asked, set[str]] = {}
        self._sent: dict[Asked, set[RowId]] = {}
        self.num_reused = self.num_copied = self.num_sent_again = 0

    def make_input(self) -> dict[str, Any]:
        """Fields of the spec's section."""
        reused = {"reuse_from": [EARLIER]} if self.files else {}
        return reused | ({"duplicates": "copy"} if self.has_duplicates else {})

    def choose_prompt(self, name: str, row: int) -> str:
        return make_prompt(name, row % NUM_PROMPTS if self.has_duplicates else row)

    def check_sent(self, request: Request, engine: Any) -> None:
        """Nothing that is known is sent; what will come of it is noted, in however many parts it is asked for."""
        asked = self._find_asked(*request.row_id.slot, request.row_id.source_file)
        if asked in self._known:
            raise Violation(f"{request.row_id} was sent to an engine, and the earlier output has it")
        self._sent.setdefault(asked, set()).add(request.row_id)
        if request.partial is None:
            whole = replace(request, sampling=replace(request.sampling, max_tokens=MAX_TOKENS))
            answer = engine._answer(whole, queued_s=0.0, ttft_s=0.0)
            self._made.setdefault(asked, set()).add(answer.text)

    def check_end(self, rows: list[dict[str, Any]], *, is_calm: bool) -> None:
        """What was known stands there as the earlier output has it; all else is an answer to the same request. Nothing of
        ours is asked which that is: the prompt follows from the row's place. Where nothing befell the job one row was sent
        of those that ask the same, by whichever worker."""
        if self.has_duplicates:
            again = {asked: sorted(rows) for asked, rows in self._sent.items() if len(rows) > 1}
            self.num_sent_again = sum(len(rows) - 1 for rows in again.values())
            if is_calm and again:
                raise Violation(f"rows that ask the same were all sent: {again}")
        for row in (row for row in rows if row["status"] == "ok"):
            asked = self._find_asked(row["source_row"], row["sample_index"], row["source_file"])
            origin, is_known = row["reused_from"] or "", asked in self._known
            if is_known != origin.startswith(f"{EARLIER}/"):
                raise Violation(f"{row['custom_id']} is from {origin or 'here'}")
            if row["text"] not in (self._known if is_known else self._made)[asked]:
                raise Violation(f"{row['custom_id']} has another request's answer, from {origin or 'here'}")
            self.num_reused += is_known
            self.num_copied += bool(origin) and not is_known

    def _find_asked(self, row: int, sample_index: int, name: str) -> Asked:
        return self.choose_prompt(name, row), sample_index


def make_prompt(name: str, row: int) -> str:
    return f"{name} {row}?"


def find_answers(files: Mapping[str, bytes]) -> dict[Asked, set[str]]:
    found: dict[Asked, set[str]] = {}
    for row in (row for path, data in files.items() if path.startswith("data/") for row in read_rows(data)):
        if row["status"] == "ok":
            asked = make_prompt(row["source_file"], row["source_row"]), row["sample_index"]
            found.setdefault(asked, set()).add(row["text"])
    return found


@functools.cache
def make_earlier_files() -> dict[str, bytes]:
    from .first import FirstWorld
    from .world import OUT

    world = FirstWorld()
    outcome = world.run()
    assert outcome.violation is None, outcome.tell()
    found = ((name.removeprefix(f"{OUT}/"), held.data) for name, held in world.store.held.items())
    return {path: data for path, data in found if path.startswith(("data/", "_batchgen/spec.json"))}
