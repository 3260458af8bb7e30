"""When a pipeline is due: a cron expression in a time zone. Pure: instants in, instants out, all in UTC.

Daylight saving as Debian's cron has it (cronsim): a fixed time that a spring night skips comes as soon as the skipped hour
is over, a fixed time that an autumn night has twice comes once, and what comes every hour or every few minutes comes in
each hour that there really is. Exactly five fields: an instant is a whole minute, which is what makes a run's key short.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError

KEY_FORMAT = "%Y-%m-%dT%H%MZ"
NICKNAMES = {"@hourly": "0 * * * *", "@daily": "0 0 * * *", "@weekly": "0 0 * * 0", "@monthly": "0 0 1 * *"}


@dataclass(frozen=True, slots=True)
class Calendar:
    """Which instants are logical dates. Make one with `make_calendar`."""

    cron: str
    timezone: str

    def iterate_after(self, instant: datetime) -> Iterator[datetime]:
        """Logical dates later than an instant, in order, in UTC. Ends where none comes for fifty years."""
        local = instant.astimezone(ZoneInfo(self.timezone))
        # cronsim starts from wall clock time: in the hour that comes twice, the second time looks like the first.
        found = (next_date.astimezone(UTC) for next_date in CronSim(self.cron, local))
        return (next_date for next_date in found if next_date > instant)

    def find_next(self, instant: datetime) -> datetime | None:
        return next(self.iterate_after(instant), None)

    def find_latest(self, instant: datetime) -> datetime | None:
        """The last logical date at or before an instant."""
        # From after any hour that may come twice: backwards, cronsim would start in its first time, whichever it is.
        local = (instant + timedelta(hours=3)).astimezone(ZoneInfo(self.timezone))
        found = (date.astimezone(UTC) for date in CronSim(self.cron, local, reverse=True))
        return next((date for date in found if date <= instant), None)

    def has(self, instant: datetime) -> bool:
        return self.find_next(instant - timedelta(minutes=1)) == instant

    def to_local(self, instant: datetime) -> datetime:
        return instant.astimezone(ZoneInfo(self.timezone))


def check_timezone(name: str) -> str:
    """Raises ValueError for a zone that the machine's time zone database doesn't know."""
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(f"'{name}' is no time zone; write one of the IANA database, such as Europe/Berlin") from None
    return name


def check_cron(text: str) -> str:
    """Five fields, or @hourly, @daily, @weekly, @monthly. Raises ValueError."""
    cron = NICKNAMES.get(text.strip(), text.strip())
    if len(cron.split()) != 5:
        raise ValueError(
            f"'{text}' is no cron expression; write five fields: minute hour day-of-month month day-of-week, such as "
            '"0 2 * * *"'
        )
    try:
        found = next(CronSim(cron, datetime(2026, 1, 1, tzinfo=UTC)), None)
    except CronSimError as error:
        raise ValueError(
            f"'{text}' is no cron expression ({error}); such as \"0 2 * * *\" for 02:00 every day"
        ) from None
    if found is None:
        raise ValueError(f"'{text}' never comes; correct its day and month")
    return cron


def make_calendar(cron: str, timezone: str) -> Calendar:
    """Raises ValueError."""
    return Calendar(check_cron(cron), check_timezone(timezone))


def make_key(instant: datetime) -> str:
    """The name of a logical date: in UTC, so that no two share one, and in the order of time."""
    return instant.astimezone(UTC).strftime(KEY_FORMAT)


def parse_key(key: str) -> datetime:
    """Raises ValueError."""
    return datetime.strptime(key, KEY_FORMAT).replace(tzinfo=UTC)


def parse_date(text: str, calendar: Calendar) -> tuple[datetime, datetime]:
    """[from, to) of what a person calls a date: a day in the calendar's zone, a time with its offset, or a run's key.
    Raises ValueError."""
    zone = ZoneInfo(calendar.timezone)
    try:
        instant = parse_key(text)
    except ValueError:
        try:
            instant = datetime.fromisoformat(text)
        except ValueError:
            raise ValueError(f"'{text}' is no date; write 2026-11-28, 2026-11-28T02:00+01:00 or a run's key") from None
    if len(text) == len("2026-11-28"):
        start = instant.replace(tzinfo=zone)
        return start.astimezone(UTC), (start + timedelta(days=1)).astimezone(UTC)
    if instant.tzinfo is None:
        instant = instant.replace(tzinfo=zone)
    start = instant.astimezone(UTC)
    return start, start + timedelta(minutes=1)
