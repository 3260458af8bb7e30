"""Commands about checkpoints."""

from typing import Annotated, Any

import typer

from batchgen.cli.base import DebugOption, JsonOption, SetOption, app, print_json, refusals, say


@app.command()
def weigh(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="Folder or URL of a checkpoint; its config.json is enough.")
    ],
    gpus: Annotated[int, typer.Option(min=1, help="GPUs that share the weights.")] = 8,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """What will the checkpoint weigh as NVFP4, on disk and on each GPU? Reads headers, or the config alone; no weights."""
    from batchgen.errors import InputError
    from batchgen.preflight.checkpoint_facts import read_tensors
    from batchgen.quantize.weigh import make_value, weigh_checkpoint

    with refusals(debug, as_json=as_json):
        config, tensors = read_tensors(checkpoint)
        try:
            before, after = weigh_checkpoint(config, tensors)
        except ValueError as error:
            raise InputError(f"{checkpoint}: {error}") from error
    value = make_value(before, after, gpus)
    _print_weights(value)
    print_json(value, as_json)


@app.command()
def quantize(
    spec: Annotated[str, typer.Argument(metavar="SPEC", help="YAML file, see jobs/quantize.yaml.")],
    set: SetOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Make an NVFP4 checkpoint with nvidia-modelopt, check it against its source, and upload it. Resumable."""
    from batchgen.quantize.job import quantize as quantize_now
    from batchgen.quantize.spec_load import load_quantize_spec

    with refusals(debug, as_json=as_json):
        report = quantize_now(load_quantize_spec(spec, set or ()), say)
    print_json({"state": "finished", "exit_code": 0, **report}, as_json)


def _print_weights(value: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(caption=f"{value['ratio']:.3f} times smaller; KV cache and activations are not counted")
    for name in ("", "parameters", "on disk", f"a GPU of {value['num_gpus']}, tensor parallel", "attention DP"):
        table.add_column(name, justify="right" if name else "left")
    for name, form in value["forms"].items():
        keys = ("num_bytes", "num_bytes_per_gpu_tensor_parallel", "num_bytes_per_gpu_attention_dp")
        table.add_row(name, _scale(form["num_parameters"], ""), *(_scale(form[key], "B") for key in keys))
    Console(stderr=True).print(table)


def _scale(value: float, unit: str) -> str:
    """Four digits, in thousands of thousands."""
    for prefix in ("", "k", "M"):
        if value < 1000:
            return f"{value:.4g} {prefix}{unit}"
        value /= 1000
    return f"{value:,.4g} {'G' if unit else 'billion'}{unit}"
