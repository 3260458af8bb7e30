"""What the driver says to workers about shares of a shard. Frozen values that pickle; descriptors only, never rows."""

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


Order = GiveRows | HelpShare | TakeIn | DropShare
