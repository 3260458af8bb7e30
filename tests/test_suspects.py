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
    ShardRows,
    Suspects,
    accuse,
    accuse_unknown,
    blame,
    clear,
    count_suspects,
    from_json,
    keep_shards,
    to_json,
)
from batchgen.row_ranges import count_rows, iter_rows, make_ranges, subtract, take_first, unite

Row = tuple[int, int]
WINDOW = 32


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
            group = self.state.groups[0]
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
    state = blame(accuse(Suspects(), [(1, ((5, 6),))], WINDOW, 0.0), 2, [(1, ((5, 6),))], 0.0)
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


def storm(num_rows: int, chance: float, num_kills: int, seed: int, max_alone: int = 2) -> Suspects:
    """Somebody kills engines that work, whatever they work on: so many, each trial with this chance."""
    dice = random.Random(seed)
    state, now = Suspects(), 0.0
    while num_kills > 0:
        if not state.groups:
            state, num_kills = accuse(state, [(1, ((0, dice.randint(1, num_rows)),))], WINDOW, now), num_kills - 1
            continue
        now += 1.0
        group = state.groups[0]
        if dice.random() < chance:
            state, num_kills = blame(state, group.number, group.rows, now, max_alone), num_kills - 1
        else:
            state = clear(state, group.number)
    return state


def test_a_storm_of_kills_condemns_hardly_anybody() -> None:
    """Twenty kills, so fast that every third trial is hit; of one row in flight at the first it is known soonest."""
    assert sum(storm(300, 0.3, 20, seed).num_quarantined for seed in range(300)) <= 3
    assert sum(storm(12, 0.1, 20, seed).num_quarantined for seed in range(300)) <= 6
    assert sum(storm(12, 0.3, 20, seed, max_alone=8).num_quarantined for seed in range(300)) == 0


def test_chance_deaths_are_forgotten_after_an_hour() -> None:
    state = accuse(Suspects(), [(1, ((0, 2),))], WINDOW, 0.0)
    for group in state.groups:
        state = clear(state, group.number)
    one = [(2, ((0, 1),))]
    soon, late = (accuse(state, one, WINDOW, now) for now in (10.0, 4000.0))
    assert blame(soon, soon.groups[0].number, one, 11.0).num_quarantined == 0
    assert blame(late, late.groups[0].number, one, 4001.0).num_quarantined == 1
