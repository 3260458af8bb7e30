"""Commands that evaluate: run a benchmark, score it again, compare two checkpoints."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from batchgen.cli.base import DebugOption, JsonOption, OutArgument, SetOption, app, print_json, refusals, say


@contextmanager
def having_extra() -> Iterator[None]:
    """Refuse where what scoring needs is not installed; the core has none of it."""
    from batchgen.errors import SpecError

    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in ("numpy", "scipy", "h5py", "math_verify"):
            raise
        raise SpecError(f"{error.name} is not installed; pip install 'batchgen[evaluate]'") from error


evaluate_app = typer.Typer(no_args_is_help=True, help="Benchmarks as jobs, and what two checkpoints say of each other.")
app.add_typer(evaluate_app, name="evaluate")


@evaluate_app.command("run")
def run_evaluation(
    spec: Annotated[str, typer.Argument(metavar="SPEC", help="YAML file, see jobs/evaluate.yaml.")],
    set: SetOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Ask a benchmark's questions in an ordinary job and score the answers. Start it again after anything."""
    with refusals(debug, is_run=True, as_json=as_json), having_extra():
        from batchgen.evaluate.spec_load import load_evaluate_spec

        summary = watch_evaluation(load_evaluate_spec(spec, set or ()))
    print_json(summary, as_json)
    raise typer.Exit(summary["exit_code"])


def watch_evaluation(spec: Any) -> dict[str, Any]:
    """Its jobs with the view that suits where standard error goes."""
    from batchgen.cli.jobs import watch_run
    from batchgen.driver.view import LineView
    from batchgen.evaluate.job import evaluate

    summary = evaluate(spec, LineView(spec.cluster.log_interval_s, say), lambda job: watch_run(job, limit=None))
    if summary["state"] == "finished":
        _say_summary(summary)
    return summary


@evaluate_app.command("score")
def score_evaluation(
    out: OutArgument,
    run_code: Annotated[
        bool, typer.Option("--run-code", help="Run the generated programs here, in a sandbox (bubblewrap).")
    ] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Score what an evaluation generated once more, from its folder alone."""
    with refusals(debug, as_json=as_json), having_extra():
        from batchgen.evaluate.job import score

        summary = score(out, run_code=run_code)
    _say_summary(summary)
    print_json(summary, as_json)


@evaluate_app.command("compare")
def compare_evaluations(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Folder with one evaluation or many.")],
    others: Annotated[
        list[str], typer.Argument(metavar="OTHER...", help="Folders to compare with it, laid out alike.")
    ],
    margin: Annotated[
        float,
        typer.Option(min=0.01, max=50, help="Points within which two scores count as equivalent; state it first."),
    ] = 1.0,
    confidence: Annotated[
        float, typer.Option(min=0.5, max=0.999, help="Of the interval. 0.9 is a test of equivalence at 5 %.")
    ] = 0.9,
    out: Annotated[
        str | None, typer.Option("--out", help="Folder for comparison.md, comparison.json and comparison.html.")
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Both runs side by side, with intervals, a verdict, the model card's figures, throughput and latency."""
    with refusals(debug, as_json=as_json), having_extra():
        from batchgen.evaluate.compare import compare_folders, line_to_json, list_unmatched, name_folders
        from batchgen.evaluate.table import make_markdown

        lines = compare_folders(base, others, margin=margin / 100, confidence=confidence)
        base_name = name_folders([base, *others])[0]
        for missing in list_unmatched(base, others):
            say(f"warning: {missing}; not compared")
        if out is not None:
            write_comparison(out, lines, base_name)
    if as_json:
        print_json({"exit_code": 0, "lines": [line_to_json(line) for line in lines]}, as_json)
    else:
        typer.echo(make_markdown(lines, base_name))


def write_comparison(out: str, lines: Any, base_name: str) -> None:
    from batchgen.evaluate.table import make_html, make_json, make_markdown
    from batchgen.storage import Storage

    storage = Storage(out)
    storage.put("comparison.md", make_markdown(lines, base_name).encode())
    storage.put("comparison.json", make_json(lines).encode())
    storage.put("comparison.html", make_html(lines, base_name).encode())


def _say_summary(summary: dict[str, Any]) -> None:
    score = "not known, its programs were not run" if summary["score"] is None else f"{summary['score']:.4f}"
    asked = f"{summary['num_questions']:,} questions, {summary['num_samples']:,} samples"
    counts = ", ".join(f"{name} {count:,}" for name, count in summary["outcomes"].items())
    say(f"{summary['title']}: {score} ({asked}; {counts}; {100 * summary['truncated']:.1f} % cut off)")
