"""`make demo`: writes the questions, runs the job on a local Ray, shows what came of it."""

import sys
from pathlib import Path

from rich.console import Console

from batchgen.cli.base import refusals
from batchgen.cli.jobs import watch_run
from batchgen.demo import read_answers, write_questions
from batchgen.specs.load import load_spec


def main() -> int:
    write_questions(Path("demo/prompts"))
    with refusals(debug=False, is_run=True):
        report = watch_run(load_spec("jobs/demo.yaml", sys.argv[1:]), limit=None)
    answers = read_answers(report["output"])
    console = Console()
    share = answers.num_right / answers.num_rows if answers.num_rows else 0.0
    console.print(f"right answers: {answers.num_right} of {answers.num_rows} ({share:.1%})", style="bold")
    for row in answers.examples:
        thought = f"  (thought: {row['reasoning']})" if row["reasoning"] else ""
        console.print(f"  {row['custom_id']}: {row['text']}{thought}", markup=False, highlight=False)
    console.print("generations  demo/out/data/*.parquet\nstats        demo/out/batch_stats/*.parquet")
    console.print("report       demo/out/report.html")
    return int(report["exit_code"])


if __name__ == "__main__":
    sys.exit(main())
