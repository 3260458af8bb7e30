"""What benchmarks ask, with names in braces. Pure.

These are the prompts that Artificial Analysis, LiveCodeBench (MIT) and NVIDIA's NeMo-Skills (Apache-2.0) publish for their
benchmarks, because a figure means nothing under another one; SciCode's, which is long, is told in our words. Each can be
replaced by a file (`prompt_file`) with the same names.
"""

from collections.abc import Mapping

MATH = (
    "Solve the following math problem. Make sure to put the answer (and only answer) inside \\boxed{{}}.\n\n{problem}"
)
CHOICE = (
    "Answer the following multiple choice question. The last line of your response should be in the following format: "
    "'Answer: {letters}' (e.g. 'Answer: A').\n\n{problem}"
)
PROGRAM = (
    "### Question:\n{problem}\n\n### Format: {format}\n```python\n{starter}\n```\n\n"
    "### Answer: (use the provided format with backticks)\n\n"
)
WITH_STARTER = (
    "You will use the following starter code to write the solution to the problem and enclose your code within "
    "delimiters."
)
WITHOUT_STARTER = (
    "Read the inputs from stdin solve the problem and write the answer to stdout (do not directly test on the sample "
    "inputs). Enclose your code within delimiters as follows."
)
STEP = (
    "A scientific problem is solved in steps, each of them a Python function. These are the steps so far, with their code:"
    "\n\n{previous}\n\nWrite the code of the next step, and nothing else: no imports, no functions of earlier steps, no "
    "tests, no examples. Keep to its function header and to what it returns:\n\n{next}\n\nYou may use these imports, which "
    "are there already:\n\n{dependencies}\n\nBegin with a comment that gives the scientific background. Answer with one "
    "block of the form ```python ... ```."
)


def fill(template: str, names: Mapping[str, str]) -> str:
    """Raises ValueError for a name that this benchmark does not have."""
    try:
        return template.format_map(names)
    except (KeyError, IndexError) as error:
        raise ValueError(f"names {error}; there are {', '.join(f'{{{name}}}' for name in names)}") from error
