"""How many calls a tenant may make: a token bucket each. Pure; time is an argument."""

import math
from dataclasses import dataclass


@dataclass(slots=True)
class _Bucket:
    num_tokens: float
    filled_at: float


class Rates:
    """Of one ingress process: several each keep their own count. A bucket holds ten seconds' worth."""

    def __init__(self) -> None:
        self._buckets: dict[str, _Bucket] = {}

    def take(self, tenant: str, per_minute: int, now: float) -> int | None:
        """None where the call is let in, else the seconds to wait."""
        room, rate = max(1.0, per_minute / 6), per_minute / 60
        bucket = self._buckets.setdefault(tenant, _Bucket(room, now))
        bucket.num_tokens = min(room, bucket.num_tokens + (now - bucket.filled_at) * rate)
        bucket.filled_at = now
        if bucket.num_tokens >= 1:
            bucket.num_tokens -= 1
            return None
        return max(1, math.ceil((1 - bucket.num_tokens) / rate))
