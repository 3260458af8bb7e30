"""`make card`: the embedded model to NVFP4, the same questions to both, and the table of what it cost."""

import sys
from pathlib import Path

from batchgen.cli.base import refusals, say
from batchgen.cli.evaluate import watch_evaluation, write_comparison
from batchgen.evaluate.card_demo import FORMS, NUM_QUESTIONS, list_specs, quantize_embedded
from batchgen.evaluate.compare import compare_folders
from batchgen.evaluate.table import make_markdown


def main() -> int:
    folder = Path("demo/card")
    num_questions = int(sys.argv[1]) if len(sys.argv) > 1 else NUM_QUESTIONS
    with refusals(debug=False, is_run=True):
        checkpoint = quantize_embedded(folder, say)
        for spec in list_specs(folder, checkpoint, num_questions):
            say(f"{Path(spec.output.path).relative_to(folder.resolve())}: {spec.engine.kind}, {spec.model.path}")
            if exit_code := watch_evaluation(spec)["exit_code"]:
                return int(exit_code)
        base, *others = (str(folder / form) for form in FORMS)
        lines = compare_folders(base, others, margin=0.01, confidence=0.9)
        write_comparison(str(folder), lines, FORMS[0])
    print(make_markdown(lines, FORMS[0]))
    print(f"written: {folder}/comparison.md, comparison.json, comparison.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
