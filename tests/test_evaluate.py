"""Benchmarks from the user's file to the table, through the ordinary job and a server that answers as it is told."""

import csv
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jobs_util import RecordingView
from sandboxes import needs_sandbox
from scripted_server import ScriptedServer, run_scripted_server
from typer.testing import CliRunner

from batchgen.cli import app
from batchgen.errors import InputError, OutputError, SpecError
from batchgen.evaluate import programs
from batchgen.evaluate.compare import check_same, compare_folders, list_unmatched, read_evaluation
from batchgen.evaluate.job import evaluate, make_questions, score
from batchgen.evaluate.spec import EvaluateSpec
from batchgen.evaluate.spec_load import load_evaluate_spec
from batchgen.evaluate.table import make_html, make_markdown
from batchgen.storage import Storage

GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k_test.parquet"
NUM_CHOICES = 24


def make_spec(folder: Path, server: ScriptedServer | None, benchmark: str, dataset: Path | None, **over: Any) -> Any:
    url = "http://127.0.0.1:9/v1" if server is None else server.base_url
    values = {
        "benchmark": benchmark,
        "dataset": None if dataset is None else str(dataset),
        "model": {"path": "scripted"},
        "engine": {"kind": "openai", "base_urls": url, "open_timeout_s": 5},
        "output": {"path": str(folder)},
        "cluster": {"pool": "inline"},
        "retry": {"max_error_rate": 1.0, "backoff_s": 0.01},
        **over,
    }
    return EvaluateSpec.model_validate(values)


def run(spec: EvaluateSpec) -> dict[str, Any]:
    return evaluate(spec, RecordingView())


def read_scores(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(folder / "scores.parquet").to_pylist()
    return rows


def write_choices(folder: Path) -> Path:
    rows = [
        {"question_id": k, "question": f"Number {k}?", "options": ["one", "two", "three"], "answer": "ABC"[k % 3]}
        for k in range(NUM_CHOICES)
    ]
    path = folder / "mmlu.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def answer_choices(worse_from: int) -> Any:
    """All right, but: number 0 says nothing, 1 is cut off, 2 is refused, and those from `worse_from` on are wrong."""

    def answer(prompt: str, _: int) -> str:
        k = int(re.findall(r"Number (\d+)\?", prompt)[0])
        if k == 2:
            raise ValueError("no")
        letter = "ABC"[(k + (k >= worse_from)) % 3]
        return {0: "I can't say.", 1: f"…Answer: {letter}"}.get(k, f"Because.\n\nAnswer: {letter}")

    return answer


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base` and `other`, the second wrong on the last ten questions, both asked twice each."""
    folder = tmp_path_factory.mktemp("two")
    dataset = write_choices(folder)
    for name, worse_from in (("base", 99), ("other", 14)):
        with run_scripted_server(answer_choices(worse_from)) as server:
            spec = make_spec(folder / name, server, "mmlu_pro", dataset, sampling={"n": 2})
            summary = run(spec)
            assert summary["state"] == "finished"
            calls = len(server.prompts)
            assert calls >= 2 * NUM_CHOICES
            assert run(spec) == summary
            assert len(server.prompts) == calls  # nothing was asked again
    return folder


def test_everything_is_counted_and_only_what_is_right_is_right(two_runs: Path) -> None:
    summary = json.loads((two_runs / "base/scores.json").read_text())
    assert summary["outcomes"] == {"right": 2 * (NUM_CHOICES - 2), "no_answer": 2, "error": 2}
    assert summary["score"] == pytest.approx((NUM_CHOICES - 2) / NUM_CHOICES)
    assert summary["truncated"] == pytest.approx(1 / NUM_CHOICES)
    assert (summary["errors"], summary["no_answer"]) == (pytest.approx(1 / NUM_CHOICES), pytest.approx(1 / NUM_CHOICES))
    rows = read_scores(two_runs / "base")
    assert [(row["question"], row["sample_index"]) for row in rows] == [
        (str(k), sample) for k in range(NUM_CHOICES) for sample in range(2)
    ]
    assert [(row["outcome"], row["extracted"], row["is_right"]) for row in rows[:6:2]] == [
        ("no_answer", None, False),
        ("right", "B", True),
        ("error", None, False),
    ]


def test_the_table_has_both_runs_the_card_and_a_verdict(two_runs: Path) -> None:
    (line,) = compare_folders(str(two_runs / "base"), [str(two_runs / "other")], margin=0.01, confidence=0.9)
    assert line.comparison.difference == pytest.approx(-10 / NUM_CHOICES)
    assert (line.comparison.verdict, line.comparison.num_worse, line.comparison.num_better) == ("worse", 10, 0)
    assert line.comparison.p_mcnemar is None
    markdown = make_markdown([line], "base")
    assert "| MMLU-Pro | other | 24 x 2 | 0.917 | 0.500 | -41.7 |" in markdown
    assert "worse by 41.7 ±" in markdown
    assert "0.802 -> 0.799" in markdown
    assert "| base | 4.2 % | 4.2 % | 4.2 % |" in markdown
    page = make_html([line], "<base>")
    assert "&lt;base&gt;" in page
    assert "<base>" not in page
    assert page.count("<circle") == 1


def test_the_command_line_compares_and_writes(two_runs: Path, tmp_path: Path) -> None:
    command = ["evaluate", "compare", str(two_runs / "base"), str(two_runs / "other"), "--out", str(tmp_path), "--json"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    (line,) = json.loads(done.stdout)["lines"]
    assert line["card"] == {"fp8": 0.802, "nvfp4": 0.799}
    compared = line["comparison"]
    assert (compared["base"], compared["verdict"]) == (pytest.approx(22 / 24), "worse")
    assert compared["interval"][0] < compared["difference"] < compared["interval"][1] < 0
    assert line["other"]["speed"]["tokens_per_s"] > 0
    assert line["other"]["speed"]["latency_p50_s"] > 0
    assert json.loads((tmp_path / "comparison.json").read_text()) == [line]
    assert {path.suffix for path in tmp_path.glob("comparison.*")} == {".md", ".json", ".html"}


def test_a_summary_that_lacks_something_is_refused_by_name(two_runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(next(two_runs.rglob("scores.json")).parent, folder)
    (folder / "scores.json").write_text("{}")
    with pytest.raises(InputError, match=r"scores\.json: lacks benchmark"):
        compare_folders(str(folder), [str(folder)], margin=0.01, confidence=0.9)


def test_what_was_not_asked_alike_is_not_compared(two_runs: Path, tmp_path: Path) -> None:
    base = read_evaluation(Storage(str(two_runs / "base")))
    for change, what in (
        ({"digest": "other"}, "different questions"),
        ({"benchmark": "gsm8k"}, "different benchmarks"),
        ({"sampling": {**base.summary["sampling"], "temperature": 0.5}}, r"sampling\.temperature is 1\.0 in one"),
    ):
        other = read_evaluation(Storage(str(two_runs / "other")))
        other.summary.update(change)
        with pytest.raises(InputError, match=what):
            check_same(base, other)
    with pytest.raises(InputError, match="holds no scores"):
        compare_folders(str(two_runs / "base"), [str(tmp_path)], margin=0.01, confidence=0.9)
    assert list_unmatched(str(two_runs), [str(two_runs / "base")]) == [
        f"{two_runs} has no ''",
        f"{two_runs / 'base'} has no 'base'",
        f"{two_runs / 'base'} has no 'other'",
    ]


def test_a_folder_with_other_questions_is_refused(two_runs: Path) -> None:
    spec = make_spec(two_runs / "base", None, "mmlu_pro", two_runs / "mmlu.parquet", num_questions=5)
    with pytest.raises(OutputError, match="other questions"):
        run(spec)


def test_an_evaluation_that_is_not_complete_has_no_score(tmp_path: Path) -> None:
    dataset = write_choices(tmp_path)
    with run_scripted_server(answer_choices(99)) as server:
        run(make_spec(tmp_path / "out", server, "mmlu_pro", dataset, num_questions=8))
    for file in (tmp_path / "out/round-01/data").glob("*.parquet"):
        pq.write_table(pq.read_table(file).slice(3), file)
    with pytest.raises(InputError, match="of 8 answers are not there once, first question '0' sample 0"):
        score(str(tmp_path / "out"), run_code=False)
    with pytest.raises(OutputError, match="holds no evaluation"):
        score(str(tmp_path / "nothing"), run_code=False)


# ---- the user's files


ROWS = [{"id": "a", "problem": "1+1?", "answer": "2"}, {"id": "b", "problem": "Half of 3?", "answer": "1.5"}]


def write_dataset(path: Path, rows: list[dict[str, str]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("\n".join(map(json.dumps, rows)) if path.suffix == ".jsonl" else json.dumps(rows))
    return path


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "json", "csv"])
def test_a_dataset_is_read_in_any_form(tmp_path: Path, suffix: str) -> None:
    spec = make_spec(tmp_path, None, "aime_2025", write_dataset(tmp_path / f"aime.{suffix}", ROWS))
    assert [(question.id, question.expected) for question in make_questions(spec)] == [("a", "2"), ("b", "1.5")]


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("aime.jsonl", '{"problem": "1+1?"}', "row 0: lacks the column 'answer'; it has problem"),
        ("aime.jsonl", "", "holds no rows"),
        ("aime.jsonl", "{", "can't be read as jsonl"),
        ("aime.json", '{"a": 1}', "can't be read as json"),
        ("aime.parquet", "PAR1", "can't be read as parquet"),
        ("aime.csv", "problem,id\np,1,2\n", "row 0: lacks the column 'answer'; it has id, problem"),
        ("aime.txt", "x", "is none of .parquet, .jsonl, .json, .csv"),
        ("aime.jsonl", '{"problem": "", "answer": "2"}', "row 0: column 'problem' is empty"),
        ("aime.jsonl", '{"problem": "p", "answer": null}', "row 0: column 'answer' is empty"),
        ("aime.jsonl", '{"id": 1, "problem": "p", "answer": "2"}\n' * 2, "has the question '1' twice"),
    ],
)
def test_a_dataset_that_lacks_something_is_refused_by_name(tmp_path: Path, name: str, content: str, what: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=re.escape(what)):
        make_questions(make_spec(tmp_path, None, "aime_2025", tmp_path / name))


@pytest.mark.parametrize(
    ("benchmark", "row", "what"),
    [
        ("mmlu_pro", {"question": "q", "options": "['1']", "answer": "A"}, "column 'options' is no list"),
        ("scicode", {"problem_id": "1", "required_dependencies": "", "sub_steps": []}, "holds no question"),
        ("scicode", {"problem_id": "1", "required_dependencies": "", "sub_steps": "[]"}, "'sub_steps' is no list"),
        (
            "livecodebench_v6",
            {
                "question_content": "q",
                "starter_code": "",
                "public_test_cases": [{"input": 1, "output": "1"}],
                "private_test_cases": [],
                "metadata": "{}",
            },
            "row 0: has a test case whose input or output is no text",
        ),
    ],
)
def test_a_column_of_another_kind_is_refused_by_name(
    tmp_path: Path, benchmark: str, row: dict[str, Any], what: str
) -> None:
    (tmp_path / "data.jsonl").write_text(json.dumps(row))
    with pytest.raises(InputError, match=re.escape(what)):
        make_questions(make_spec(tmp_path, None, benchmark, tmp_path / "data.jsonl"))


def test_more_questions_than_there_are_is_refused(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "aime.jsonl", ROWS)
    with pytest.raises(InputError, match="holds 2 questions, num_questions asks for 3"):
        make_questions(make_spec(tmp_path, None, "aime_2025", dataset, num_questions=3))


@pytest.mark.parametrize(
    ("over", "what"),
    [
        ({"benchmark": "aime_2025"}, "needs a dataset"),
        ({"benchmark": "arithmetic", "dataset": "x.jsonl"}, "makes its own questions"),
        ({"benchmark": "scicode", "dataset": "x.jsonl", "run_code": True}, "give test_data"),
        ({"benchmark": "mmlu"}, "benchmark"),
        ({"benchmark": "arithmetic", "dataste": "x"}, "did you mean 'dataset'"),
    ],
)
def test_a_spec_that_can_not_work_is_refused(tmp_path: Path, over: dict[str, Any], what: str) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(json.dumps({"engine": {"kind": "simulated"}, "output": {"path": str(tmp_path)}, **over}))
    with pytest.raises(SpecError, match=what):
        load_evaluate_spec(str(path))


def test_a_benchmark_asks_as_often_and_as_long_as_its_reference(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, None, "aime_2025", tmp_path / "aime.jsonl", sampling={"temperature": 0.6})
    sampling = spec.resolved_sampling()
    assert (sampling.n, sampling.max_tokens, sampling.temperature, sampling.top_p) == (64, 64_000, 0.6, 0.95)
    spec = make_spec(tmp_path, None, "aime_2025", tmp_path / "aime.jsonl", sampling={"n": 2, "max_tokens": 100})
    assert (spec.resolved_sampling().n, spec.resolved_sampling().max_tokens) == (2, 100)


def test_another_prompt_is_taken_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("Box it: {problem}")
    dataset = write_dataset(tmp_path / "aime.jsonl", ROWS)
    with run_scripted_server(lambda prompt, _: "\\boxed{2}" if "1+1" in prompt else "\\boxed{\\frac{3}{2}}") as server:
        prompt_file = str(tmp_path / "prompt.txt")
        spec = make_spec(tmp_path / "out", server, "aime_2025", dataset, prompt_file=prompt_file, sampling={"n": 1})
        assert run(spec)["score"] == 1.0
        assert sorted(server.prompts) == ["Box it: 1+1?", "Box it: Half of 3?"]
    (tmp_path / "prompt.txt").write_text("Box it: {question}")
    with pytest.raises(SpecError, match=r"names 'question'; there are \{problem\}"):
        run(spec.model_copy(update={"output": spec.output.model_copy(update={"path": str(tmp_path / "new")})}))


def test_a_machine_that_could_not_score_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = write_dataset(tmp_path / "aime.jsonl", ROWS)
    monkeypatch.setattr("batchgen.evaluate.math_grader.find_spec", lambda _: None)
    with pytest.raises(SpecError, match=r"pip install 'batchgen\[evaluate\]'"):
        run(make_spec(tmp_path / "out", None, "aime_2025", dataset))
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.delitem(sys.modules, "batchgen.evaluate.compare")
    monkeypatch.delitem(sys.modules, "batchgen.evaluate.statistics")
    done = CliRunner().invoke(app, ["evaluate", "compare", "a", "b"])
    assert (done.exit_code, "scipy is not installed; pip install" in done.stderr) == (2, True)


@pytest.mark.skipif(not GSM8K.exists(), reason="GSM8K's test set is not on this machine")
def test_every_question_of_gsm8k_has_an_answer(tmp_path: Path) -> None:
    questions = make_questions(make_spec(tmp_path, None, "gsm8k", GSM8K))
    assert len(questions) == 1319
    assert (questions[0].id, questions[0].expected) == ("gsm8k-test-0000", "18")
    assert all(re.fullmatch(r"-?\d+(\.\d+)?", question.expected or "") for question in questions)


def test_the_embedded_model_is_put_to_arithmetic(tmp_path: Path) -> None:
    tree = {
        "benchmark": "arithmetic",
        "num_questions": 12,
        "engine": {"kind": "transformers", "device": "cpu"},
        "sampling": {"temperature": 0.0},
        "output": {"path": str(tmp_path / "out")},
        "cluster": {"pool": "inline"},
    }
    (tmp_path / "spec.yaml").write_text(json.dumps(tree))
    done = CliRunner().invoke(app, ["evaluate", "run", str(tmp_path / "spec.yaml"), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1])["score"] > 0.9
    again = CliRunner().invoke(app, ["evaluate", "score", str(tmp_path / "out"), "--json"])
    assert json.loads(again.stdout.splitlines()[-1])["num_questions"] == 12


# ---- programs


def write_livecodebench(folder: Path) -> Path:
    cases = [{"input": "1 2", "output": "3", "testtype": "stdin"}]
    hidden = [{"input": "20 22", "output": "42", "testtype": "stdin"}]
    calls = [{"input": "[1, 2]\n3", "output": "[1, 2, 3]", "testtype": "functional"}]
    names = ("right", "wrong", "crashed", "timeout", "too_much_output", "no_answer")
    rows = [
        {
            "question_id": name,
            "question_content": f"Add two numbers ({name}).",
            "starter_code": "",
            "public_test_cases": json.dumps(cases),
            "private_test_cases": json.dumps(hidden),
            "metadata": "{}",
        }
        for name in names
    ]
    call = {
        "question_id": "call",
        "question_content": "Append (call).",
        "starter_code": "class Solution:\n    def add(",
    }
    rows.append(
        {**rows[0], **call, "public_test_cases": json.dumps(calls), "private_test_cases": "[]"}
        | {"metadata": json.dumps({"func_name": "add"})}
    )
    path = folder / "lcb.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


PROGRAMS = {
    "right": "a, b = map(int, input().split())\nif __name__ == '__main__':\n    print(float(a + b))",
    "wrong": "print(3)",  # passes the public test only
    "crashed": "print(1 / 0)",
    "timeout": "import time\ntime.sleep(1000)",
    "too_much_output": "while True:\n    print('x' * 1000)",
    "call": "class Solution:\n    def add(self, a: List[int], b):\n        print('x')\n        return (*a, b)",
}


def answer_programs(prompt: str, _: int) -> str:
    (name,) = re.findall(r"\((\w+)\)", prompt)
    return f"Here:\n```python\n{PROGRAMS[name]}\n```" if name in PROGRAMS else "I don't know."


@needs_sandbox
def test_programs_are_run_only_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "PROGRAM_LIMITS", replace(programs.PROGRAM_LIMITS, wall_s=3.0))
    dataset = write_livecodebench(tmp_path)
    with run_scripted_server(answer_programs) as server:
        spec = make_spec(tmp_path / "out", server, "livecodebench_v6", dataset, sampling={"n": 1})
        summary = run(spec)
    assert (summary["score"], summary["outcomes"]) == (None, {"not_run": 6, "no_answer": 1})
    assert "Format: Read the inputs from stdin" in server.prompts[0] + server.prompts[1]
    with pytest.raises(InputError, match=r"batchgen evaluate score OUT --run-code"):
        read_evaluation(Storage(str(tmp_path / "out")))
    done = CliRunner().invoke(app, ["evaluate", "score", str(tmp_path / "out"), "--run-code", "--json"])
    assert done.exit_code == 0, done.output
    outcomes = {row["question"]: row["outcome"] for row in read_scores(tmp_path / "out")}
    assert outcomes == {**{name: name for name in outcomes}, "call": "right"}
    assert json.loads(done.stdout.splitlines()[-1])["score"] == pytest.approx(2 / 7)


def write_scicode(folder: Path) -> tuple[Path, Path]:
    def step(number: str, name: str, cases: list[str], **more: str) -> dict[str, Any]:
        header = f"def {name}(x):\n    '''Work on x.'''"
        told = {"step_description_prompt": f"Write {name}.", "step_background": "", "function_header": header}
        return {"step_number": number, **told, "return_line": "    return y", "test_cases": cases, **more}

    first = [
        step("1.1", "double", ["assert np.allclose(double(3), target)"]),
        step(
            "1.2",
            "quad",
            ["from scicode.compare import x\nassert np.allclose(quad(3), target)", "assert quad(0) == target"],
        ),
    ]
    given = "def double(x):\n    return 2 * x"
    second = [
        step("62.1", "double", ["assert False"], given_code=given),
        step("62.2", "eight", ["assert (eight(1), 'a') == (target[0], target[1])"]),
    ]
    problems = [
        {"problem_id": "1", "required_dependencies": "import numpy as np", "sub_steps": first},
        {"problem_id": "62", "required_dependencies": "import numpy as np", "sub_steps": second},
    ]
    dataset, targets = folder / "scicode.jsonl", folder / "test_data.h5"
    dataset.write_text("\n".join(map(json.dumps, problems)))
    with h5py.File(targets, "w") as file:
        file["1.1/test1/var1"] = np.float64(6.0)
        file["1.2/test1/var1"] = np.float64(12.0)
        file["1.2/test2/var1"] = np.int64(0)
        file["62.2/test1/var1"], file["62.2/test1/var2"] = 8, "a"
    return dataset, targets


def answer_steps(prompt: str, number: int) -> str:
    """The first sample of `double` is right, the second is not; what builds on it is right where that is."""
    name = re.findall(r"Write (\w+)\.", prompt)[-1]
    double = f"import os\ndef double(x):\n    return {'2 * x' if number == 0 else 'x'}"
    code = {
        "double": double,
        "quad": "def quad(x):\n    return double(double(x))",
        "eight": "def eight(x):\n    exit(0)",
    }
    if name == "eight" and number == 0:
        code["eight"] = "def eight(x):\n    return double(double(double(x)))"
    return f"```python\n# Background: none\n{code[name]}\n```"


@needs_sandbox
def test_a_step_of_scicode_builds_on_what_the_same_sample_wrote(tmp_path: Path) -> None:
    dataset, targets = write_scicode(tmp_path)
    with run_scripted_server(answer_steps) as server:
        over = {"sampling": {"n": 2}, "run_code": True, "test_data": str(targets)}
        summary = run(make_spec(tmp_path / "out", server, "scicode", dataset, **over))
        later = [prompt for prompt in server.prompts if "Write quad" in prompt]
    assert sorted("return 2 * x" in prompt for prompt in later) == [False, True]
    assert not any("import os" in prompt for prompt in later)
    rows = read_scores(tmp_path / "out")
    outcomes = {
        question: [row["outcome"] for row in rows if row["question"] == question] for question in ("1.1", "1.2")
    }
    assert sorted(outcomes["1.1"]) == ["right", "wrong"]
    assert outcomes["1.2"] == outcomes["1.1"]
    assert {row["cluster"] for row in rows} == {"1", "62"}
    # One of the two left by exit(0) without passing its test.
    assert sorted(row["outcome"] for row in rows if row["question"] == "62.2") == ["right", "wrong"]
    assert summary["score"] == pytest.approx(0.5)
    assert json.loads((tmp_path / "out/scores.json").read_text())["num_samples"] == 6


def test_scicode_without_its_given_steps_or_targets_is_refused(tmp_path: Path) -> None:
    dataset, _ = write_scicode(tmp_path)
    dataset.write_text(dataset.read_text().replace("given_code", "gone"))
    with pytest.raises(InputError, match=r"row 1: step 62\.1 lacks given_code"):
        make_questions(make_spec(tmp_path, None, "scicode", dataset))


@needs_sandbox
def test_targets_that_are_not_there_are_named(tmp_path: Path) -> None:
    dataset, targets = write_scicode(tmp_path)
    with h5py.File(targets, "a") as file:
        del file["1.2/test2"]
    spec = make_spec(tmp_path / "out", None, "scicode", dataset, run_code=True, test_data=str(targets))
    with pytest.raises(InputError, match=r"lacks the targets of a step: 1\.2/test2"):
        run(spec)
    targets.write_bytes(b"not HDF5")
    with pytest.raises(InputError, match="is not HDF5"):
        run(spec)
