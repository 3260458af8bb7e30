"""One evaluation from spec to scores, resumable: questions, then for each round its prompts and the ordinary job, then the
scores. Each step leaves its result in the output folder, where the next run finds it."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from batchgen.batch_stats import read_batch_stats
from batchgen.batches import BatchStats
from batchgen.driver.run import run_job
from batchgen.driver.view import View
from batchgen.errors import InputError, NotFound, OutputError, SpecError
from batchgen.evaluate.benchmarks import Question, make_arithmetic
from batchgen.evaluate.dataset import read_dataset
from batchgen.evaluate.folder import (
    Answer,
    list_rounds,
    make_digest,
    prompts_path,
    read_answers,
    read_prompts,
    read_questions,
    round_folder,
    write_prompts,
    write_questions,
    write_scores,
)
from batchgen.evaluate.math_grader import check_installed
from batchgen.evaluate.programs import LiveCodeBenchRunner, ProgramRunner, SciCodeRunner
from batchgen.evaluate.rounds import list_places, make_asked, read_step
from batchgen.evaluate.score import check_complete, score_answers, summarize
from batchgen.evaluate.spec import EvaluateSpec
from batchgen.evaluate.speed import make_speed
from batchgen.evaluate.targets import read_targets
from batchgen.spec import JobSpec
from batchgen.storage import Storage, read_text

SPEC = "evaluation.json"
NUM_ARITHMETIC = 500
RunJob = Callable[[JobSpec], dict[str, Any]]


def evaluate(spec: EvaluateSpec, view: View, run: RunJob | None = None) -> dict[str, Any]:
    """The summary, with `exit_code`: 1 where a job had more errors than its retry.max_error_rate. `run`: how a job is run;
    by default with this view. Raises Refusal; and what a run raises, after which the same command goes on."""
    run = run or (lambda job: run_job(job, view))
    storage = Storage(spec.output.path)
    questions = make_questions(spec)
    check_scorer(spec, questions)
    write_questions(storage, questions)
    exit_code = 0
    for number, place in enumerate(list_places(spec.entry, questions), 1):
        report = run_round(spec, storage, questions, (number, place), run)
        if report["state"] != "finished":
            return {"state": report["state"], "message": report["message"], "exit_code": report["exit_code"]}
        exit_code = max(exit_code, report["exit_code"])
        view.say(f"round {number}: {report['rows']['ok']:,} answers, {report['rows']['error']:,} errors")
    # Not before: a folder that another spec filled has refused the job by now.
    storage.put(SPEC, spec.model_dump_json(indent=1).encode())
    return {**score(spec.output.path, run_code=spec.run_code), "exit_code": exit_code}


def check_scorer(spec: EvaluateSpec, questions: Sequence[Question]) -> None:
    """Raises SpecError for a machine that could not score, InputError for targets that lack one. Asked before
    anything is generated."""
    if spec.entry.scoring == "math":
        check_installed()
    create_runner(spec, questions, [])


def make_questions(spec: EvaluateSpec) -> list[Question]:
    """Raises InputError for a dataset that lacks what the benchmark needs, or asks anything twice."""
    if spec.dataset is None:
        return make_arithmetic(spec.num_questions or NUM_ARITHMETIC, is_thinking=spec.sampling.thinking)
    rows = read_dataset(spec.dataset, spec.entry.columns)
    try:
        questions = spec.entry.make(rows)
    except ValueError as error:
        raise InputError(f"{spec.dataset} {error}") from error
    if not questions:
        raise InputError(f"{spec.dataset}: holds no question; give the benchmark's whole file")
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise InputError(f"{spec.dataset}: has the question '{question.id}' twice; leave one out")
        seen.add(question.id)
    if spec.num_questions is not None and spec.num_questions > len(questions):
        raise InputError(
            f"{spec.dataset}: holds {len(questions)} questions, num_questions asks for {spec.num_questions}; lower it"
        )
    return questions[: spec.num_questions]


def run_round(
    spec: EvaluateSpec, storage: Storage, questions: Sequence[Question], place: tuple[int, int], run: RunJob
) -> dict[str, Any]:
    """Write what is asked and run the job; its report. `place`: the round's number and SciCode's place."""
    number, step = place
    n = spec.resolved_sampling().n
    is_by_step = spec.entry.scoring == "step"
    template = read_text(spec.prompt_file) if spec.prompt_file is not None else spec.entry.prompt
    codes = list_codes(spec.entry.extract, questions, list_answers(storage, range(1, number))) if is_by_step else {}
    try:
        asked = make_asked(spec.entry, template, questions, step, codes, n)
    except ValueError as error:
        raise SpecError(f"prompt_file: {spec.prompt_file} {error}") from error
    write_prompts(storage, number, asked)
    job = spec.make_job(storage.url(prompts_path(number)), storage.url(round_folder(number)), n=1 if is_by_step else n)
    return run(job)


def list_answers(storage: Storage, numbers: Iterable[int]) -> list[Answer]:
    return [answer for number in numbers for answer in read_answers(storage, number)]


def list_codes(
    extract: Callable[[str], str | None], questions: Sequence[Question], answers: Iterable[Answer]
) -> dict[tuple[str, int, int], str]:
    """What each sample wrote for each step of each problem; nothing for what was not answered."""
    places = {question.id: (question.cluster, int(read_step(question)["place"])) for question in questions}
    return {
        (*places[answer.question], answer.sample_index): extract(answer.text or "") or ""
        for answer in answers
        if answer.question in places
    }


# ---- scores


def score(url: str, *, run_code: bool) -> dict[str, Any]:
    """Score what an evaluation generated, again if it was scored before. Raises Refusal."""
    storage = Storage(url)
    spec = read_spec(storage)
    questions, n = read_questions(storage), spec.resolved_sampling().n
    numbers = list_rounds(storage)
    answers = list_answers(storage, numbers)
    check_complete(storage.root, questions, answers, n)
    runner = create_runner(spec.model_copy(update={"run_code": run_code}), questions, answers)
    scores = score_answers(spec.entry, questions, answers, runner)
    batches = [batch for number in numbers for batch in read_stats(storage, number)]
    latencies = [answer.latency_s for answer in answers if answer.latency_s is not None]
    summary = {
        "benchmark": spec.benchmark,
        "title": spec.entry.title,
        "digest": make_digest(spec.benchmark, questions, read_prompts(storage, 1)),
        "model": spec.model.path,
        "engine": spec.engine.model_dump(mode="json"),
        "sampling": spec.resolved_sampling().model_dump(mode="json"),
        **summarize(scores),
        "speed": make_speed(batches, latencies),
    }
    write_scores(storage, scores, summary)
    return {"state": "finished", "exit_code": 0, **summary}


def read_spec(storage: Storage) -> EvaluateSpec:
    """Raises OutputError for a folder without an evaluation."""
    try:
        return EvaluateSpec.model_validate_json(storage.read_bytes(SPEC))
    except NotFound:
        raise OutputError(f"{storage.root}: holds no evaluation; batchgen evaluate run makes one") from None
    except ValueError as error:
        raise OutputError(f"{storage.url(SPEC)}: is not what was written; run the evaluation again") from error


def read_stats(storage: Storage, number: int) -> list[BatchStats]:
    return read_batch_stats(Storage(storage.url(round_folder(number))))


def create_runner(spec: EvaluateSpec, questions: Sequence[Question], answers: Sequence[Answer]) -> ProgramRunner | None:
    """None where programs are not to be run. Raises SpecError where there is no sandbox, InputError."""
    if not spec.run_code or spec.entry.scoring not in ("program", "step"):
        return None
    if spec.entry.scoring == "program":
        return LiveCodeBenchRunner()
    if spec.test_data is None:
        raise SpecError("run_code: scicode's tests compare with test_data.h5; give test_data in the spec")
    counts = {question.id: len(read_step(question)["cases"]) for question in questions}
    return SciCodeRunner(list_codes(spec.entry.extract, questions, answers), read_targets(spec.test_data, counts))
