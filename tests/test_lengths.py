"""What is expected of lengths: hints, priors, sums, costs; and that none of it ever changes a row."""

import heapq
import math
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs_util import check_output, list_output, make_tree, merge, read_rows, run, to_parquet
from makers import make_error, make_file, make_job_spec, make_ok, make_rows

from batchgen.driver.job import open_job
from batchgen.engines.simulated import ByteTokenizer
from batchgen.errors import InputError, Refusal, SpecError
from batchgen.length_files import LENGTHS, measure_shards, read_prior
from batchgen.lengths import (
    MANY_REQUESTS,
    MANY_WINDOWS,
    MAX_FILE_TEMPLATES,
    LengthCounts,
    choose_cost,
    choose_prompt_bucket,
    choose_work,
    expect_tokens,
    format_lengths,
    make_lengths,
    make_prior,
    make_template_lengths,
    merge_lengths,
    must_go_in_order,
    total_hints,
)
from batchgen.manifest import read_json, read_plan, write_plan_files, write_plan_shards
from batchgen.plan import add_prompt_bytes, make_plan
from batchgen.records import Generation, Request, Shard, Usage
from batchgen.specs.load import make_spec
from batchgen.storage import Storage
from batchgen.worker.prepare import Preparer

counts_of = st.dictionaries(
    st.tuples(st.none() | st.integers(0, 20), st.integers(0, 70)), st.integers(1, 1000), max_size=20
)


def answer(prompt: int | None, completion: int | None) -> Generation:
    return Generation("", None, "stop", Usage(prompt, completion, None))


# ---- measured --------------------------------------------------------------------------------------------------------


@given(counts_of, counts_of)
@settings(max_examples=50, deadline=None)
def test_counts_add_up_and_survive_their_text(one: LengthCounts, other: LengthCounts) -> None:
    merged = merge_lengths([format_lengths(LengthCounts(one)), None, "", format_lengths(LengthCounts(other))])
    assert merged == LengthCounts(one) + LengthCounts(other)


def test_lengths_of_rows_are_those_of_their_generations() -> None:
    pairs = [(5, 1), (5, 100), (9, 100), (None, 3), (5, None)]
    rows = make_rows(*(make_ok(row, generation=answer(*pair)) for row, pair in enumerate(pairs)), make_error(9))
    found = merge_lengths([make_lengths(rows)])
    assert found == {(3, 0): 1, (3, 27): 1, (4, 27): 1, (None, 7): 1}
    assert make_lengths(make_rows(make_error(0))) == ""


@pytest.mark.parametrize("tokens", [1, 2, 7, 63, 64, 65, 4000, 65536])
def test_a_prior_of_one_length_expects_about_that_length(tokens: int) -> None:
    rows = make_rows(*(make_ok(row, generation=answer(tokens, tokens)) for row in range(30)))
    prior = make_prior(merge_lengths([make_lengths(rows)]))
    assert prior is not None
    assert prior.expect(tokens) == pytest.approx(tokens, rel=0.1)
    assert choose_prompt_bucket(tokens) in {bucket for bucket, _ in prior.counts}, "Arrow and Python bucket alike"


def test_a_prior_tells_prompt_lengths_apart_and_trusts_few_rows_little() -> None:
    prior = make_prior(LengthCounts({(3, 4): 1000, (10, 40): 1000, (6, 48): 1}))
    assert prior is not None
    assert prior.expect(5) < 3 < 500 < prior.expect(1000) < 1100
    assert prior.expect(40) < 1000, "one row of 4,096 tokens is no evidence"
    assert prior.expect(10**6) == prior.expect(None) == prior.mean_tokens
    assert make_prior(LengthCounts()) is None


# ---- expected --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hint", "expected"),
    [(5, 5.0), (0, 1.0), (0.2, 1.0), (500, 100.0), *((bad, None) for bad in (None, -1, float("nan"), "7", True))],
)
def test_a_hint_is_taken_as_far_as_it_makes_sense(hint: Any, expected: float | None) -> None:
    assert expect_tokens(hint, prompt_tokens=3, max_tokens=100, prior=None) == expected


def test_a_prior_stands_in_for_a_hint() -> None:
    prior = make_prior(LengthCounts({(3, 4): 1000, (10, 40): 1000}))
    assert expect_tokens(None, prompt_tokens=1000, max_tokens=100, prior=prior) == 100.0
    assert expect_tokens(7, prompt_tokens=1000, max_tokens=100, prior=prior) == 7.0


def test_hints_are_summed_and_holes_count_as_the_mean_of_the_others() -> None:
    column = pa.array([10, None, 30, float("nan"), -5, float("inf")])
    total = total_hints(column, 1000)
    assert (total.num_known, total.tokens, total.max_tokens) == (2, 40.0, 30.0)
    assert total.expect(6) == (120.0, 30.0)
    assert total_hints(column, 20).expect(2) == (30.0, 20.0)
    assert total_hints(pa.nulls(3), None).expect(3) == (None, None)


def cost(shard: Shard, **changes: Any) -> float:
    plain = {"n": 1, "window": 10, "max_tokens": 1000, "prior": None, "default_tokens": 50.0}
    return choose_cost(shard, **{**plain, **changes})


def test_a_cost_is_the_longer_of_the_work_and_the_longest_row() -> None:
    file = make_file()
    assert cost(Shard(0, file, 0, 10, 5000.0, 200.0)) == 500.0
    assert cost(Shard(0, file, 0, 10, 500.0, 200.0)) == 200.0
    known = Shard(0, file, 0, 10, 500.0, 200.0)
    assert choose_work(known, n=1, window=10, max_tokens=9, prior=None, default_tokens=1.0) == 50.0
    assert cost(Shard(0, file, 0, 10)) == 50.0
    assert cost(Shard(0, file, 0, 10, prompt_bytes=900.0)) == 70.0
    prior = make_prior(LengthCounts({(5, 40): 1000}))
    assert cost(Shard(0, file, 0, 10, prompt_bytes=900.0), prior=prior) == pytest.approx(939, rel=0.01)
    assert cost(Shard(0, file, 0, 10), n=3) == 150.0


def test_workers_with_many_rows_have_their_shards_in_order_at_first() -> None:
    many = 100 * MANY_WINDOWS
    assert must_go_in_order(many, 1, 100, is_hinted=True)
    assert must_go_in_order(many, 1, 100, is_hinted=False)
    assert must_go_in_order(2 * many, 2, 100, is_hinted=True)
    assert not must_go_in_order(2 * many, 2, 100, is_hinted=False), "their prompts' size still balances them"
    assert not must_go_in_order(many - 1, 1, 100, is_hinted=True)
    assert not must_go_in_order(2 * many - 1, 2, 100, is_hinted=True)
    assert not must_go_in_order(MANY_REQUESTS - 1, 1, 1, is_hinted=True)


def test_prompt_bytes_follow_the_row_groups() -> None:
    file = make_file(row_group_rows=(10, 0, 20))
    shards = [Shard(0, file, 0, 5), Shard(1, file, 5, 20), Shard(2, file, 20, 30)]
    found = add_prompt_bytes(shards, {file.path: (100, 0, 400)})
    assert [shard.prompt_bytes for shard in found] == [50.0, 250.0, 200.0]
    assert add_prompt_bytes(shards, {}) == shards


def drain(lengths: list[float], order: list[int], slots: int) -> float:
    """Makespan of rows started in this order on so many slots."""
    free = [0.0] * slots
    for row in order:
        heapq.heappush(free, heapq.heappop(free) + lengths[row])
    return max(free)


def test_useless_hints_cost_nothing_against_input_order() -> None:
    """Longest first by a hint that says nothing is just another order: over many jobs their makespans are the same."""
    hinted = fifo = best = 0.0
    for seed in range(300):
        draw = random.Random(seed)
        lengths = [draw.lognormvariate(0.0, 0.8) for _ in range(3000)]
        useless = [draw.random() for _ in lengths]
        rows = range(len(lengths))
        fifo += drain(lengths, list(rows), 64)
        hinted += drain(lengths, sorted(rows, key=lambda row: -useless[row]), 64)
        best += drain(lengths, sorted(rows, key=lambda row: -lengths[row]), 64)
    assert hinted <= 1.01 * fifo
    assert best < 0.95 * fifo


def test_a_template_is_told_by_its_name_and_few_rows_of_one_lean_on_all() -> None:
    long, short, rare = LengthCounts({(5, 40): 100}), LengthCounts({(5, 12): 100}), LengthCounts({(5, 12): 4})
    prior = make_prior(long + short + rare, {"long": long, "short": short, "rare": rare})
    assert prior is not None
    assert prior.expect(20, "long") == pytest.approx(939, rel=0.01)
    assert prior.expect(20, "short") == pytest.approx(7.3, rel=0.01)
    assert prior.expect(20) == prior.expect(20, "unheard of") == prior.mean_tokens
    assert prior.expect(20, "short") < prior.expect(20, "rare") < prior.mean_tokens
    told = {
        value: expect_tokens(None, prompt_tokens=20, max_tokens=500, prior=prior, template=value)
        for value in ("long", "short", None, 3)
    }
    assert told == {"long": 500.0, "short": prior.expect(20, "short"), None: prior.mean_tokens, 3: prior.mean_tokens}
    assert make_prior(LengthCounts(), {"a": LengthCounts()}) is None


CODED = pa.dictionary(pa.int32(), pa.string())


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), CODED], ids=str)
def test_templates_of_rows_are_counted_apart_whatever_holds_their_names(kind: pa.DataType) -> None:
    rows = pa.table({"prompt_tokens": [20] * 8, "completion_tokens": [8, 500] * 4})
    names = pa.array(["a", "b"] * 3 + [None, "x" * 65]).cast(kind)
    found = make_template_lengths(rows.append_column("task", names), "task")
    (digest,) = found.keys() - {"a", "b"}
    assert len(digest) == 32
    assert found == {"a": "5.12:3", "b": "5.36:3", digest: "5.36:1"}
    numbers = rows.append_column("task", pa.array([1, 2] * 4, pa.int8()))
    assert make_template_lengths(numbers, "task") == {"1": "5.12:4", "2": "5.36:4"}
    many = pa.concat_tables([rows] * 20).append_column("task", pa.array([str(min(row, 99)) for row in range(160)]))
    assert len(kept := make_template_lengths(many, "task")) == MAX_FILE_TEMPLATES
    assert "99" in kept


def test_lengths_by_template_order_better_than_without() -> None:
    """Two tasks with prompts of one length: what the last run measured of each brings the long ones first."""
    blind = told = best = 0.0
    for seed in range(40):
        draw = random.Random(seed)

        def make_day(draw: random.Random = draw) -> list[tuple[str, float]]:
            tasks = draw.choices(["label", "essay"], [9, 1], k=2000)
            return [(task, draw.lognormvariate(3 if task == "label" else 6, 0.5)) for task in tasks]

        measured = {task: LengthCounts() for task in ("label", "essay")}
        for task, tokens in make_day():
            measured[task][5, round(4 * math.log2(tokens))] += 1
        all_rows = measured["label"] + measured["essay"]
        today = make_day()
        lengths = [tokens for _, tokens in today]
        for prior, is_told in ((make_prior(all_rows), False), (make_prior(all_rows, measured), True)):
            assert prior is not None
            expected = [prior.expect(20, task) for task, _ in today]
            order = sorted(range(len(today)), key=lambda row: -expected[row])
            makespan = drain(lengths, order, 64)
            told, blind = (told + makespan, blind) if is_told else (told, blind + makespan)
        best += drain(lengths, sorted(range(len(today)), key=lambda row: -lengths[row]), 64)
    assert told < 0.85 * blind
    assert told < 1.12 * best


# ---- the plan, and a run ---------------------------------------------------------------------------------------------


def write_hinted(folder: Path, hints: list[Any], name: str = "a") -> int:
    folder.mkdir(parents=True, exist_ok=True)
    rows = len(hints)
    table = pa.table({"prompt": [f"question {row}" for row in range(rows)], "hint": pa.array(hints, pa.float64())})
    (folder / f"{name}.parquet").write_bytes(to_parquet(table, row_group_size=7))
    return rows


def test_the_plan_sums_the_hint_column_of_each_shard(tmp_path: Path) -> None:
    hints = [float(row) for row in range(1, 26)]
    write_hinted(tmp_path / "in", hints)
    write_hinted(tmp_path / "in", [None] * 5, "b")
    tree = make_tree(
        tmp_path / "in", tmp_path / "out", input={"length_hint": "hint"}, sampling={"max_tokens": 100, "n": 2}
    )
    spec = make_spec(tree)
    job = open_job(spec, Storage(spec.output.path))
    for shard in job.plan.shards:
        mine = hints[shard.row_start : shard.row_end] if shard.file.path.endswith("a.parquet") else []
        assert shard.expected_tokens == (2 * sum(mine) if mine else None)
        assert shard.max_expected_tokens == (max(mine) if mine else None)
        assert shard.prompt_bytes is not None
    costs = [queued.cost for queued in job.todo]
    assert costs[:3] == sorted(costs[:3]), "the rows with the largest hints come last in the file"


def test_a_frozen_plan_keeps_the_sums_and_an_older_one_lacks_them(tmp_path: Path) -> None:
    storage, file = Storage(str(tmp_path / "out")), make_file()
    write_plan_files(storage, [file], pa.schema([]))
    shards = [Shard(0, file, 0, 5, 12.5, 4.0, 100.0), Shard(1, file, 5, 10)]
    write_plan_shards(storage, [file], shards)
    saved = read_plan(storage)
    assert saved is not None
    assert saved[2] == shards
    old = {"number": [2], "file": [0], "row_start": [0], "row_end": [5]}
    storage.create("_batchgen/plan/shards-000002.parquet", memoryview(to_parquet(pa.table(old))))
    saved = read_plan(storage)
    assert saved is not None
    assert saved[2][2] == Shard(2, file, 0, 5)


def test_a_run_leaves_its_lengths_for_the_next_job(tmp_path: Path) -> None:
    num_rows = write_hinted(tmp_path / "in", [5.0] * 40)
    tree = make_tree(tmp_path / "in", tmp_path / "out")
    run(tree)
    facts = read_json(Storage(str(tmp_path / "out")), LENGTHS)
    tokens = [row["completion_tokens"] for row in read_rows(tmp_path / "out")]
    assert facts is not None
    assert facts["num_rows"] == num_rows
    assert facts["mean_completion_tokens"] == pytest.approx(sum(tokens) / num_rows, rel=0.1)
    assert "question" not in str(facts)
    later = make_tree(tmp_path / "in", tmp_path / "later", input={"length_prior": str(tmp_path / "out")})
    prior = read_prior(make_spec(later))
    assert prior is not None
    assert prior.mean_tokens == pytest.approx(facts["mean_completion_tokens"])
    report, _ = run(later)
    assert report["exit_code"] == 0
    check_output(tmp_path / "later", [(str(tmp_path / "in/a.parquet"), num_rows)])


def write_tasks(folder: Path, num_rows: int) -> None:
    """The second half are essays; prompts tell nothing, and answers are as long as a row's own max_tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    is_long = [row >= num_rows // 2 for row in range(num_rows)]
    table = pa.table(
        {
            "prompt": [f"question {row:04d}" for row in range(num_rows)],
            "task": ["essay" if long else "label" for long in is_long],
            "own": [{"max_tokens": 60 if long else 3} for long in is_long],
        }
    )
    (folder / "a.parquet").write_bytes(to_parquet(table, row_group_size=20))


def test_the_next_run_orders_by_template(tmp_path: Path) -> None:
    """The long task's shards go first, so do its rows within a worker, and no row becomes another one for it."""
    write_tasks(tmp_path / "in", 120)
    over = {
        "input": {"passthrough": ["task"], "length_template": "task"},
        "prompt": {"sampling": "own"},
        "engine": {"mean_tokens": 500},
        "output": {"rows_per_shard": 20},
    }
    first = make_tree(tmp_path / "in", tmp_path / "out", **over)
    run(first)
    facts = read_json(Storage(str(tmp_path / "out")), LENGTHS)
    assert facts is not None
    assert merge_lengths(facts["templates"].values()) == merge_lengths([facts["lengths"]])
    assert {name: merge_lengths([text]).total() for name, text in facts["templates"].items()} == {
        "essay": 60,
        "label": 60,
    }
    later = merge(
        make_tree(tmp_path / "in", tmp_path / "later", **over),
        {"input": {"length_prior": str(tmp_path / "out")}},
    )
    spec = make_spec(later)
    job = open_job(spec, Storage(spec.output.path))
    half = len(job.plan.shards) // 2
    tokens = [shard.expected_tokens for shard in job.plan.shards]
    assert all(
        few is not None and many is not None and few < many / 5 for few in tokens[:half] for many in tokens[half:]
    )
    assert [shard.max_expected_tokens for shard in job.plan.shards][-1] == pytest.approx(60, rel=0.1)
    assert min(queued.cost for queued in job.todo[half:]) > max(queued.cost for queued in job.todo[:half])
    report, _ = run(later)
    assert report["exit_code"] == 0
    # So does the worker, before it has rendered a row and after.
    rows = pq.read_table(tmp_path / "in" / "a.parquet").combine_chunks().to_batches()[0].slice(59, 2)
    preparer = Preparer(spec, ByteTokenizer(), None, prior=job.prior)
    requests = [item for item in preparer.prepare(rows, "a.parquet", [59, 60]) if isinstance(item, Request)]
    for found in (preparer.expect(rows), [request.expected_tokens for request in requests]):
        assert found == pytest.approx([3.0, 60.0], rel=0.2)
    texts = [[row["text"] for row in read_rows(tmp_path / name)] for name in ("out", "later")]
    assert texts[0] == texts[1]
    # A plan that stands keeps what it was made with; without the prior nothing is expected.
    assert open_job(spec, Storage(spec.output.path)).plan.shards == job.plan.shards
    plain = make_spec(make_tree(tmp_path / "in", tmp_path / "plain", **over))
    assert {s.expected_tokens for s in open_job(plain, Storage(plain.output.path)).plan.shards} == {None}


def test_a_prior_sizes_the_shards() -> None:
    spec = make_job_spec(sampling={"max_tokens": 64_000}, cluster={"workers": {"min": 1, "max": 1}})
    file = make_file(row_group_rows=(100,) * 1000)
    guessed, short, longest = (len(make_plan(spec, [file], mean_tokens=mean).shards) for mean in (None, 40.0, 20_000.0))
    assert short < guessed < longest


def test_a_template_column_is_one_that_the_output_has(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="name it in passthrough, too"):
        make_spec(make_tree(tmp_path / "in", tmp_path / "out", input={"length_template": "task"}))
    write_hinted(tmp_path / "in", [1.0])
    for name, reason in [("nope", "has no column 'nope'"), ("hint", "it must be text or integers")]:
        with pytest.raises(Refusal, match=reason):
            run(make_tree(tmp_path / "in", tmp_path / "out", input={"length_template": name, "passthrough": [name]}))


def test_hints_of_any_kind_change_no_row(tmp_path: Path) -> None:
    hints = [None, -1.0, float("nan"), 1e300, *range(36)]
    num_rows = write_hinted(tmp_path / "in", hints)
    run(make_tree(tmp_path / "in", tmp_path / "plain"))
    run(make_tree(tmp_path / "in", tmp_path / "hinted", input={"length_hint": "hint"}))
    check_output(tmp_path / "hinted", [(str(tmp_path / "in/a.parquet"), num_rows)])
    texts = [[row["text"] for row in read_rows(tmp_path / name)] for name in ("plain", "hinted")]
    assert texts[0] == texts[1]


def test_a_hint_named_later_is_looked_at_then(tmp_path: Path) -> None:
    write_hinted(tmp_path / "in", [float(row) for row in range(20)])
    run(make_tree(tmp_path / "in", tmp_path / "out"), limit=10)
    spec = make_spec(make_tree(tmp_path / "in", tmp_path / "out", input={"length_hint": "hint"}))
    job = open_job(spec, Storage(spec.output.path))
    assert all(shard.expected_tokens is not None for shard in job.plan.shards)
    assert list_output(tmp_path / "out", "data"), "and the plan is the frozen one"
    for name, reason in [("absent", "has no column 'absent'"), ("prompt", "it must be a number")]:
        wrong = make_spec(make_tree(tmp_path / "in", tmp_path / "out", input={"length_hint": name}))
        with pytest.raises(InputError, match=reason):
            open_job(wrong, Storage(spec.output.path))


@pytest.mark.parametrize(("name", "reason"), [("nope", "has no column 'nope'"), ("prompt", "it must be a number")])
def test_a_hint_that_is_none_is_refused(tmp_path: Path, name: str, reason: str) -> None:
    write_hinted(tmp_path / "in", [1.0])
    with pytest.raises(Refusal, match=reason):
        run(make_tree(tmp_path / "in", tmp_path / "out", input={"length_hint": name}))


def test_a_prior_that_is_none_is_refused(tmp_path: Path) -> None:
    write_hinted(tmp_path / "in", [1.0])
    with pytest.raises(Refusal, match="has no measured lengths"):
        run(make_tree(tmp_path / "in", tmp_path / "out", input={"length_prior": str(tmp_path / "nowhere")}))


def test_hints_and_priors_are_no_part_of_the_fingerprint() -> None:
    plain = make_job_spec()
    hinted = make_job_spec(input={"paths": ["/data/in.parquet"], "length_hint": "a", "length_prior": "/old"})
    assert plain.fingerprint() == hinted.fingerprint()
    assert measure_shards([], hinted, None) == []
