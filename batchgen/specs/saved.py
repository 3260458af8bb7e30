"""The spec that a job began with, as `_batchgen/spec.json` has it. Pure."""

from collections.abc import Mapping
from typing import Any

from batchgen.spec import JobSpec


def read_saved_spec(facts: Mapping[str, Any]) -> JobSpec:
    """Of what `driver.job.freeze` wrote; a job that began before there were row fingerprints has none. Raises KeyError,
    TypeError or ValidationError for what this version does not read."""
    saved = facts["spec"]
    return JobSpec.model_validate({**saved, "output": {"row_fingerprints": False, **saved["output"]}})
