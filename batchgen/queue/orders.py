"""What the driver says to workers about shares of a shard, and about exact duplicates. Frozen values that pickle;
descriptors only, never rows."""

from dataclasses import dataclass

from batchgen.records import JournalRef, Share


@dataclass(frozen=True, slots=True)
class GiveRows:
    """To an owner: choose up to so many requests of your shard that another worker shall generate. `is_begun`: of those
    that your engine has, to be stopped there; their answers so far go to the journal."""

    share: Share
    num_requests: int
    is_begun: bool = False


@dataclass(frozen=True, slots=True)
class HelpShare:
    """To a helper: generate what the handoff names, and journal it. The share's lease says where answers so far may be."""

    share: Share


@dataclass(frozen=True, slots=True)
class TakeIn:
    """To whoever holds the shard: others have journaled rows of it there. Of the shares that ended, what is missing still
    is the holder's to generate."""

    batch_id: str
    refs: tuple[JournalRef, ...]
    ended: tuple[Share, ...]


@dataclass(frozen=True, slots=True)
class DropShare:
    """To a helper: the shard is committed, stop."""

    share: Share


@dataclass(frozen=True, slots=True)
class LookAt:
    """To whoever waits for answers of a shard's rows: which segment may hold which, by their places. `is_open`: a worker
    has the shard, so more may come; `is_committed`: its file has them all. Neither: nobody works on it, what is not there
    is to be asked for again."""

    shard_number: int
    found: tuple[tuple[JournalRef, tuple[int, ...]], ...] = ()
    is_open: bool = False
    is_committed: bool = False


@dataclass(frozen=True, slots=True)
class ClaimsDecided:
    """The answer to `ClaimsMade` of this number: the place of the row that answers for each of its rows, its own where it
    is to be sent (8 bytes each); and where answers of others may be."""

    number: int
    owners: bytes
    looks: tuple[LookAt, ...] = ()


@dataclass(frozen=True, slots=True)
class JournalSoon:
    """To whoever holds the shard: others wait for rows of it."""

    shard_number: int


ShareOrder = GiveRows | HelpShare | TakeIn | DropShare
DuplicateOrder = ClaimsDecided | LookAt | JournalSoon
Order = ShareOrder | DuplicateOrder
