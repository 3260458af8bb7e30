"""What a pipeline file gets wrong is refused with its file and line, before anything runs."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from pipeline_util import make_pipeline, write_pipeline
from typer.testing import CliRunner

from batchgen.cli import app
from batchgen.pipelines.graph import make_jobs
from batchgen.pipelines.load import load_pipelines

REPO = Path(__file__).parents[1]


def refuse(path: Path, text: str) -> tuple[int, str]:
    """(line that is named, the message) for a file that is refused."""
    path.write_text(text)
    done = CliRunner().invoke(app, ["pipelines", "validate", str(path), "--json"])
    assert done.exit_code == 2, done.output
    message = str(json.loads(done.stdout.splitlines()[-1])["message"])
    prefix = f"{path} line "
    assert message.startswith(prefix), message
    line, _, reason = message.removeprefix(prefix).partition(": ")
    return int(line), reason


def dump(tree: Any) -> str:
    return yaml.safe_dump(tree, sort_keys=False)


def find_line(text: str, part: str) -> int:
    return next(number for number, line in enumerate(text.splitlines(), 1) if part in line)


def test_a_good_one_passes(tmp_path: Path) -> None:
    file = write_pipeline(tmp_path / "p.yaml", make_pipeline("s3://bucket"))
    done = CliRunner().invoke(app, ["pipelines", "validate", file])
    assert done.exit_code == 0, done.output
    assert "ok: nightly: 2 stages; next:" in done.output


@pytest.mark.parametrize(
    ("old", "new", "part", "reason"),
    [
        ("0 2 * * *", "0 25 * * *", "25", "no cron expression"),
        ("0 2 * * *", "0 2 * *", "cron", "five fields"),
        ("Europe/Berlin", "Europe/Berlyn", "Berlyn", "no time zone"),
        ("made/{{ logical_time }}", "made/{{ logical_tme }}", "tme", "'logical_tme' is no template variable; known: "),
        ("made/{{ logical_time }}", "made/{{ previous.generate }}", "previous", "no value on the first run"),
        ("made/{{ logical_time }}", "made", "bucket/made", "would write to one folder"),
        ("judged/{{ logical_time }}", "made/{{ logical_time }}", "XX", "generate and judge would write to one folder"),
        ("made/{{ logical_time }}", "judged/{{ logical_time }}.input", "XX", "would write to one folder"),
        ("judged/{{ logical_time }}", "made/{{ logical_time }}/x", "logical_time }}/x", "would write to one folder"),
        ("stage: generate", "stage: judge", "stage: judge", "need each other in a circle"),
        ("stage: generate", "stage: produce", "produce", "no stage 'produce'"),
        ("score % 2 = 1", "scores % 2 = 1", "scores", "scores"),
        ("score % 2 = 1", "score % = 1", "% =", "syntax error"),
        ("score % 2 = 1", "true) OR (true", "OR (", "no DuckDB expression"),
        ("mean_tokens", "mean_token", "mean_token:", "did you mean 'mean_tokens'"),
        ("publish:", "publsh:", "publsh", "did you mean 'publish'"),
        ("delay: 0s", "delay: soon", "soon", "is no duration"),
        ("publish: s3://bucket/published", "deadline: 8h\nmax_gpu_hours: 3", "XX", "gpus_per_worker is 0"),
        ("name: nightly", "name: Nightly Build", "Build", "pattern"),
        ("0 2 * * *", "0 2 30 2 *", "30 2", "Bad day-of-month"),
        (
            "timezone: Europe/Berlin",
            "timezone: Europe/Berlin\n  cron: '* * * * *'",
            "'* *",
            "'cron' stands there a second",
        ),
        ("timezone: Europe/Berlin", "zone: Europe/Berlin", "zone:", "schedule.zone: unknown field"),
        ("max: 1", "retry: 1", "retry:", "retries.retry: unknown field; known here: delay, max"),
        ("- name: judge", "- name: judge\n  jobs: 1", "jobs:", "unknown field; did you mean 'job'?"),
        ("filter:", "filtr:", "filtr:", "unknown field; did you mean 'filter'?"),
        ("- name: judge", "- name: generate", "XX", "two stages have the name 'generate'"),
        ("score % 2 = 1", "score = '{{ logical_dat }}'", "logical_dat ", "'logical_dat' is no template variable"),
        ("made/{{ logical_time }}", "made/{{ logical_time }", "made/", "'{{' has no counterpart"),
        ("made/{{ logical_time }}", "made/{ logical_time }}", "made/", "'}}' has no counterpart"),
        (
            "'{{ input }}'",
            "'{{ stages.generate.out }}'",
            "generate.out",
            "'stages.generate.out' is no template variable",
        ),
        ("'{{ input }}'", "'{{ previous.generated }}'", "previous", "'previous.generated' is no template variable"),
        ("paths: s3://bucket/in", "paths: '{{ input }}'", "paths", "'input' is no template variable"),
        (
            "paths: s3://bucket/in",
            "paths: s3://bucket/made/{{ logical_time }}",
            "paths",
            "generate would read what it writes",
        ),
        (
            "paths: s3://bucket/in",
            "paths: s3://bucket/made/{{ run }}/data/*.parquet",
            "paths",
            "would read what it writes",
        ),
        ("paths: s3://bucket/in", "paths: [s3://x, 's3://bucket/made']", "paths", "generate would read what it writes"),
        ("paths: s3://bucket/in", "paths: s3://bucket/judged/{{ run }}/data", "paths", "would read what judge writes"),
        ("state: s3://bucket/state", "state: s3://b/{{ run }}", "state:", "is the same for every date"),
        ("published", "published/{{ run }}", "published/", "is the same for every date"),
        (
            "publish:",
            "on_success: [{webhook: 'https://x/{{ run }}'}]\npublish:",
            "webhook",
            "is the same for every date",
        ),
        ("publish:", "wait_for: [{marker: 's3://x/{{ lang }}'}]\npublish:", "lang", "'lang' is no template variable"),
        ("publish:", "partitions: {run: [a]}\npublish:", "partitions", "'run' can't be its name"),
        ("publish:", "partitions: {lang: [a, b, a]}\npublish:", "partitions", "lang has the value 'a' twice"),
        ("timezone:", "start: 2026-02-01T00:00:00Z\n  end: 2026-01-01T00:00:00Z\n  timezone:", "schedule:", "no date"),
        ("timezone:", "start: 2026-02-01\n  timezone:", "start:", "should have timezone info"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(tmp_path: Path, old: str, new: str, part: str, reason: str) -> None:
    text = dump(make_pipeline("s3://bucket"))
    assert old in text
    text = text.replace(old, new, 1) if old != "judged/{{ logical_time }}" else text.replace(old, new)
    line, message = refuse(tmp_path / "p.yaml", text)
    assert reason in message
    if part != "XX":
        assert line == find_line(text, part)


def test_an_hourly_one_by_local_hours_collides_when_the_clocks_go_back(tmp_path: Path) -> None:
    text = dump(make_pipeline("s3://bucket")).replace("0 2 * * *", "0 * * * *")
    text = text.replace("made/{{ logical_time }}", "made/{{ logical_date }}/{{ logical_hour }}")
    assert "would write to one folder" in refuse(tmp_path / "p.yaml", text)[1]
    utc = text.replace("Europe/Berlin", "UTC")
    assert CliRunner().invoke(app, ["pipelines", "validate", write(tmp_path / "q.yaml", utc)]).exit_code == 0


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_two_stages_that_name_each_other_are_a_circle(tmp_path: Path) -> None:
    tree = make_pipeline("s3://bucket")
    tree["stages"][0]["job"]["input"]["paths"] = "{{ stages.judge.data }}"
    assert "in a circle" in refuse(tmp_path / "p.yaml", dump(tree))[1]


def test_a_job_in_a_file_of_its_own_is_told_by_that_file(tmp_path: Path) -> None:
    tree = make_pipeline("s3://bucket")
    job = tree["stages"][0]["job"]
    tree["stages"][0]["job"] = "job.yaml"
    (tmp_path / "job.yaml").write_text(dump(job))
    file = write_pipeline(tmp_path / "p.yaml", tree)
    assert CliRunner().invoke(app, ["pipelines", "validate", file]).exit_code == 0
    (tmp_path / "job.yaml").write_text(dump(job).replace("custom_id", "custm_id"))
    done = CliRunner().invoke(app, ["pipelines", "validate", file])
    assert f"{tmp_path}/job.yaml line 3: input.custm_id: unknown field" in done.output


def test_partitions_need_their_names_in_the_outputs(tmp_path: Path) -> None:
    tree = make_pipeline("s3://bucket", partitions={"lang": ["en", "de"]})
    assert "would write to one folder" in refuse(tmp_path / "p.yaml", dump(tree))[1]
    text = dump(tree).replace("/{{ logical_time }}", "/{{ lang }}/{{ logical_time }}")
    assert CliRunner().invoke(app, ["pipelines", "validate", write(tmp_path / "p.yaml", text)]).exit_code == 0


def test_too_many_partitions_are_refused_and_the_most_are_checked_quickly(tmp_path: Path) -> None:
    tree = make_pipeline("s3://bucket", partitions={"shop": [f"shop-{number}" for number in range(200)]})
    for stage in tree["stages"]:
        stage["job"]["output"]["path"] += "/{{ shop }}"
    assert CliRunner().invoke(app, ["pipelines", "validate", write(tmp_path / "p.yaml", dump(tree))]).exit_code == 0
    tree["partitions"]["size"] = list("abcdef")
    line, message = refuse(tmp_path / "p.yaml", dump(tree))
    assert "1,200 partitions, more than 1,000" in message
    assert line == find_line(dump(tree), "partitions:")


def test_partitions_stand_in_waits_and_filters(tmp_path: Path) -> None:
    tree = make_pipeline("s3://bucket", partitions={"least": ["1", "2"]})
    tree["wait_for"] = [{"marker": "s3://bucket/in/{{ least }}"}]
    tree["stages"][1]["input"]["filter"] = "score > {{ least }}"
    for stage in tree["stages"]:
        stage["job"]["output"]["path"] += "/{{ least }}"
    assert CliRunner().invoke(app, ["pipelines", "validate", write(tmp_path / "p.yaml", dump(tree))]).exit_code == 0
    (spec,) = [pipeline.spec for pipeline in load_pipelines([str(tmp_path / "p.yaml")], datetime.now(UTC))]
    jobs = make_jobs(spec, datetime(2026, 11, 20, 1, tzinfo=UTC), None)
    assert [job.filter for job in jobs] == [None, "score > 1", None, "score > 2"]


def test_pipelines_must_not_write_into_each_other(tmp_path: Path) -> None:
    one = write_pipeline(tmp_path / "p.yaml", make_pipeline("s3://bucket"))
    other = make_pipeline("s3://bucket", name="other", publish="s3://elsewhere")
    second = write_pipeline(tmp_path / "q.yaml", other)
    done = CliRunner().invoke(app, ["pipelines", "validate", one, second])
    assert (done.exit_code, "lies in the same folder" in done.output) == (2, True), done.output
    same = write_pipeline(tmp_path / "r.yaml", make_pipeline("s3://elsewhere"))
    assert "has the name 'nightly', too" in CliRunner().invoke(app, ["pipelines", "validate", one, same]).output


def test_the_prompts_own_braces_are_left_alone(tmp_path: Path) -> None:
    tree = make_pipeline("s3://bucket")
    tree["stages"][0]["job"]["prompt"] = {"template": 'Answer {q} as {{"answer": ...}}'}
    assert CliRunner().invoke(app, ["pipelines", "validate", write_pipeline(tmp_path / "p.yaml", tree)]).exit_code == 0


def test_the_nightly_example_is_right() -> None:
    done = CliRunner().invoke(app, ["pipelines", "validate", str(REPO / "jobs" / "nightly.yaml")])
    assert done.exit_code == 0, done.output
