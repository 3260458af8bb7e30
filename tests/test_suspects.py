"""The culprit is found with few deaths, and nobody else is blamed: any in-flight set, any culprits, by simulated deaths."""

import json
import math
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchgen.queue.suspects import (
    MAX_UNKNOWN_WINDOWS,
    Group,
    ShardRows,
    Suspects,
    accuse,
    accuse_unknown,
    blame,
    clear,
    count_suspects,
    from_json,
    keep_shards,
    list_convicted,
    settle,
    to_json,
)
from batchgen.row_ranges import count_rows, iter_rows, make_ranges, subtract, take_first, unite

Row = tuple[int, int]
WINDOW = 32
MAX_ALONE = 2


def make_rows(rows: set[Row]) -> list[ShardRows]:
    numbers = sorted({number for number, _ in rows})
    return [(number, make_ranges(row for shard, row in rows if shard == number)) for number in numbers]


def list_rows(rows: tuple[ShardRows, ...] | list[ShardRows]) -> set[Row]:
    return {(number, row) for number, ranges in rows for row in iter_rows(ranges)}


@dataclass
class Trial:
    """Tries groups until there are none. `chance`: of which of a group's rows were in flight when the engine died."""

    state: Suspects
    culprits: set[Row]
    data: st.DataObject | None = None
    num_deaths: int = 0
    finished: set[Row] = field(default_factory=set)
    longest_run: int = 0

    def run(self) -> "Trial":
        in_a_row = 0
        while self.state.groups:
            self.state = from_json(json.loads(json.dumps(to_json(self.state))))
            convicted = list_convicted(self.state, 0.0, MAX_ALONE)
            if (group := next((group for group in self.state.groups if group not in convicted), None)) is None:
                self.state = settle(self.state, 0.0, MAX_ALONE)
                continue
            rows = list_rows(group.rows)
            if not rows & self.culprits:
                self.finished |= rows
                self.state, in_a_row = clear(self.state, group.number), 0
                continue
            self.num_deaths, in_a_row = self.num_deaths + 1, in_a_row + 1
            self.longest_run = max(self.longest_run, in_a_row)
            self.state = blame(self.state, group.number, make_rows(self._choose_inflight(rows)), 0.0)
        return self

    def _choose_inflight(self, rows: set[Row]) -> set[Row]:
        """All of it; or, drawn, some rows had ended before, a culprit among the rest. Others' turn comes later."""
        if self.data is None:
            return rows
        ended = (
            self.data.draw(st.sets(st.sampled_from(sorted(rows - self.culprits)))) if rows - self.culprits else set()
        )
        self.finished |= ended
        return rows - ended


def find_bound(num_suspects: int) -> int:
    return math.ceil(math.log2(num_suspects)) + 1


@given(st.integers(1, 600), st.integers(1, 3), st.data())
@settings(max_examples=60, deadline=None)
def test_one_culprit_is_found_within_the_bound(num_rows: int, num_shards: int, data: st.DataObject) -> None:
    rows = {(number % num_shards, 3 * number) for number in range(num_rows)}
    culprit = data.draw(st.sampled_from(sorted(rows)))
    max_group = data.draw(st.sampled_from([WINDOW, num_rows]))
    trial = Trial(
        accuse(Suspects(), make_rows(rows), max_group, 0.0), {culprit}, data if num_rows < 100 else None
    ).run()
    assert list_rows(trial.state.quarantined) == {culprit}
    assert trial.finished == rows - {culprit}, "everybody else ends well"
    assert trial.num_deaths <= find_bound(num_rows)


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 31, 32, 33, 100])
def test_the_bound_for_every_place_of_the_culprit(num_rows: int) -> None:
    rows = {(7, row) for row in range(num_rows)}
    worst = 0
    for culprit in rows:
        trial = Trial(accuse(Suspects(), make_rows(rows), WINDOW, 0.0), {culprit}).run()
        assert list_rows(trial.state.quarantined) == {culprit}
        worst = max(worst, trial.num_deaths)
        assert trial.longest_run <= 2, "an engine that works shows it: the other half is tried before the guilty one's"
    assert worst <= find_bound(num_rows)
    assert num_rows > WINDOW or worst == find_bound(num_rows), "the bound is no more than what it takes"


@given(st.integers(2, 150), st.data())
@settings(max_examples=40, deadline=None)
def test_several_culprits_at_once(num_rows: int, data: st.DataObject) -> None:
    rows = {(number // 40, number) for number in range(num_rows)}
    culprits = data.draw(st.sets(st.sampled_from(sorted(rows)), min_size=2, max_size=6))
    trial = Trial(accuse(Suspects(), make_rows(rows), WINDOW, 0.0), culprits, data).run()
    assert list_rows(trial.state.quarantined) == culprits
    assert trial.finished == rows - culprits
    assert trial.num_deaths <= len(culprits) * find_bound(num_rows)


@given(st.integers(1, 1500), st.data())
@settings(max_examples=40, deadline=None)
def test_unknown_suspects_within_the_bound(num_rows: int, data: st.DataObject) -> None:
    """What was in flight is not known: all rows that the worker had not ended are suspects, many of them at the second
    death only. Meanwhile rows end, or not."""
    rows = {(number % 2, number) for number in range(num_rows)}
    culprit = data.draw(st.sampled_from(sorted(rows)))
    state, num_more = accuse_unknown(Suspects(), make_rows(rows), WINDOW, 0.0), 0
    if not state.groups:
        assert num_rows > MAX_UNKNOWN_WINDOWS * WINDOW
        state, num_more = accuse_unknown(state, make_rows(rows), WINDOW, 0.0), 1
    assert all(group.num_rows <= max(WINDOW, num_rows // 2 + 1) for group in state.groups)
    trial = Trial(state, {culprit}).run()
    assert list_rows(trial.state.quarantined) == {culprit}
    assert trial.state.struck == frozenset()
    # One row that may not have been in flight at all is no proof yet: it must die alone twice.
    assert trial.num_deaths + num_more <= max(2, find_bound(num_rows))


def test_an_innocent_is_cleared_and_a_chance_death_condemns_nobody() -> None:
    state = accuse(Suspects(), [(1, ((0, 8),))], WINDOW, 0.0)
    chance = state.groups[0].number
    state = blame(state, chance, state.groups[0].rows, 0.0)  # a cable
    while state.groups:
        state = clear(state, state.groups[0].number)
    assert state.quarantined == ()


def test_a_death_while_nothing_was_in_flight_blames_nobody() -> None:
    state = accuse(Suspects(), [(1, ((0, 4),))], WINDOW, 0.0)
    assert [group.rows for group in state.groups] == [((1, ((0, 2),)),), ((1, ((2, 4),)),)]
    assert [group.number for group in blame(state, state.groups[0].number, [], 0.0).groups] == [3]
    assert accuse(state, [], WINDOW, 0.0).groups == state.groups


def test_quarantined_rows_are_never_suspects_again() -> None:
    state = settle(blame(accuse(Suspects(), [(1, ((5, 6),))], WINDOW, 0.0), 2, [(1, ((5, 6),))], 0.0), 0.0, MAX_ALONE)
    assert state.quarantined == ((1, ((5, 6),)),)
    again = accuse(state, [(1, ((4, 7),))], WINDOW, 0.0)
    assert count_suspects([rows for group in again.groups for rows in group.rows]) == 2
    assert again.get_quarantined(1) == ((5, 6),)
    assert again.get_quarantined(2) == ()


def test_committed_shards_are_forgotten() -> None:
    state = accuse(Suspects(struck=frozenset({1, 3})), [(1, ((0, 2),)), (2, ((0, 2),))], WINDOW, 0.0)
    kept = keep_shards(state, [2])
    assert kept.shards == {2}
    assert kept.struck == frozenset()
    assert keep_shards(state, []).groups == ()


@given(st.sets(st.integers(0, 60)), st.sets(st.integers(0, 60)), st.integers(0, 70))
def test_ranges_are_sets(one: set[int], other: set[int], num_rows: int) -> None:
    a, b = make_ranges(one), make_ranges(other)
    assert list(iter_rows(a)) == sorted(one)
    assert count_rows(a) == len(one)
    assert set(iter_rows(subtract(a, b))) == one - other
    assert unite(a, b) == make_ranges(one | other)
    assert subtract(a, b) == make_ranges(one - other)
    first, rest = take_first(a, num_rows)
    assert [*iter_rows(first), *iter_rows(rest)] == sorted(one)
    assert count_rows(first) == min(num_rows, len(one))


@dataclass
class Storm:
    """Engines that work are killed, whatever they work on. `num_workers` of them try suspects where there are any and
    else take new rows, up to `max_rows` at once; each is killed at the end of a turn of a second with this chance,
    `num_kills` times in all. `poison`: rows of which each engine dies as well."""

    seed: int
    max_rows: int
    chance: float
    num_kills: int
    num_workers: int = 4
    max_alone: int = MAX_ALONE
    poison: frozenset[int] = frozenset()
    num_poison_deaths: int = 0
    state: Suspects = field(default_factory=Suspects)
    next_row: int = 0

    def run(self) -> Suspects:
        dice, now = random.Random(self.seed), 0.0
        while self.num_kills > 0 or self.state.groups or self.next_row <= max(self.poison, default=0):
            now += 1.0
            self.state = settle(self.state, now, self.max_alone)
            convicted = list_convicted(self.state, now, self.max_alone)
            tried = [group for group in self.state.groups if group not in convicted][: self.num_workers]
            for group in tried:
                self._end(dice, now, list_rows(group.rows), group)
            for _ in range(self.num_workers - len(tried)):
                first, self.next_row = self.next_row, self.next_row + dice.randint(1, self.max_rows)
                self._end(dice, now, {(1, row) for row in range(first, self.next_row)}, None)
        return self.state

    def _end(self, dice: random.Random, now: float, rows: set[Row], group: Group | None) -> None:
        is_poisoned = any(row in self.poison for _, row in rows)
        is_killed = not is_poisoned and self.num_kills > 0 and dice.random() < self.chance
        self.num_kills -= is_killed
        self.num_poison_deaths += is_poisoned
        if group is None and (is_killed or is_poisoned):
            self.state = accuse(self.state, make_rows(rows), WINDOW, now)
        elif group is not None and (is_killed or is_poisoned):
            self.state = blame(self.state, group.number, make_rows(rows), now)
        elif group is not None:
            self.state = clear(self.state, group.number)


def count_condemned(max_rows: int, chance: float, num_storms: int = 100, **others: int) -> int:
    return sum(Storm(seed, max_rows, chance, 20, **others).run().num_quarantined for seed in range(num_storms))


def test_a_storm_of_kills_condemns_hardly_anybody() -> None:
    """Twenty kills among four engines, each of which dies every other turn. Before there was a verdict to wait for, such
    storms condemned a row in every eighth of them; in nearly each where an engine has one or two rows at once."""
    assert count_condemned(32, 0.5) == 0
    assert count_condemned(12, 0.3) <= 2
    assert count_condemned(2, 0.5) <= 15, "an engine with one or two rows leaves little to tell them apart by"
    assert count_condemned(2, 0.5, max_alone=8) == 0


@pytest.mark.parametrize("poison", [{50}, {50, 51, 150}, {50, 150, 250, 350}])
def test_culprits_are_found_among_others_and_in_a_storm(poison: set[int]) -> None:
    """In peace within the bound; in a storm at more deaths, for each of them counts against the proof."""
    for seed in range(20):
        in_peace, in_storm = (Storm(seed, 32, 0.1, num_kills, poison=frozenset(poison)) for num_kills in (0, 10))
        for storm in (in_peace, in_storm):
            assert list_rows(storm.run().quarantined) == {(1, row) for row in poison}
        assert in_peace.num_poison_deaths <= len(poison) * (1 + find_bound(32))


def test_no_verdict_while_another_death_is_not_explained() -> None:
    """Row 1 died alone twice; row 9 was in flight where another engine died, and may be a second culprit or show that
    engines die by chance."""
    guilty, other = [(1, ((1, 2),))], [(1, ((9, 10),))]
    state = accuse(accuse(Suspects(), guilty, WINDOW, 0.0), other, WINDOW, 1.0)
    first, second = state.groups
    state = blame(state, first.number, guilty, 2.0)
    assert [group.rows for group in list_convicted(state, 2.0, MAX_ALONE)] == [((1, ((1, 2),)),)]
    assert settle(state, 2.0, MAX_ALONE) == state
    by_chance = clear(state, second.number)
    assert list_convicted(by_chance, 3.0, MAX_ALONE) == []
    assert settle(by_chance, 3.0, MAX_ALONE).num_quarantined == 0, "row 1 is tried again"
    both = settle(blame(state, second.number, other, 3.0), 3.0, MAX_ALONE)
    assert (both.num_quarantined, both.groups, both.deaths) == (2, (), ())


def test_chance_deaths_are_forgotten_after_an_hour() -> None:
    state = accuse(Suspects(), [(1, ((0, 2),))], WINDOW, 0.0)
    for group in state.groups:
        state = clear(state, group.number)
    one = [(2, ((0, 1),))]
    soon, late = (accuse(state, one, WINDOW, now) for now in (10.0, 4000.0))
    soon = blame(soon, soon.groups[0].number, one, 11.0)
    assert settle(soon, 11.0, MAX_ALONE) == soon
    assert settle(soon, 4000.0, MAX_ALONE).num_quarantined == 1, (
        "when the chance death is forgotten, the verdict is due"
    )
    late = blame(late, late.groups[0].number, one, 4001.0)
    assert settle(late, 4001.0, MAX_ALONE).num_quarantined == 1


def test_a_death_with_a_suspect_in_flight_is_not_by_chance() -> None:
    """It was in flight beside its trial, as a row that another worker had of the shard may be: it may explain that death as
    well, and who was in flight with it was not alone."""
    suspect, beside = [(1, ((1, 2),))], [(1, ((1, 3),))]
    state = accuse(Suspects(), suspect, WINDOW, 0.0)
    again = accuse(state, beside, WINDOW, 1.0)
    old, new = again.groups
    assert (old.rows, old.num_alone, old.deaths) == (((1, ((1, 2),)),), 1, (1, 3))
    assert (new.rows, new.num_alone, new.deaths) == (((1, ((2, 3),)),), 0, (3,))
    state = clear(again, new.number)
    state = settle(blame(state, old.number, suspect, 2.0), 2.0, MAX_ALONE)
    assert (list_rows(state.quarantined), state.deaths) == ({(1, 1)}, ()), "no death is left that nobody explains"
