"""Commands that say what a job did, and hand its rows on: report, compact."""

from pathlib import Path
from typing import Annotated

import typer

from batchgen.cli.base import DebugOption, JsonOption, OutArgument, app, print_json, refusals, say

HtmlOption = Annotated[
    str | None, typer.Option("--html", metavar="FILE", help="Write the page as it is now, also of a run that goes on.")
]
RowsOption = Annotated[
    int, typer.Option("--rows", min=0, max=100, help="With --html: show so many generations; reads them from data/.")
]


@app.command()
def report(
    out: OutArgument,
    html: HtmlOption = None,
    rows: RowsOption = 0,
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
        found = find_report(storage) if html is None else read_report(storage, num_samples=rows)
        if html is not None:
            write_page(html, make_html(found))
    print_rows(Console(stderr=True), storage.root, make_text_rows(found))
    if html is not None:
        say(f"wrote {html}")
    print_json(found, as_json)


def write_page(path: str, page: str) -> None:
    from batchgen.errors import OutputError

    try:
        Path(path).write_text(page, encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"--html {path}: can't be written ({error.strerror}); give a file in a folder that is there"
        ) from error
