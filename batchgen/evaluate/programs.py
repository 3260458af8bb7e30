"""Programs are scored by their tests, in the sandbox. What comes of it is told as an outcome: right, wrong, timeout,
crashed or too_much_output.

LiveCodeBench (`lcb_runner/evaluation/testing_util.py`): each test is one run; what was printed, or returned, is compared
out here, so that no program ever sees what is expected of it. SciCode (`eval/scripts/test_generated_code.py`): the tests
are assertions on the code, so they run with it; a program passes when the last of them was reached.
"""

import json
import pickle
import secrets
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Any, Protocol

from batchgen.evaluate.benchmarks import Question
from batchgen.evaluate.rounds import Codes, list_previous, read_step
from batchgen.evaluate.sandbox import Ended, Limits, Sandbox

# The reference gives each test six seconds, by the clock.
PROGRAM_LIMITS = Limits(cpu_s=6, wall_s=12.0, memory_bytes=4 * 2**30, max_processes=8)
STEP_LIMITS = Limits(cpu_s=120, wall_s=180.0, memory_bytes=8 * 2**30, max_processes=16)
# Names that the reference imports for every program, the built-in ones after all others.
IMPORTED = [
    *("string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics"),
    *("itertools", "functools", "operator", "io", "sys", "json", "builtins", "typing"),
]
PREAMBLE = "".join(f"from {name} import *\n" for name in IMPORTED)
PREAMBLE += "".join(f"import {name}\n" for name in IMPORTED) + "sys.setrecursionlimit(50000)\n"
# What the program prints goes nowhere; what its function returns is all that comes out.
CALL_HEAD = "import os as _os\n_out = _os.dup(1)\n_os.dup2(2, 1)\n"
CALL_TAIL = """
import json as _json, sys as _sys
_arguments = [_json.loads(_line) for _line in _sys.stdin.read().split("\\n")]
_owner = Solution() if "Solution" in globals() else None
_function = getattr(_owner, {name!r}) if _owner is not None else globals()[{name!r}]
_os.write(_out, _json.dumps(_function(*_arguments)).encode())
"""
STEP_HEAD = "import sys as _sys\n_token = _sys.stdin.readline()\n"
STEP_TESTS = "\nimport pickle as _pickle\n_targets = _pickle.load(open('/program/targets.pickle', 'rb'))\n"


class ProgramRunner(Protocol):
    """Scores one extracted program."""

    def run(self, question: Question, code: str, sample_index: int) -> str: ...


class LiveCodeBenchRunner:
    """All tests of a question must pass; the first that does not says how it failed."""

    def __init__(self, sandbox: Sandbox | None = None) -> None:
        self._sandbox = sandbox or Sandbox(PROGRAM_LIMITS)

    def run(self, question: Question, code: str, sample_index: int) -> str:  # noqa: ARG002
        assert question.tests is not None
        tests = json.loads(question.tests)
        name = tests["function"]
        source = make_call(code, name) if name else PREAMBLE + code
        files = {"main.py": source.encode("utf-8", "replace")}
        is_same = is_same_value if name else is_same_output
        for stdin, expected in tests["cases"]:
            ended = self._sandbox.run(files, stdin.encode())
            if (failure := describe(ended)) is not None:
                return failure
            if not is_same(ended.stdout.decode("utf-8", "replace"), expected):
                return "wrong"
        return "right"


def make_call(code: str, name: str) -> str:
    return CALL_HEAD + PREAMBLE + code + CALL_TAIL.format(name=name)


def describe(ended: Ended) -> str | None:
    """None for a program that ended well. One that the kernel stopped for its CPU time (SIGXCPU, then SIGKILL) is late."""
    if ended.reason != "exited":
        return ended.reason
    if ended.exit_code in (128 + 24, 128 + 9):
        return "timeout"
    return "crashed" if ended.exit_code else None


def is_same_value(returned: str, expected: str) -> bool:
    """Of JSON values; a tuple became a list on the way."""
    try:
        return bool(json.loads(returned) == json.loads(expected))
    except (ValueError, RecursionError):  # a program may print brackets without end
        return False


def is_same_output(printed: str, expected: str) -> bool:
    """Line by line, blanks at both ends of each left out; numbers may be written in any way."""
    lines, wanted = ([line.strip() for line in text.strip().split("\n")] for text in (printed, expected))
    return len(lines) == len(wanted) and all(map(_is_same_line, lines, wanted))


def _is_same_line(line: str, wanted: str) -> bool:
    if line == wanted:
        return True
    try:
        return [Decimal(word) for word in line.split()] == [Decimal(word) for word in wanted.split()]
    except InvalidOperation:
        return False


class SciCodeRunner:
    """`codes`: what each sample wrote for each step. `targets`: by step number, what its tests compare with."""

    def __init__(self, codes: Codes, targets: Mapping[str, list[Any]], sandbox: Sandbox | None = None) -> None:
        self._codes, self._targets = codes, targets
        self._sandbox = sandbox or Sandbox(STEP_LIMITS, has_packages=True)

    def run(self, question: Question, code: str, sample_index: int) -> str:
        step = read_step(question)
        before = [code for _, code in list_previous(question, self._codes, sample_index)]
        source = make_step_test(step["dependencies"], [*before, code], step["cases"])
        targets = pickle.dumps(self._targets[question.id][: len(step["cases"])])
        token = secrets.token_hex(16)
        files = {"main.py": source.encode("utf-8", "replace"), "targets.pickle": targets}
        ended = self._sandbox.run(files, f"{token}\n".encode())
        if (failure := describe(ended)) is not None:
            return "wrong" if failure == "crashed" else failure
        return "right" if ended.stdout.decode("utf-8", "replace").endswith(f"\n{token}\n") else "wrong"


def make_step_test(dependencies: str, codes: list[str], cases: list[str]) -> str:
    """The problem's imports, all code up to this step, its tests, and the token when all of them were passed."""
    tests = []
    for number, case in enumerate(cases):
        lines = [line for line in case.split("\n") if not line.lstrip().startswith(("from scicode", "import scicode"))]
        tests.append("\n".join([f"target = _targets[{number}]", *lines]))
    body = "\n".join([dependencies, *codes, STEP_TESTS, *tests])
    return f"{STEP_HEAD}{body}\nprint('\\n' + _token, end='')\n"
