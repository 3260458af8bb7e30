"""An endpoint's spec from YAML, checked as far as that needs no engine."""

from typing import Any

from batchgen.errors import SpecError
from batchgen.serve.batch_spec import make_batch_spec, make_served_spec
from batchgen.serve.spec import EndpointSpec, ServedModel
from batchgen.specs.load import make_section, parse_tree, with_absolute_paths
from batchgen.storage import read_text


def load_endpoint(url: str, overrides: tuple[str, ...] = ()) -> EndpointSpec:
    """The endpoint's spec at a local path or URL. Raises SpecError, InputError."""
    return make_endpoint(parse_tree(read_text(url), overrides, source=url), source=url)


def make_endpoint(tree: dict[str, Any], *, source: str = "endpoint") -> EndpointSpec:
    """The spec from plain values, local paths made absolute. Raises SpecError."""
    spec = make_section(EndpointSpec, tree, source=source)
    if spec.store.startswith("memory:"):
        raise SpecError(f"{source}: store: memory:// dies with its process; use a folder or a bucket")
    models = {name: _absolute_model(served) for name, served in spec.models.items()}
    return spec.model_copy(update={"models": models})


def _absolute_model(served: ServedModel) -> ServedModel:
    """As a job's spec would have them: model paths and call logs are the caller's."""
    spec = with_absolute_paths(make_batch_spec(served, "messages", input_url="/-", out_url="/-"))
    return served.model_copy(update={"model": spec.model, "engine": spec.engine})


def check_models(spec: EndpointSpec) -> None:
    """Raises SpecError for a model whose engine can't do what its own sections ask."""
    from batchgen.engines import check_supported

    for name, served in spec.models.items():
        try:
            check_supported(make_served_spec(served))
        except SpecError as error:
            raise SpecError(f"models.{name}: {error}") from error
