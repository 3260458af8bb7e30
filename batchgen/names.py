"""Names of what a job makes: shard files, and batches. Pure text."""


def make_data_path(shard_number: int) -> str:
    """Where a shard's output lives below the output folder."""
    return f"data/shard-{shard_number:09d}.parquet"


def make_batch_id(shard_number: int, epoch: int, attempt: int) -> str:
    """Unique over all runs of a job: two drivers never have the same epoch."""
    return f"shard-{shard_number:09d}-e{epoch}-a{attempt}"


def make_reused_id(batch_id: str) -> str:
    """The batch that holds what this one took over instead of generating it."""
    return f"{batch_id}r"


def is_reused_id(batch_id: str) -> bool:
    return batch_id.endswith("r")


def parse_batch_id(batch_id: str) -> tuple[int, int, int]:
    """(shard number, epoch, attempt)."""
    _, number, epoch, attempt = batch_id.removesuffix("r").split("-")
    return int(number), int(epoch[1:]), int(attempt[1:])


def make_run_name(fingerprint: str, epoch: int) -> str:
    """A run's label in metrics."""
    return f"{fingerprint[:8]}-e{epoch}"
