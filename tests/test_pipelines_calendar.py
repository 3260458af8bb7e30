"""When pipelines are due: zones, daylight saving, and that a restart in between changes nothing."""

from datetime import UTC, datetime, timedelta
from itertools import islice, takewhile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchgen.pipelines.calendar import Calendar, make_calendar, make_key, parse_date, parse_key

SPRING = datetime(2027, 3, 27, 12, tzinfo=UTC)  # Berlin skips 02:00 to 03:00 on the 28th
AUTUMN = datetime(2027, 10, 30, 12, tzinfo=UTC)  # and has 02:00 to 03:00 twice on the 31st


def list_local(calendar: Calendar, after: datetime, count: int) -> list[str]:
    dates = islice(calendar.iterate_after(after), count)
    return [calendar.to_local(date).strftime("%d %H:%M %z") for date in dates]


def test_a_fixed_time_that_spring_skips_comes_right_after() -> None:
    berlin = make_calendar("30 2 * * *", "Europe/Berlin")
    assert list_local(berlin, SPRING, 2) == ["28 03:00 +0200", "29 02:30 +0200"]


def test_a_fixed_time_that_autumn_has_twice_comes_once() -> None:
    berlin = make_calendar("30 2 * * *", "Europe/Berlin")
    assert list_local(berlin, AUTUMN, 2) == ["31 02:30 +0200", "01 02:30 +0100"]


def test_hours_come_as_often_as_there_are() -> None:
    berlin = make_calendar("0 * * * *", "Europe/Berlin")
    spring = list_local(berlin, SPRING + timedelta(hours=12, minutes=30), 2)
    assert spring == ["28 03:00 +0200", "28 04:00 +0200"]
    autumn = list_local(berlin, AUTUMN + timedelta(hours=11, minutes=30), 4)
    assert autumn == ["31 02:00 +0200", "31 02:00 +0100", "31 03:00 +0100", "31 04:00 +0100"]


@pytest.mark.parametrize("cron", ["30 2 * * *", "0 * * * *", "*/20 * * * *", "15 */6 * * *", "0 2,3 * * *"])
@pytest.mark.parametrize("zone", ["Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "UTC"])
@settings(max_examples=20, deadline=None)
@given(start=st.datetimes(datetime(2026, 1, 1), datetime(2028, 1, 1), timezones=st.just(UTC)))
def test_going_on_from_each_date_is_going_on(cron: str, zone: str, start: datetime) -> None:
    """A scheduler asks for the one date after its cursor, over and over: none is left out, none comes twice."""
    calendar = make_calendar(cron, zone)
    whole = list(islice(calendar.iterate_after(start), 30))
    assert whole == sorted(set(whole))
    assert [calendar.find_next(date) for date in whole[:-1]] == whole[1:]
    assert all(calendar.has(date) for date in whole)
    assert calendar.find_latest(whole[3]) == whole[3]


@pytest.mark.parametrize("zone", ["Europe/Berlin", "America/New_York"])
@pytest.mark.parametrize("cron", ["30 2 * * *", "30 1 * * *", "0 * * * *"])
def test_restarts_over_a_year_with_both_changes(cron: str, zone: str) -> None:
    calendar, start = make_calendar(cron, zone), datetime(2027, 1, 1, tzinfo=UTC)
    count = 400 if cron != "0 * * * *" else 9000
    whole = list(islice(calendar.iterate_after(start), count))
    one_by_one = [start]
    for _ in range(count):
        found = calendar.find_next(one_by_one[-1])
        assert found is not None
        one_by_one.append(found)
    assert one_by_one[1:] == whole
    assert len({make_key(date) for date in whole}) == count


def test_keys_are_in_the_order_of_time_and_come_back() -> None:
    dates = list(islice(make_calendar("0 * * * *", "Europe/Berlin").iterate_after(AUTUMN), 48))
    keys = [make_key(date) for date in dates]
    assert keys == sorted(set(keys))
    assert [parse_key(key) for key in keys] == dates


@pytest.mark.parametrize(
    ("cron", "zone", "reason"),
    [
        ("0 2 * *", "UTC", "five fields"),
        ("0 25 * * *", "UTC", "no cron expression"),
        ("0 0 30 2 *", "UTC", "no cron expression"),
        ("* * * * * *", "UTC", "five fields"),
        ("0 2 * * *", "Europe/Berlyn", "no time zone"),
        ("0 2 * * *", "../etc/passwd", "no time zone"),
    ],
)
def test_what_is_no_schedule_is_refused(cron: str, zone: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        make_calendar(cron, zone)


def test_a_date_on_the_command_line() -> None:
    berlin = make_calendar("0 2 * * *", "Europe/Berlin")
    day = parse_date("2027-03-28", berlin)
    assert day == (datetime(2027, 3, 27, 23, tzinfo=UTC), datetime(2027, 3, 28, 22, tzinfo=UTC))
    assert parse_date("2027-03-28T0100Z", berlin)[0] == datetime(2027, 3, 28, 1, tzinfo=UTC)
    with pytest.raises(ValueError, match="is no date"):
        parse_date("28.3.2027", berlin)


@pytest.mark.parametrize(
    ("zone", "night"),
    [
        ("Europe/Berlin", "2026-10-25T00:00Z"),
        ("America/New_York", "2026-11-01T05:00Z"),
        ("Australia/Lord_Howe", "2026-04-04T14:00Z"),  # half an hour
        ("Antarctica/Troll", "2026-10-25T00:00Z"),  # two hours
    ],
)
@pytest.mark.parametrize("cron", ["30 2 * * *", "15 1,2,3 * * *", "*/20 * * * *", "0 0 * * *"])
def test_the_latest_date_is_the_last_one_also_in_the_hour_that_comes_twice(zone: str, night: str, cron: str) -> None:
    calendar, middle = make_calendar(cron, zone), datetime.fromisoformat(night)
    after = calendar.iterate_after(middle - timedelta(days=2))
    dates = list(takewhile(lambda date: date < middle + timedelta(days=2), after))
    for minutes in range(-300, 300, 7):
        instant = middle + timedelta(minutes=minutes)
        assert calendar.find_latest(instant) == max(date for date in dates if date <= instant)
        assert calendar.find_next(instant) == min(date for date in dates if date > instant)
