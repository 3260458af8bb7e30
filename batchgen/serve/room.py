"""How many of an engine's places the rows of batches may take beside interactive requests. Pure; times are given.

An engine that serves urgent requests first (`Capabilities.has_urgency`) needs no free place for them: bulk may fill it.
Any other serves in order, so as many places stay free as interactive requests took at once in the last while: none where
nobody asks, and where many do, bulk still gets its least share.
"""

from dataclasses import dataclass

# How long a peak of interactive requests is remembered.
MEMORY_S = 60.0
# Of the places, for bulk at least: a batch must end some day.
MIN_BULK_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Peak:
    """The most interactive requests at once since `at`, or now."""

    level: int = 0
    at: float = 0.0

    def note(self, level: int, now: float) -> "Peak":
        """With so many at once now."""
        if level >= self.level or now - self.at > MEMORY_S:
            return Peak(level, now)
        return self


def count_bulk_room(num_places: int, num_urgent: int, peak: Peak, now: float, *, has_urgency: bool) -> int:
    """Rows of batches that may be in flight now."""
    if has_urgency:
        return num_places
    kept = max(num_urgent, peak.level if now - peak.at <= MEMORY_S else 0)
    return max(1, int(MIN_BULK_SHARE * num_places), num_places - kept)
