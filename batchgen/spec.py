"""`JobSpec`: the one frozen description of a job. What is written here is all that decides what a job makes.

Every section refuses unknown fields. `fingerprint()` covers what makes the data (input, prompt, model, sampling, output
columns); engine tuning, cluster, retry and limits may change between the runs of one job. Nothing secret belongs in a
spec: credentials come from the environment. The engines' sections are in `engine_specs`. This module knows no files and
no YAML: see `spec_load`.
"""

import hashlib
import json
from typing import Any, Literal

from pydantic import AwareDatetime, Field, model_validator

from batchgen.specs.engine import EngineSpec
from batchgen.specs.gates import GatesSpec
from batchgen.specs.input import InputSpec as InputSpec
from batchgen.specs.patterns import find_schema_fault
from batchgen.specs.retry import RetrySpec as RetrySpec  # a section like the others
from batchgen.specs.sampling import SamplingSpec
from batchgen.specs.sections import PromptForm, Section
from batchgen.specs.sections import Url as Url

FINGERPRINT_VERSION = 1
# Fields younger than the version. One that asks for nothing is left out, so that older jobs keep their fingerprint.
YOUNGER = {"tools", "guided"}


class PromptSpec(Section):
    """How a row becomes a request. Exactly one of column, messages, prompt_token_ids and template is given."""

    column: str | None = Field(default=None, description="Column with the prompt text.")
    messages: str | None = Field(
        default=None, description="Column with a chat: a list of role/content structs, or the same as JSON text."
    )
    prompt_token_ids: str | None = Field(
        default=None, description="Column with lists of token ids, sent as they are (no template, no BOS added)."
    )
    template: str | None = Field(
        default=None, description='Text with columns in braces: "Summarise: {text}". Double the braces to print one.'
    )
    system: str | None = Field(default=None, description="System message put before every column or template prompt.")
    tools: str | None = Field(
        default=None,
        description="Column with the tools that a row's answer may call: a list of OpenAI's tool definitions (structs, or "
        "JSON text); null: none. Adds the column tool_calls.",
    )
    chat: bool = Field(
        default=True,
        description="Send a column or template prompt as a user message through the model's chat template; "
        "false sends the bare text.",
    )
    sampling: str | None = Field(
        default=None,
        description="Column with per-row overrides of the sampling section (a struct, or JSON text); null: none.",
    )
    on_overflow: Literal["error", "truncate_left"] = Field(
        default="error",
        description="A prompt that leaves no room for one token: an error row, or its first tokens are cut off.",
    )

    @model_validator(mode="after")
    def _exactly_one(self) -> "PromptSpec":
        names = ("column", "messages", "prompt_token_ids", "template")
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) if given else "none"
            raise ValueError(f"give exactly one of column, messages, prompt_token_ids, template; found {found}")
        has_text = self.column is not None or self.template is not None
        if self.system is not None and not (has_text and self.chat):
            raise ValueError("system goes with a chat column or template; put it in the messages themselves instead")
        if self.tools is not None and self.form != "messages":
            raise ValueError("tools go with chat prompts; bare text and token ids hold them already")
        return self

    @property
    def form(self) -> PromptForm:
        """What every row's `Prompt` holds."""
        if self.prompt_token_ids is not None:
            return "token_ids"
        return "messages" if self.messages is not None or self.chat else "text"


class ModelSpec(Section):
    """Which weights and tokenizer."""

    path: Url = Field(
        default="embedded",
        description="A Hugging Face checkpoint: a local folder, a hub id, or a folder at s3:// or any fsspec URL, which "
        "every node copies to its own disk first; or 'embedded': the tiny model that ships with batchgen and answers sums.",
    )
    revision: str | None = Field(default=None, description="Revision of a hub id (commit, tag or branch).")
    max_model_len: int | None = Field(
        default=None, ge=2, description="Prompt plus completion, tokens. The model's own limit when absent."
    )

    stage_dir: str | None = Field(
        default=None,
        description="Folder on each node's fast local disk (full path, or ~/...): the checkpoint is copied there, once a "
        "node however many workers start. Absent: a URL is copied below ~/.cache/batchgen/models, a local folder and "
        "a hub id are used where they are.",
    )

    @model_validator(mode="after")
    def _has_revisions(self) -> "ModelSpec":
        is_named = self.path == "embedded" or self.path.startswith(("/", ".", "~")) or self.is_url
        if self.revision is not None and is_named:
            raise ValueError("revision goes with a hub id; leave it out")
        if self.stage_dir is not None and not self.stage_dir.startswith(("/", "~/")):
            raise ValueError("stage_dir is a folder on every node; give its full path")
        return self

    @property
    def is_url(self) -> bool:
        """Must it be copied before it can be loaded?"""
        return "://" in self.path


class OutputSpec(Section):
    """Where the dataset goes and which optional columns it has."""

    path: Url = Field(description="Folder to write to: local path, s3:// or any fsspec URL.")
    token_ids: bool = Field(default=False, description="Add the column token_ids (generated ids).")
    row_fingerprints: bool = Field(
        default=True,
        description="Add the columns row_fingerprint (16 bytes) and reused_from, by which later runs reuse generations and "
        "exact duplicates are made once. Decided when a job begins.",
    )
    rows_per_shard: int | None = Field(
        default=None, ge=1, description="Rows a shard (rows). Absent: from expected size and duration."
    )
    compression_level: int = Field(default=3, ge=1, le=19, description="zstd level.")
    journal_interval_s: float = Field(
        default=10.0, gt=0, description="Finished rows are made safe this often (s): what a crash can cost."
    )
    report_rows: int = Field(
        default=0, ge=0, le=100, description="Generations shown in report.html (rows). 0: no generated text is in it."
    )
    lock_url: Url | None = Field(
        default=None,
        description="Folder on a store with conditional writes, for the driver's lease, when the output's store has none.",
    )


class WorkersSpec(Section):
    """How many engine actors."""

    min: int = Field(default=1, ge=1, description="Asked for at the start (workers).")
    max: int = Field(default=1, ge=1, description="Never more than this (workers).")

    @model_validator(mode="after")
    def _ordered(self) -> "WorkersSpec":
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) is above max ({self.max}); raise max, or lower min")
        return self


class ClusterSpec(Section):
    """Where the workers run."""

    pool: Literal["ray", "inline"] = Field(default="ray", description="ray: actors; inline: threads here, without Ray.")
    workers: WorkersSpec = WorkersSpec()
    gpus_per_worker: float = Field(default=0.0, ge=0, description="GPUs an actor reserves (GPUs).")
    cpus_per_worker: float = Field(default=1.0, ge=0, description="CPU cores an actor reserves (cores).")
    resources_per_worker: dict[str, float] = Field(default={}, description="Custom Ray resources an actor reserves.")
    placement: Literal["SPREAD", "DEFAULT"] = Field(
        default="SPREAD",
        description="Ray's scheduling strategy. SPREAD puts actors on different nodes where it can; DEFAULT prefers "
        "nodes already in use until they are about half full.",
    )
    address: str | None = Field(
        default=None,
        description="Ray address; local: a fresh one. Absent: RAY_ADDRESS, then a running local cluster, then a fresh one.",
    )
    max_starting: int = Field(default=4, ge=1, description="Workers that may be starting at the same time (workers).")
    lease_ttl_s: float = Field(
        default=120.0, gt=0, description="The driver's lease on the output folder lapses after this much silence (s)."
    )
    start_timeout_s: float = Field(
        default=7200.0,
        gt=0,
        description="A worker that is not up this long after it was asked for counts as failed (s).",
    )
    drain_s: float = Field(
        default=12.0, ge=0, description="When a run is stopped, rows in flight get this long to finish (s)."
    )
    worker_timeout_s: float = Field(
        default=120.0, gt=0, description="A worker that was not heard of for this long is given up (s)."
    )
    stall_timeout_s: float = Field(
        default=7200.0,
        gt=0,
        description="A lease whose worker made no token and finished no row this long expires (s). Longer than an engine "
        "takes to notice that it hangs and to load its weights anew.",
    )
    moves: Literal["unseeded", "all", "none"] = Field(
        default="unseeded",
        description="Which rows that an engine has begun may go on at another one where that ends the run sooner. A row "
        "with a seed begins anew there. A greedy one may round otherwise, as it may with other neighbours in its batch.",
    )
    log_interval_s: float = Field(default=5.0, gt=0, description="Seconds between progress lines in a log (s).")
    deadline: AwareDatetime | None = Field(
        default=None, description="Be stopped by then, drained and resumable: a time with its UTC offset."
    )
    max_gpu_hours: float | None = Field(
        default=None, gt=0, description="Stop before one run has used more, its workers' start-up included (GPU-hours)."
    )

    gpu_hour_cost: float | None = Field(
        default=None,
        ge=0,
        description="What one GPU costs an hour, in your currency: then cost is told beside GPU-hours.",
    )

    @model_validator(mode="after")
    def _has_gpus(self) -> "ClusterSpec":
        if self.max_gpu_hours is not None and self.gpus_per_worker == 0:
            raise ValueError("max_gpu_hours counts what workers reserve, and gpus_per_worker is 0; set it")
        return self


def _dump(section: Section) -> dict[str, Any]:
    fields = section.model_dump(mode="json")
    return {name: value for name, value in fields.items() if value is not None or name not in YOUNGER}


class JobSpec(Section):
    """A whole job."""

    input: InputSpec
    prompt: PromptSpec
    model: ModelSpec = ModelSpec()
    engine: EngineSpec
    sampling: SamplingSpec = SamplingSpec()
    output: OutputSpec
    cluster: ClusterSpec = ClusterSpec()
    retry: RetrySpec = RetrySpec()
    gates: GatesSpec = GatesSpec()

    @model_validator(mode="after")
    def _has_fingerprints(self) -> "JobSpec":
        asking = "input.reuse_from" if self.input.reuse_from else "input.duplicates: copy"
        if not self.output.row_fingerprints and (self.input.reuse_from or self.input.duplicates == "copy"):
            raise ValueError(f"{asking} goes by row fingerprints, and output.row_fingerprints is false; leave that out")
        return self

    @model_validator(mode="after")
    def _has_schema(self) -> "JobSpec":
        if not self.gates.wants_schema:
            return self
        if (schema := self.gate_schema) is None:
            raise ValueError(
                "gates: max_schema_failure_rate goes by a schema; give gates.json_schema or sampling.guided.json_schema"
            )
        if (fault := find_schema_fault(schema)) is not None:
            raise ValueError(
                f"gates: max_schema_failure_rate: of the schema, {fault}; give gates.json_schema without that"
            )
        return self

    @property
    def gate_schema(self) -> str | None:
        """What gates hold answers to, as JSON text."""
        own, guided = self.gates.json_schema, self.sampling.guided
        found = own if own is not None else guided.json_schema if guided is not None else None
        return None if found is None else str(found)

    def fingerprint_fields(self) -> dict[str, Any]:
        """What makes the data, section by section, as plain JSON values."""
        return {
            "version": FINGERPRINT_VERSION,
            "input": self.input.model_dump(mode="json", include=self._list_input_fields()),
            "prompt": _dump(self.prompt),
            "model": self.model.model_dump(mode="json", exclude={"stage_dir"}),
            "engine": self.engine.fingerprint_fields(),
            "sampling": _dump(self.sampling),
            "output": self.output.model_dump(mode="json", include={"token_ids"}),
        }

    def _list_input_fields(self) -> set[str]:
        """Where duplicates are copied though each would be drawn by itself, the data is another."""
        return {"paths", "custom_id", "passthrough", *({"duplicates"} if self.input.duplicates == "copy" else ())}

    def fingerprint(self) -> str:
        """32 hexadecimal digits; equal for two specs that make the same dataset."""
        text = json.dumps(self.fingerprint_fields(), sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]
