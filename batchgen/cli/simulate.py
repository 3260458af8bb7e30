"""The command that runs a job in virtual time."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from batchgen.cli.base import DebugOption, JsonOption, SetOption, SpecArgument, app, print_json, refusals, say

# Of each policy turned round, and of the job as it is beside it.
POLICY_RUNS = 5


RowsOption = Annotated[
    int | None, typer.Option("--rows", min=1, help="Rows of the job; without it the input's are counted.")
]
EnginesOption = Annotated[
    int | None, typer.Option("--engines", min=1, help="So many workers, instead of cluster.workers.")
]
LengthsOption = Annotated[
    str | None,
    typer.Option("--lengths", metavar="FILE", help="Local Parquet with completion_tokens (and prompt_tokens)."),
]
FromOutOption = Annotated[
    str | None, typer.Option("--from", metavar="OUT", help="An earlier run's output: lengths as it measured them.")
]
MeanTokensOption = Annotated[
    float | None, typer.Option("--mean-tokens", min=1, max=1e7, help="Stated mean of completion tokens (lognormal).")
]
SigmaOption = Annotated[float, typer.Option("--sigma", min=0, max=3, help="Its sigma, of the logarithm.")]
PromptTokensOption = Annotated[
    int, typer.Option("--prompt-tokens", min=1, max=10**7, help="Of a prompt, where no file says it.")
]
StartupSOption = Annotated[
    float, typer.Option("--startup-s", min=0, max=7 * 86_400, help="From asking for a worker to its first request (s).")
]
LossesPerHourOption = Annotated[
    float, typer.Option("--losses-per-hour", min=0, max=60, help="How often one worker is lost: spot, faults.")
]
PriceOption = Annotated[
    float | None,
    typer.Option("--price", min=0, help="Of one GPU-hour, in any currency; without it no cost is told."),
]
RunsOption = Annotated[int, typer.Option("--runs", min=1, max=1000, help="Virtual runs; the interval is over them.")]
SeedOption = Annotated[int, typer.Option("--seed", help="Another one draws everything anew.")]
PoliciesOption = Annotated[
    bool, typer.Option("--policies/--no-policies", help="The figure with each policy turned round, too.")
]
PlotOption = Annotated[str | None, typer.Option("--plot", metavar="FILE", help="Draw the first run over time as SVG.")]


@app.command()
def simulate(
    spec: SpecArgument,
    set: SetOption = None,
    rows: RowsOption = None,
    engines: EnginesOption = None,
    lengths: LengthsOption = None,
    from_out: FromOutOption = None,
    mean_tokens: MeanTokensOption = None,
    sigma: SigmaOption = 1.0,
    prompt_tokens: PromptTokensOption = 1000,
    startup_s: StartupSOption = 900.0,
    losses_per_hour: LossesPerHourOption = 0.0,
    price: PriceOption = None,
    runs: RunsOption = 20,
    seed: SeedOption = 0,
    policies: PoliciesOption = True,
    plot: PlotOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """How long would it take, on how many GPUs, at what cost? Virtual time; starts nothing, writes nothing but --plot."""
    from batchgen.simulate.from_spec import Asked, list_variants, make_scenario
    from batchgen.simulate.record import Surroundings
    from batchgen.simulate.report import describe, make_value
    from batchgen.simulate.sources import choose_lengths
    from batchgen.specs.load import load_spec

    with refusals(debug, as_json=as_json):
        job_spec = load_spec(spec, set or ())
        found_lengths, source = choose_lengths(
            job_spec,
            lengths_file=lengths,
            from_out=from_out,
            mean_tokens=mean_tokens,
            sigma=sigma,
            prompt_tokens=prompt_tokens,
        )
        asked = Asked(rows or count_rows(job_spec), Surroundings(startup_s, 0.2, losses_per_hour), engines, time.time())
        scenario = make_scenario(job_spec, found_lengths, asked)
        found = run(scenario, runs, seed)
        for line in describe(found, scenario, source, price):
            say(line)
        turned = turn_policies(list_variants(scenario, job_spec), scenario, runs, seed) if policies else {}
        if plot is not None:
            write_plot(plot, found.first, f"{scenario.num_rows:,} rows, modelled")
    print_json(make_value(found, scenario, source, price, turned), as_json)


def run(scenario: Any, runs: int, seed: int) -> Any:
    from batchgen.simulate.estimate import estimate

    return estimate(scenario, num_runs=runs, seed=seed)


def turn_policies(variants: list[Any], scenario: Any, runs: int, seed: int) -> dict[str, Any]:
    """Each policy turned round, in a few runs with the same seeds on both sides."""
    from batchgen.simulate.from_spec import TAIL_POLICIES
    from batchgen.simulate.report import describe_policy, make_policy_value

    runs = min(runs, POLICY_RUNS)
    found, turned = run(scenario, runs, seed), {}
    for name, is_on, variant in variants:
        if not found.is_exact and name in TAIL_POLICIES:
            say(f"{name}: not to be seen by shards; it acts on the last minutes of a run")
            continue
        other = run(variant, runs, seed)
        say(describe_policy(name, is_on, other, found))
        turned[name] = make_policy_value(is_on, other, found)
    return turned


def count_rows(spec: Any) -> int:
    """Of the planned input. Raises what opening the job does."""
    from batchgen.driver.job import open_job
    from batchgen.storage import Storage

    return open_job(spec, Storage(spec.output.path)).plan.num_rows


def write_plot(path: str, record: Any, title: str) -> None:
    from batchgen.errors import OutputError
    from batchgen.simulate.plot import make_svg

    try:
        Path(path).write_text(make_svg(record, title), encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"--plot {path}: can't be written ({error.strerror}); give a file in a folder that is there"
        ) from error
