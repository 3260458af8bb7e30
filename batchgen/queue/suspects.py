"""Which row kills engines? Rows that were in flight when one died are tried apart from all others until it is known.

Pure: a frozen value, and what follows from a fact. Suspects stand in groups. A group is tried by an engine that has
nothing else in flight: when all its rows end, they are cleared (and their generations kept); when the engine dies, it died
of one of them, and what was still in flight is halved. A row with which an engine died twice while it was alone is taken
for the culprit, and tried no more. Groups are tried in turn, halves after all that stand already: so an engine that works
shows it soon, and the cleared don't wait for the guilty.

For n suspects and one culprit that takes at most ceil(log2 n) + 1 further deaths, and as many for each further culprit:
a group of m rows costs one death and a half of it the next, m = n / 2 at first, and the last row costs two. Unless engines
die by chance as well (somebody kills them, a node is broken). Two culprits and a storm of kills look alike until all others
were tried: then either nobody is left who explains a death, and it was chance, or a second culprit is. So no verdict is
given before every other suspect is cleared or taken for a culprit himself (`settle`), which costs no death; and for each
death by chance of the last hour a culprit must have died twice more alone. What that can't tell apart: a job's only two
deaths, both of which somebody caused while the same row was alone.
Where it is not known what was in flight, all unfinished rows of the worker's shards are suspects, in groups of at most a
window; and when these are many, the first death is only remembered (`struck`), for it costs less than to try them all.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any

from batchgen.row_ranges import RowRanges, count_rows, subtract, take_first, unite

# So many more deaths with a row alone in flight for each death by chance, and how long that one is remembered.
CHANCE_DEATHS_ALONE = 2
CHANCE_MEMORY_S = 3600.0
# Unknown suspects of more windows than this are tried after a second death only. Four: then even so no more engines die
# than ceil(log2 n) + 1, because groups of a window are tried at once instead of halves.
MAX_UNKNOWN_WINDOWS = 4

ShardRows = tuple[int, RowRanges]


@dataclass(frozen=True, slots=True)
class Group:
    """Rows of one or more shards, by shard number, tried at once with nothing beside them. `num_alone`: engines that died
    with this one row alone in flight; `deaths`: all that died with these rows in flight, by number."""

    number: int
    rows: tuple[ShardRows, ...]
    num_alone: int = 0
    deaths: tuple[int, ...] = ()

    @property
    def num_rows(self) -> int:
        return count_suspects(self.rows)


@dataclass(frozen=True, slots=True)
class Suspects:
    """All of a job. `groups` in the order to be tried; `quarantined` rows end as errors; `struck`: shards that were lost
    once with too many rows to try; `deaths`: those that no culprit explains, with their Unix times."""

    groups: tuple[Group, ...] = ()
    quarantined: tuple[ShardRows, ...] = ()
    struck: frozenset[int] = frozenset()
    deaths: tuple[tuple[int, float], ...] = ()
    next_number: int = 1

    @property
    def shards(self) -> frozenset[int]:
        """Those that hold suspects."""
        return frozenset(number for group in self.groups for number, _ in group.rows)

    @property
    def num_quarantined(self) -> int:
        return count_suspects(self.quarantined)

    def get_quarantined(self, shard_number: int) -> RowRanges:
        return dict(self.quarantined).get(shard_number, ())


def count_suspects(rows: Iterable[ShardRows]) -> int:
    return sum(count_rows(ranges) for _, ranges in rows)


# ---- facts in --------------------------------------------------------------------------------------------------------


def accuse(state: Suspects, rows: Sequence[ShardRows], max_group: int, now: float) -> Suspects:
    """An engine died with these rows in flight and no others. Those that stand in a group are tried there, and may explain
    this death too."""
    new = _clean(rows, _list_known(state))
    state, deaths = _note_death(_implicate(state, rows), (), now)
    if count_suspects(rows) == 1:  # it was alone already
        return _add(state, [new], deaths, num_alone=1)
    return _add(state, _split(new, max(2, -(-count_suspects(new) // max_group))), deaths)


def accuse_unknown(state: Suspects, rows: Sequence[ShardRows], max_group: int, now: float) -> Suspects:
    """An engine died with some of these rows in flight, or one that is being prepared."""
    numbers = frozenset(number for number, _ in rows)
    num_rows = count_suspects(rows)
    if num_rows > MAX_UNKNOWN_WINDOWS * max_group and not numbers & state.struck:
        return replace(state, struck=state.struck | numbers)
    state = replace(state, struck=state.struck - numbers)
    if num_rows > 1:
        return accuse(state, rows, max_group, now)
    new = _clean(rows, _list_known(state))
    state, deaths = _note_death(_implicate(state, rows), (), now)
    return _add(state, [new], deaths)  # whether it was in flight at all is not known


def _implicate(state: Suspects, rows: Sequence[ShardRows]) -> Suspects:
    """The next death is one of those groups', too, that have some of these rows."""
    death = state.next_number
    groups = [replace(g, deaths=(*g.deaths, death)) if _meet(rows, g.rows) else g for g in state.groups]
    return replace(state, groups=tuple(groups))


def clear(state: Suspects, group_number: int) -> Suspects:
    """All rows of the group ended, and the engine lives."""
    return replace(state, groups=tuple(group for group in state.groups if group.number != group_number))


def blame(state: Suspects, group_number: int, inflight: Sequence[ShardRows], now: float) -> Suspects:
    """The engine died while it tried the group, with these of its rows in flight; the group's other rows are cleared."""
    group = next(group for group in state.groups if group.number == group_number)
    rows = _clean(inflight, ())
    num_rows = count_suspects(rows)
    state = clear(state, group_number)
    if num_rows == 0:
        return state
    state, deaths = _note_death(state, group.deaths, now)
    if num_rows > 1:
        return _add(state, _split(rows, 2), deaths)
    # A row that was in flight with others of its group until those ended died alone as well.
    return _add(state, [rows], deaths, 1 + (group.num_alone if group.num_rows == 1 else 0))


# ---- the verdict -----------------------------------------------------------------------------------------------------


def list_convicted(state: Suspects, now: float, max_alone: int) -> list[Group]:
    """Rows taken for culprits: `max_alone` engines died of each alone, and more where engines die by chance."""
    least = max_alone + CHANCE_DEATHS_ALONE * _count_chance(state, now)
    return [group for group in state.groups if group.num_rows == 1 and group.num_alone >= least]


def settle(state: Suspects, now: float, max_alone: int) -> Suspects:
    """The verdict, once there is nobody else to try; no change before."""
    convicted = list_convicted(state, now, max_alone)
    if not convicted or len(convicted) < len(state.groups):
        return state
    quarantined = dict(state.quarantined)
    for number, ranges in chain.from_iterable(group.rows for group in convicted):
        quarantined[number] = unite(quarantined.get(number, ()), ranges)
    explained = {death for group in convicted for death in group.deaths}
    return replace(
        state,
        groups=(),
        quarantined=tuple(sorted(quarantined.items())),
        deaths=tuple(death for death in state.deaths if death[0] not in explained),
    )


def _note_death(state: Suspects, earlier: tuple[int, ...], now: float) -> tuple[Suspects, tuple[int, ...]]:
    """(the state with one more, all deaths of the rows that were in flight)."""
    recent = tuple(death for death in state.deaths if now - death[1] < CHANCE_MEMORY_S)
    number = state.next_number
    return replace(state, deaths=(*recent, (number, now)), next_number=number + 1), (*earlier, number)


def _count_chance(state: Suspects, now: float) -> int:
    """Deaths of which nobody is suspected any more, and no culprit was found."""
    open_deaths = {number for group in state.groups for number in group.deaths}
    return sum(number not in open_deaths and now - at < CHANCE_MEMORY_S for number, at in state.deaths)


def keep_shards(state: Suspects, numbers: Iterable[int]) -> Suspects:
    """The same of these shards only: the others are committed."""
    kept = frozenset(numbers)
    groups = [replace(group, rows=tuple(rows for rows in group.rows if rows[0] in kept)) for group in state.groups]
    return replace(
        state,
        groups=tuple(group for group in groups if group.rows),
        quarantined=tuple(rows for rows in state.quarantined if rows[0] in kept),
        struck=state.struck & kept,
    )


def _list_known(state: Suspects) -> list[ShardRows]:
    """Rows that are quarantined or stand in a group, by shard."""
    known: dict[int, RowRanges] = {}
    for number, ranges in chain(state.quarantined, *(group.rows for group in state.groups)):
        known[number] = unite(known.get(number, ()), ranges)
    return list(known.items())


def _meet(rows: Iterable[ShardRows], others: Iterable[ShardRows]) -> bool:
    """Have they a row in common?"""
    theirs = dict(others)
    return any(subtract(ranges, theirs.get(number, ())) != tuple(ranges) for number, ranges in rows)


def _clean(rows: Sequence[ShardRows], left_out: Sequence[ShardRows]) -> list[ShardRows]:
    """By shard, without the empty."""
    out = dict(left_out)
    cleaned = [(number, subtract(ranges, out.get(number, ()))) for number, ranges in sorted(rows)]
    return [(number, ranges) for number, ranges in cleaned if ranges]


def _add(
    state: Suspects, parts: Sequence[Sequence[ShardRows]], deaths: tuple[int, ...], num_alone: int = 0
) -> Suspects:
    filled = [tuple(part) for part in parts if part]
    groups = [Group(state.next_number + place, part, num_alone, deaths) for place, part in enumerate(filled)]
    return replace(state, groups=(*state.groups, *groups), next_number=state.next_number + len(groups))


def _split(rows: Sequence[ShardRows], num_parts: int) -> list[list[ShardRows]]:
    """Parts of as nearly the same size as can be, none of them larger than the first."""
    left, num_left = list(rows), count_suspects(rows)
    parts = []
    for parts_left in range(num_parts, 0, -1):
        wanted = -(-num_left // parts_left)
        num_left -= wanted
        part: list[ShardRows] = []
        while wanted > 0:
            number, ranges = left.pop(0)
            first, rest = take_first(ranges, wanted)
            wanted -= count_rows(first)
            part.append((number, first))
            if rest:
                left.insert(0, (number, rest))
        parts.append(part)
    return parts


# ---- as an object of the store ---------------------------------------------------------------------------------------


def to_json(state: Suspects) -> dict[str, Any]:
    return {
        "groups": [asdict(group) for group in state.groups],
        "quarantined": list(state.quarantined),
        "struck": sorted(state.struck),
        "deaths": list(state.deaths),
        "next_number": state.next_number,
    }


def from_json(fields: Mapping[str, Any]) -> Suspects:
    """Raises KeyError, TypeError or ValueError for what is none."""
    return Suspects(
        groups=tuple(
            Group(int(g["number"]), _read_rows(g["rows"]), int(g["num_alone"]), tuple(int(d) for d in g["deaths"]))
            for g in fields["groups"]
        ),
        quarantined=_read_rows(fields["quarantined"]),
        struck=frozenset(int(number) for number in fields["struck"]),
        deaths=tuple((int(number), float(at)) for number, at in fields["deaths"]),
        next_number=int(fields["next_number"]),
    )


def _read_rows(rows: Iterable[Any]) -> tuple[ShardRows, ...]:
    read = tuple((int(number), tuple((int(a), int(b)) for a, b in ranges)) for number, ranges in rows)
    if any(a >= b for a, b in chain.from_iterable(ranges for _, ranges in read)):
        raise ValueError("a range of rows is empty")
    return read
