"""`EvaluateSpec`: which benchmark is put to which model, and where questions, generations and scores go."""

from typing import Any, Literal

from pydantic import Field, model_validator

from batchgen.evaluate.benchmarks import BENCHMARKS, Benchmark
from batchgen.spec import ClusterSpec, JobSpec, ModelSpec, RetrySpec, Url
from batchgen.specs.engine import EngineSpec
from batchgen.specs.sampling import SamplingSpec
from batchgen.specs.sections import Section

BenchmarkName = Literal["mmlu_pro", "gpqa_diamond", "aime_2025", "livecodebench_v6", "scicode", "gsm8k", "arithmetic"]


class EvaluationOutputSpec(Section):
    """Where an evaluation goes."""

    path: Url = Field(description="Folder to write to: local path, s3:// or any fsspec URL.")


class EvaluateSpec(Section):
    """One benchmark, one model. `model`, `engine`, `sampling`, `cluster` and `retry` are a job's own sections."""

    benchmark: BenchmarkName = Field(
        description="Which one; docs/evaluate.md says what each asks and how it is scored."
    )
    dataset: Url | None = Field(
        default=None, description="The benchmark's file: Parquet, JSON lines, JSON or CSV. None for arithmetic."
    )
    num_questions: int | None = Field(
        default=None, ge=1, description="Only the first N questions; of arithmetic, how many are made (500)."
    )
    prompt_file: Url | None = Field(
        default=None, description="Text file with another prompt, with the names in braces that the benchmark has."
    )
    test_data: Url | None = Field(
        default=None, description="SciCode's test_data.h5, the targets of its tests; needed with run_code."
    )
    run_code: bool = Field(
        default=False,
        description="Score programs by running them here, in a sandbox (bubblewrap). They are untrusted: off by default.",
    )
    model: ModelSpec = ModelSpec()
    engine: EngineSpec
    sampling: SamplingSpec = Field(
        default=SamplingSpec(),
        description="As a job's. Absent n and max_tokens are the benchmark's own (64,000 tokens; arithmetic 1,000).",
    )
    output: EvaluationOutputSpec
    cluster: ClusterSpec = ClusterSpec()
    retry: RetrySpec = RetrySpec()

    @model_validator(mode="after")
    def _has_dataset(self) -> "EvaluateSpec":
        if self.entry.has_dataset and self.dataset is None:
            raise ValueError(f"{self.benchmark} needs a dataset; give its file")
        if not self.entry.has_dataset and self.dataset is not None:
            raise ValueError(f"{self.benchmark} makes its own questions; leave dataset out")
        if self.run_code and self.benchmark == "scicode" and self.test_data is None:
            raise ValueError("scicode's tests compare with test_data.h5; give test_data, or leave run_code out")
        return self

    @property
    def entry(self) -> Benchmark:
        return BENCHMARKS[self.benchmark]

    def resolved_sampling(self) -> SamplingSpec:
        """With the benchmark's own n and max_tokens where none were given."""
        own: dict[str, Any] = {"n": self.entry.repeats, "max_tokens": self.entry.max_tokens}
        missing = {name: value for name, value in own.items() if name not in self.sampling.model_fields_set}
        return self.sampling.model_copy(update=missing)

    def make_job(self, prompts: str, output: str, n: int) -> JobSpec:
        """The ordinary job over one file of prompts."""
        values = {name: getattr(self, name) for name in ("model", "engine", "cluster", "retry")}
        return JobSpec.model_validate(
            {
                "input": {"paths": prompts, "custom_id": "id"},
                "prompt": {"column": "prompt"},
                "sampling": self.resolved_sampling().model_copy(update={"n": n}),
                "output": {"path": output},
                **values,
            }
        )
