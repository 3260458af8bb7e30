"""What is said of a batch (one worker's work on one shard in one attempt), and of the file that it made. Frozen values."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BatchStats:
    """One row of `batch_stats`. Latencies are seconds: `latency` holds exact quantiles over the rows that the batch
    itself generated, `sketches` the same latencies as mergeable histograms, `lengths` its rows by prompt and completion
    tokens (`lengths.merge_lengths`), `error_examples` a message of ours for each error type. `wall_s` runs from the
    lease's arrival to its end. Rates are those of a shared engine: a worker serves several shards at once."""

    batch_id: str
    shard: str
    attempt: int
    epoch: int
    outcome: str
    worker: str | None = None
    node: str | None = None
    engine_kind: str | None = None
    engine_version: str | None = None
    num_gpus: float | None = None
    started_at: float | None = None
    wall_s: float | None = None
    num_rows_ok: int | None = None
    num_rows_error: int | None = None
    num_rows_retryable: int | None = None
    num_rows_from_journal: int | None = None
    num_rows_copied: int | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    tokens_per_s: float | None = None
    tokens_per_s_per_gpu: float | None = None
    mean_inflight: float | None = None
    window: int | None = None
    latency: dict[str, float | None] | None = None
    sketches: dict[str, str] | None = None
    lengths: str | None = None
    finish_reasons: dict[str, int] | None = None
    error_types: dict[str, int] | None = None
    error_examples: dict[str, str] | None = None
    num_retries: int | None = None
    read_s: float | None = None
    write_s: float | None = None


@dataclass(frozen=True, slots=True)
class GateCounts:
    """What gates ask of a file's answers, as its maker counted them: cut off by max_tokens, their tokens, those that look
    like a refusal, those that are not of the schema. `rules`: which refusals and schema (`gates.count.Rules`); None: not
    looked for."""

    rules: str
    truncated: int
    tokens: int
    refused: int | None = None
    unfit: int | None = None


@dataclass(frozen=True, slots=True)
class FileFooter:
    """What a shard file says of itself. `gates` is None in files of earlier versions; `templates` has the lengths of its
    rows by template where a column names them (`lengths.make_template_lengths`)."""

    format_version: int
    fingerprint: str
    shard: int
    attempt: int
    epoch: int
    batch_id: str
    num_rows_ok: int
    num_rows_error: int
    num_rows_retryable: int
    batches: tuple[BatchStats, ...]
    gates: GateCounts | None = None
    templates: dict[str, str] | None = None
