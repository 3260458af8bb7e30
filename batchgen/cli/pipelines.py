"""Commands for pipelines: keep them going, look at them, run a date, fill a range, pause."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from batchgen.cli.base import DebugOption, JsonOption, app, print_json, refusals, say

FilesArgument = Annotated[list[str], typer.Argument(metavar="FILE...", help="Pipeline YAML: local paths or URLs.")]
FileArgument = Annotated[str, typer.Argument(metavar="FILE", help="Pipeline YAML: a local path or a URL.")]
DateOption = Annotated[
    str | None,
    typer.Option("--date", metavar="DATE", help="2026-11-28, a time, or a run's key. Default: the newest due."),
]
AddressOption = Annotated[
    str | None,
    typer.Option(
        "--address", metavar="URL", help="Of Ray's dashboard, http://HEAD:8265. Default: as `ray job submit`."
    ),
]
LocalOption = Annotated[
    bool, typer.Option("--local", help="Runs are processes of this machine, without Ray's job API.")
]

pipelines_app = typer.Typer(no_args_is_help=True, help="A dataset per date: look at pipelines, run, backfill, pause.")
app.add_typer(pipelines_app, name="pipelines")


def load(files: list[str]) -> list[Any]:
    from batchgen.pipelines.load import load_pipelines

    return [pipeline.spec for pipeline in load_pipelines(files, datetime.now(UTC))]


def open_log(spec: Any) -> Any:
    """Its log as it is now."""
    from batchgen.pipelines.log import Log
    from batchgen.pipelines.orders import open_folder

    log = Log(open_folder(spec))
    log.catch_up()
    return log


@app.command()
def schedule(
    files: FilesArgument, address: AddressOption = None, local: LocalOption = False, debug: DebugOption = False
) -> None:
    """Keep pipelines going until stopped. Start several for safety: a run is begun once, whoever begins it."""
    from batchgen.driver.signals import stop_on_signal
    from batchgen.errors import Cancelled

    with refusals(debug, is_run=True):
        keepers = create_keepers(load(files), address, local=local)
        say(f"batchgen: keeping {', '.join(keeper.spec.name for keeper in keepers)}")
        with stop_on_signal() as check:
            try:
                run_scheduler(keepers, check, lambda: False)
            except Cancelled:
                say("batchgen: the scheduler stops; runs under way go on")


def create_keepers(specs: list[Any], address: str | None, *, local: bool, only: str | None = None) -> list[Any]:
    """One for each pipeline. Raises OutputError where a state's store can't keep two schedulers apart."""
    import time

    from batchgen.errors import OutputError
    from batchgen.pipelines.hooks import Teller
    from batchgen.pipelines.keeper import Keeper
    from batchgen.pipelines.orders import open_folder
    from batchgen.stores.probe import probe

    for spec in specs:
        abilities = probe(open_folder(spec))
        if not abilities.is_exclusive:
            raise OutputError(
                f"{spec.name}: the store of its state has no conditional writes ({abilities.reason}); put state on one "
                "that has, outputs may stay where they are"
            )
    submitter, teller = create_submitter(address, local=local), Teller
    tell, warn = (lambda text: say(f"batchgen: {text}")), (lambda text: say(f"batchgen: warning: {text}"))
    return [Keeper(spec, submitter, teller(), time.monotonic, tell, warn, only) for spec in specs]


def create_submitter(address: str | None, *, local: bool) -> Any:
    import time

    from batchgen.pipelines.submit import LifeSigns, LocalSubmitter

    if local:
        return LocalSubmitter(LifeSigns(time.monotonic))
    from batchgen.pipelines.ray_jobs import RaySubmitter

    return RaySubmitter(address)


def run_scheduler(
    keepers: list[Any], check: Callable[[], None], is_over: Callable[[], bool], tick_s: float = 5.0
) -> None:
    from batchgen.pipelines.scheduler import Scheduler

    warn: Callable[[str], None] = lambda text: say(f"batchgen: warning: {text}")  # noqa: E731
    Scheduler(keepers, say, warn).run(check, is_over, tick_s)


@pipelines_app.command("validate")
def validate_pipelines(files: FilesArgument, as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """Check pipelines and the jobs in them, for a year of dates. Starts nothing, writes nothing."""
    with refusals(debug, as_json=as_json):
        specs = load(files)
    now = datetime.now(UTC)
    for spec in specs:
        dates = [date for date, _ in zip(spec.schedule.calendar.iterate_after(now), range(3), strict=False)]
        local = ", ".join(f"{spec.schedule.calendar.to_local(date):%Y-%m-%d %H:%M %Z}" for date in dates)
        say(f"ok: {spec.name}: {len(spec.stages)} stages; next: {local or 'never'}")
    print_json({"pipelines": [spec.name for spec in specs]}, as_json)


@pipelines_app.command("list")
def list_pipelines(files: FilesArgument, as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """One line for each pipeline: when it is due, what is at work, how many runs ended well."""
    from batchgen.pipelines.overview import describe_row, make_row

    with refusals(debug, as_json=as_json):
        rows = [make_row(spec, open_log(spec).history, datetime.now(UTC)) for spec in load(files)]
    for row in rows:
        typer.echo(describe_row(row), err=as_json)
    print_json({"pipelines": rows}, as_json)


@pipelines_app.command("show")
def show_pipeline(
    file: FileArgument,
    last: Annotated[int, typer.Option("--last", min=1, help="So many runs, by date.")] = 20,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """A pipeline's newest runs, and why those failed that failed."""
    from batchgen.pipelines.overview import describe_row, describe_run, make_row, make_run_value

    with refusals(debug, as_json=as_json):
        (spec,) = load([file])
        history = open_log(spec).history
        row = make_row(spec, history, datetime.now(UTC))
    runs = sorted(history.runs.values(), key=lambda run: run.key)[-last:]
    for line in [describe_row(row), *map(describe_run, runs)]:
        typer.echo(line, err=as_json)
    print_json({**row, "runs": [make_run_value(run) for run in runs]}, as_json)


@pipelines_app.command("run")
def run_pipeline(
    file: FileArgument,
    date: DateOption = None,
    address: AddressOption = None,
    ray: Annotated[bool, typer.Option("--ray", help="Submit it through Ray's job API, as the scheduler does.")] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Run one date now and wait for its end; on this machine, or with --ray. Never one that succeeded or is at work."""
    from batchgen.driver.signals import stop_on_signal
    from batchgen.pipelines.overview import choose_date

    with refusals(debug, is_run=True, as_json=as_json):
        (spec,) = load([file])
        key = choose_date(spec, date, datetime.now(UTC))
        ask(spec, [key])
        (keeper,) = create_keepers([spec], address, local=not ray, only=key)
        keeper.log.catch_up()  # from a copy it may not know yet that the date was asked for
        others = [active for active in keeper.history.active if active != key]
        if len(others) >= spec.max_active_runs:
            say(f"{spec.name} {key}: waits for {', '.join(others)} to end; max_active_runs is {spec.max_active_runs}")
        with stop_on_signal() as check:
            run_scheduler([keeper], check, lambda: has_ended(keeper, key), tick_s=0.5)
        run = keeper.history.runs[key]
    from batchgen.pipelines.overview import describe_run, make_run_value

    typer.echo(describe_run(run), err=as_json)
    exit_code = 0 if run.state == "succeeded" else 1
    print_json({**make_run_value(run), "exit_code": exit_code}, as_json)
    raise typer.Exit(exit_code)


def has_ended(keeper: Any, key: str) -> bool:
    """And is everybody told of it? While it is still asked for, a run of that date is an earlier one that failed."""
    from batchgen.pipelines.aftermath import list_hooks_left

    run = keeper.history.runs.get(key)
    if key in keeper.history.asked or run is None or run.is_active:
        return False
    return not list_hooks_left(keeper.spec, run)


def ask(spec: Any, keys: list[str]) -> list[str]:
    """Those of the dates that may be begun are asked for. Raises OutputError where none may."""
    import time

    from batchgen.errors import OutputError
    from batchgen.pipelines.decide import is_open
    from batchgen.pipelines.events import Asked

    log = open_log(spec)
    while True:
        left = [key for key in keys if is_open(log.history, key)]
        if not left:
            states = sorted({str(log.history.get_state(key)) for key in keys})
            told = (
                "ask for others"
                if {*states} <= {"succeeded", "failed"}
                else "start `batchgen schedule`, which goes on with them"
            )
            raise OutputError(f"{spec.name}: nothing to run: {len(keys)} dates, all {', '.join(states)}; {told}")
        if set(left) <= set(log.history.asked) or log.append(Asked(tuple(left), time.time())):
            return left


@pipelines_app.command("backfill")
def backfill(
    file: FileArgument,
    first: Annotated[str, typer.Option("--from", metavar="DATE", help="First date, included.")],
    last: Annotated[str, typer.Option("--to", metavar="DATE", help="Last date, included.")],
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Ask the scheduler for the dates of a range that have not succeeded; those of the schedule go first."""
    from batchgen.pipelines.overview import list_dates

    with refusals(debug, as_json=as_json):
        (spec,) = load([file])
        keys = list_dates(spec, first, last, datetime.now(UTC))
        asked = ask(spec, keys)
    say(f"{spec.name}: asked for {len(asked)} of {len(keys)} dates; a running `batchgen schedule` takes them up")
    print_json({"asked": asked}, as_json)


@pipelines_app.command("pause")
def pause(file: FileArgument, as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """Begin no more runs; those at work go on."""
    set_paused(file, True, as_json, debug)


@pipelines_app.command("resume")
def resume(file: FileArgument, as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """Begin runs again; dates missed meanwhile as `schedule.catchup` says."""
    set_paused(file, False, as_json, debug)


def set_paused(file: str, is_paused: bool, as_json: bool, debug: bool) -> None:
    import time

    from batchgen.pipelines.events import Paused, Resumed

    with refusals(debug, as_json=as_json):
        (spec,) = load([file])
        log = open_log(spec)
        event = Paused(time.time()) if is_paused else Resumed(time.time())
        while log.history.is_paused != is_paused and not log.append(event):
            continue
    say(f"{spec.name}: {'paused' if is_paused else 'goes on'}")
    print_json({"pipeline": spec.name, "is_paused": is_paused}, as_json)


@pipelines_app.command("execute", hidden=True)
def execute_order(
    order: Annotated[str, typer.Argument(metavar="ORDER", help="URL of the order, as the scheduler wrote it.")],
    debug: DebugOption = False,
) -> None:
    """One attempt at one run: what the scheduler submits."""
    from batchgen.cli.jobs import watch_run
    from batchgen.pipelines.execute import execute
    from batchgen.pipelines.orders import read_order
    from batchgen.storage import Storage

    root, _, name = order.rpartition("/orders/")
    with refusals(debug, is_run=True):
        outcome = execute(
            read_order(Storage(root), name.removesuffix(".json")),
            lambda spec: watch_run(spec, limit=None),
            lambda text: say(f"batchgen: {text}"),
        )
    if outcome.message:
        say(f"batchgen: {outcome.message}")
    raise typer.Exit(0 if outcome.is_ok else 1)
