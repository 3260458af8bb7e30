"""`QuantizeSpec`: what is quantized, with which prompts the activations are measured, and where the checkpoint goes."""

import hashlib
import json
from typing import Literal

from pydantic import Field, field_validator

from batchgen.spec import InputSpec, JobSpec, ModelSpec, OutputSpec, PromptSpec, Url
from batchgen.specs.sections import Section


class CalibrationSpec(Section):
    """How activations are measured. NVIDIA took 512 rows of each of two datasets, 512 tokens each, for DeepSeek-V3.2."""

    num_rows: int = Field(default=512, ge=1, description="The first rows of the input that make a prompt (rows).")
    max_prompt_tokens: int = Field(default=512, ge=1, description="Longer prompts are cut at the end (tokens).")
    max_batch_rows: int = Field(
        default=8, ge=1, description="Prompts of one length are run together, so that padding is never measured (rows)."
    )
    save_interval_rows: int = Field(
        default=64, ge=1, description="What was measured is written down this often: what a crash can cost (rows)."
    )


class CheckpointSpec(Section):
    """Where the NVFP4 checkpoint goes."""

    path: Url = Field(description="Folder to write to: local path, s3:// or any fsspec URL.")
    kv_cache: Literal["fp8", "auto"] = Field(
        default="fp8",
        description="What the checkpoint asks of the KV cache: fp8 (NVIDIA's for DeepSeek-V3.2, no scales are stored), or "
        "nothing.",
    )


class QuantizeSpec(Section):
    """One quantization. `input`, `prompt` and `model` are a job's own sections."""

    input: InputSpec
    prompt: PromptSpec
    model: ModelSpec = ModelSpec()
    calibration: CalibrationSpec = CalibrationSpec()
    output: CheckpointSpec
    gpus: float = Field(
        default=0.0, ge=0, description="GPUs that the Ray task reserves (GPUs); the model is spread over them."
    )
    work_dir: str = Field(
        default="~/.cache/batchgen/quantize",
        description="Local folder for what was measured and for the checkpoint until it is uploaded.",
    )

    @field_validator("gpus")
    @classmethod
    def _is_whole(cls, gpus: float) -> float:
        if gpus > 1 and gpus != int(gpus):
            raise ValueError("Ray reserves a part of one GPU or whole ones; give a whole number")
        return gpus

    def as_job(self) -> JobSpec:
        """The job that would send the calibration prompts to the model: its rows and prompts are read as a job's are."""
        values = {name: getattr(self, name) for name in ("input", "prompt", "model")}
        return JobSpec(engine={"kind": "transformers"}, output=OutputSpec(path=self.output.path), **values)

    def fingerprint(self) -> str:
        """Equal for two specs that make the same checkpoint."""
        fields = self.model_dump(mode="json", exclude={"gpus": True, "work_dir": True, "output": {"path"}})
        for name in ("max_batch_rows", "save_interval_rows"):
            del fields["calibration"][name]
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:32]
