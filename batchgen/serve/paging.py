"""One page of ids that are in the order of their making. Pure."""

from collections.abc import Sequence
from typing import Literal

Order = Literal["asc", "desc"]


def list_after(ids: Sequence[str], after: str | None, order: Order) -> list[str]:
    """All that come after the cursor, which need not be there any more. `ids`: oldest first."""
    if order == "desc":
        return [id_ for id_ in reversed(ids) if after is None or id_ < after]
    return [id_ for id_ in ids if after is None or id_ > after]
