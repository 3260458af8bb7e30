"""`EndpointSpec`: what one endpoint serves, to whom, within which limits. Frozen; no secret belongs in it.

`models` maps the name that clients use to the sections of a job that make its answers; a batch's JobSpec is made of them
verbatim. Sampling sections give the defaults of a body that leaves a field out. API keys are elsewhere: see `keys`.
"""

import re
from typing import Annotated

from pydantic import Field, field_validator, model_validator

from batchgen.spec import ClusterSpec, ModelSpec, RetrySpec, Url
from batchgen.specs.engine import EngineSpec
from batchgen.specs.sampling import SamplingSpec
from batchgen.specs.sections import Section

TENANT = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
MIB = 2**20


class ServedModel(Section):
    """One model's sections, as in a job's spec. `sampling.n` is each body's own."""

    model: ModelSpec = ModelSpec()
    engine: EngineSpec
    sampling: SamplingSpec = SamplingSpec()
    cluster: ClusterSpec = ClusterSpec()
    retry: RetrySpec = RetrySpec(max_error_rate=1.0)
    journal_interval_s: float = Field(default=10.0, gt=0, description="As a job's output.journal_interval_s (s).")
    rows_per_shard: int | None = Field(default=None, ge=1, description="As a job's output.rows_per_shard (rows).")

    @model_validator(mode="after")
    def _has_one_sample(self) -> "ServedModel":
        if self.sampling.n != 1 or self.sampling.guided is not None:
            raise ValueError("sampling.n and sampling.guided come with each request; leave them out")
        return self


class Limits(Section):
    """What the endpoint takes. The defaults are OpenAI's where it has one."""

    max_requests: int = Field(default=50_000, ge=1, description="Lines of one batch (requests).")
    max_file_bytes: int = Field(default=200 * 10**6, ge=1, description="One uploaded file (bytes).")
    max_part_bytes: int = Field(default=64 * MIB, ge=1, description="One part of an upload in parts (bytes).")
    max_line_bytes: int = Field(default=16 * MIB, ge=1024, description="One line of a batch (bytes).")
    max_body_bytes: int = Field(default=16 * MIB, ge=1024, description="Any other request's body (bytes).")
    max_choices: int = Field(default=128, ge=1, description="n times prompts of one request (rows).")
    max_uploads: int = Field(default=8, ge=1, description="Files that come to one ingress at a time (requests).")
    max_errors: int = Field(default=100, ge=1, description="Validation errors that a failed batch names (errors).")
    max_open_batches: int = Field(default=100, ge=1, description="Batches of a tenant that have not ended (batches).")
    max_running: int = Field(default=4, ge=1, description="Batches that one conductor works on at a time (batches).")
    max_window_s: float = Field(default=7 * 86400.0, gt=0, description="Longest completion window (s).")
    file_expires_s: float = Field(default=30 * 86400.0, gt=0, description="Batch files are kept this long (s).")
    requests_per_minute: int = Field(default=6000, ge=1, description="Calls of a tenant to one ingress (requests).")


class TenantSpec(Section):
    """What one tenant may do beyond its own files. `inputs`: prefixes of Parquet datasets that it may name as input."""

    inputs: tuple[Url, ...] = ()
    requests_per_minute: int | None = Field(default=None, ge=1, description="In place of the endpoint's (requests).")


class EndpointSpec(Section):
    """A whole endpoint."""

    store: Url = Field(description="Folder that holds all the endpoint knows: a local path, s3:// or any fsspec URL.")
    models: Annotated[dict[str, ServedModel], Field(min_length=1)] = Field(description="Name -> what serves it.")
    tenants: dict[str, TenantSpec] = Field(default={}, description="Tenants with rights of their own.")
    jobs: Url | None = Field(
        default=None,
        description="Folder with a folder for each tenant, in which jobs of its own (`ray job submit`) have their output "
        "folders: they are listed as batches and can be cancelled.",
    )
    limits: Limits = Limits()

    @field_validator("tenants")
    @classmethod
    def _are_names(cls, tenants: dict[str, TenantSpec]) -> dict[str, TenantSpec]:
        for name in tenants:
            if not TENANT.fullmatch(name):
                raise ValueError("a tenant's name is 1 to 64 of a-z, 0-9, '-' and '_'; choose one")
        return tenants

    @field_validator("models")
    @classmethod
    def _are_models(cls, models: dict[str, ServedModel]) -> dict[str, ServedModel]:
        for name in models:
            if not re.fullmatch(r"[\w.:/@-]{1,200}", name):
                raise ValueError("a model's name is 1 to 200 letters, digits and . : / @ _ -; choose one")
        return models
