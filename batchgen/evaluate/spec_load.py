"""An `EvaluateSpec` from YAML; its mistakes are told as a job's are."""

from collections.abc import Sequence

from batchgen.evaluate.spec import EvaluateSpec
from batchgen.specs.load import make_section, parse_tree, with_absolute_paths
from batchgen.storage import Storage, read_text


def load_evaluate_spec(url: str, overrides: Sequence[str] = ()) -> EvaluateSpec:
    """Raises SpecError, InputError."""
    return with_absolute(make_section(EvaluateSpec, parse_tree(read_text(url), overrides, source=url), source=url))


def with_absolute(spec: EvaluateSpec) -> EvaluateSpec:
    """Local paths are the caller's: workers, and whoever scores later, run elsewhere."""
    output = spec.output.model_copy(update={"path": Storage(spec.output.path).root})
    job = with_absolute_paths(spec.make_job(output.path, output.path, n=1))
    paths = {name: getattr(spec, name) for name in ("dataset", "prompt_file", "test_data")}
    absolute = {name: Storage(path).root for name, path in paths.items() if path is not None}
    return spec.model_copy(update={"output": output, "model": job.model, "engine": job.engine, **absolute})
