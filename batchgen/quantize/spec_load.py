"""A `QuantizeSpec` from YAML; its mistakes are told as a job's are."""

from collections.abc import Sequence

from batchgen.quantize.spec import QuantizeSpec
from batchgen.specs.load import make_section, parse_tree, with_absolute_paths
from batchgen.storage import read_text


def load_quantize_spec(url: str, overrides: Sequence[str] = ()) -> QuantizeSpec:
    """Raises SpecError, InputError."""
    spec = make_section(QuantizeSpec, parse_tree(read_text(url), overrides, source=url), source=url)
    job = with_absolute_paths(spec.as_job())
    output = spec.output.model_copy(update={"path": job.output.path})
    return spec.model_copy(update={"input": job.input, "model": job.model, "output": output})
