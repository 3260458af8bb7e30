"""What a pipeline file gets wrong is refused with its file and line, before anything runs."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from pipeline_util import make_pipeline, write_pipeline
from typer.testing import CliRunner

from batchgen.cli import app

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


def test_pipelines_must_not_write_into_each_other(tmp_path: Path) -> None:
    one = write_pipeline(tmp_path / "p.yaml", make_pipeline("s3://bucket"))
    other = make_pipeline("s3://bucket", name="other", publish="s3://elsewhere")
    second = write_pipeline(tmp_path / "q.yaml", other)
    done = CliRunner().invoke(app, ["pipelines", "validate", one, second])
    assert (done.exit_code, "lies in the same folder" in done.output) == (2, True), done.output
    same = write_pipeline(tmp_path / "r.yaml", make_pipeline("s3://bucket"))
    assert "has the name 'nightly', too" in CliRunner().invoke(app, ["pipelines", "validate", one, same]).output


def test_the_prompts_own_braces_are_left_alone(tmp_path: Path) -> None:
    tree = make_pipeline("s3://bucket")
    tree["stages"][0]["job"]["prompt"] = {"template": 'Answer {q} as {{"answer": ...}}'}
    assert CliRunner().invoke(app, ["pipelines", "validate", write_pipeline(tmp_path / "p.yaml", tree)]).exit_code == 0


def test_the_nightly_example_is_right() -> None:
    done = CliRunner().invoke(app, ["pipelines", "validate", str(REPO / "jobs" / "nightly.yaml")])
    assert done.exit_code == 0, done.output
