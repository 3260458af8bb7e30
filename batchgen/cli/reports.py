"""Commands that say what a job did, and hand its rows on: report, compact."""

from pathlib import Path
from typing import Annotated, Any

import typer

from batchgen.cli.base import DebugOption, JsonOption, OutArgument, app, print_json, refusals, say

HtmlOption = Annotated[
    str | None, typer.Option("--html", metavar="FILE", help="Write the page as it is now, also of a run that goes on.")
]
RowsOption = Annotated[
    int, typer.Option("--rows", min=0, max=100, help="With --html: show so many generations; reads them from data/.")
]

ByOption = Annotated[
    str | None,
    typer.Option(
        "--by",
        metavar="COLUMN",
        help="Rows, tokens and latencies by a column: of batch_stats (worker, node, source_file, …), else of data/, which "
        "is then read.",
    ),
]


@app.command()
def report(
    out: OutArgument,
    html: HtmlOption = None,
    rows: RowsOption = 0,
    by: ByOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """What became of the job on OUT: as its last run said, or as it is now where none has ended since."""
    from rich.console import Console

    from batchgen.driver.view import print_rows
    from batchgen.report.page import make_html
    from batchgen.report.reading import find_report, read_report
    from batchgen.report.text import make_text_rows
    from batchgen.storage import Storage

    with refusals(debug, as_json=as_json):
        storage = Storage(out)
        found = find_report(storage) if html is None else read_report(storage, num_generations=rows)
        if html is not None:
            write_page(html, make_html(found))
        groups = find_groups(storage, by) if by is not None else None
    print_rows(Console(stderr=True), storage.root, make_text_rows(found))
    if html is not None:
        say(f"wrote {html}")
    if by is not None and groups is not None:
        print_groups(by, groups)
        found = {**found, "by": {"column": by, **groups}}
    print_json(found, as_json)


def find_groups(storage: Any, column: str) -> dict[str, Any]:
    """`source`: where the figures are from, `batch_stats` or `data`."""
    from batchgen.report.by import add_source_files, group_batches, group_rows, list_batch_columns
    from batchgen.report.reading import read_batches

    if column not in list_batch_columns():
        return {"source": "data", "groups": group_rows(storage, column)}
    table = read_batches(storage)
    table = add_source_files(table, storage) if column == "source_file" else table
    return {"source": "batch_stats", "groups": group_batches(table, column)}


def print_groups(column: str, found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from batchgen.report.figures import show, show_time

    source = "batch_stats alone" if found["source"] == "batch_stats" else "every row of data/"
    table = Table(title=f"by {column}, from {source}; latencies right to 1 %", title_justify="left")
    for head in (column, "ok", "errors", "tokens", "ttft p50", "latency p50", "p90", "p99"):
        table.add_column(head, justify="left" if head == column else "right")
    for group in found["groups"]:
        latency = group["latency"]
        names = ("ttft_p50_s", "latency_p50_s", "latency_p90_s", "latency_p99_s")
        counts = (group["num_rows_ok"], group["num_rows_error"], group["completion_tokens"])
        cells = [*(show(count) for count in counts), *(show_time(latency[name]) for name in names)]
        table.add_row("null" if group["value"] is None else str(group["value"]), *cells)
    Console(stderr=True).print(table, markup=False)


@app.command()
def compact(
    out: OutArgument,
    dest: Annotated[str, typer.Argument(metavar="DEST", help="A new folder for the same rows: a local path or a URL.")],
    target_mb: Annotated[int, typer.Option("--target-mb", min=1, max=4096, help="Size of a file (MB).")] = 512,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Rewrite a finished dataset to files of a wanted size, every row checked; OUT is only read. Resumable."""
    from batchgen.compact.compact import compact as make_parts
    from batchgen.storage import Storage

    with refusals(debug, as_json=as_json):
        found = make_parts(Storage(out), Storage(dest), target_mb * 2**20, say)
    say(
        f"{found['destination']}: {found['rows']:,} rows in {found['parts']:,} files, {found['made']:,} of them made now"
    )
    print_json(found, as_json)


def write_page(path: str, page: str) -> None:
    from batchgen.errors import OutputError

    try:
        Path(path).write_text(page, encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"--html {path}: can't be written ({error.strerror}); give a file in a folder that is there"
        ) from error
