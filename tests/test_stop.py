"""Asked to stop twice, or by whoever does not wait."""

import signal
import time
from pathlib import Path

from jobs_util import (
    check_output,
    count_calls,
    list_output,
    make_tree,
    merge,
    run_to_end,
    running,
    wait_for,
    write_prompts,
)

SLOW = {"has_latency": True, "slots": 8, "max_inflight": 8, "decode_tokens_per_s": 200, "sigma": 0.3}


def test_a_second_ctrl_c_does_not_wait_for_the_drain(tmp_path: Path) -> None:
    """Rows that would take minutes are in flight, and the drain would give them one."""
    files = write_prompts(tmp_path / "in", (60,))
    out = tmp_path / "out"
    tree = make_tree(
        tmp_path / "in",
        out,
        tmp_path / "calls",
        engine={**SLOW, "decode_tokens_per_s": 0.1},
        cluster={"drain_s": 60},
    )
    with running(tmp_path, tree) as job:
        wait_for(lambda: count_calls(tmp_path / "calls") >= 8)
        job.signal(signal.SIGINT)
        wait_for(lambda: "stopping" in job.err)
        started = time.monotonic()
        job.signal(signal.SIGINT)
        ended = job.wait()
    assert time.monotonic() - started < 45
    assert ended.code not in (0, 2), ended.err
    assert "Traceback" not in ended.err, ended.err
    assert run_to_end(tmp_path, merge(tree, {"engine": {"has_latency": False}})).code == 0
    check_output(out, files)


def test_what_was_finished_is_journaled_before_the_drain_ends(tmp_path: Path) -> None:
    """Killed while it drains, as `ray job stop` does after 3 s: the journal's interval is an hour, and nothing is lost."""
    files = write_prompts(tmp_path / "in", (120,))
    out = tmp_path / "out"
    tree = make_tree(
        tmp_path / "in",
        out,
        tmp_path / "calls",
        engine={**SLOW, "decode_tokens_per_s": 60},
        output={"rows_per_shard": 120, "journal_interval_s": 3600},
        cluster={"workers": {"min": 1, "max": 1}, "drain_s": 60},
    )
    with running(tmp_path, merge(tree, {"engine": {"hang_text": "number 7 "}})) as job:
        wait_for(lambda: count_calls(tmp_path / "calls") >= 40 or not job.is_running)
        job.signal(signal.SIGTERM)
        wait_for(lambda: list_output(out, "_batchgen/journal"), what="the journal")
        job.kill()
    num_calls = count_calls(tmp_path / "calls")
    assert run_to_end(tmp_path, merge(tree, {"engine": {"has_latency": False}})).code == 0
    check_output(out, files)
    assert count_calls(tmp_path / "calls") - 120 <= 8 + 2, "what was in flight, and what ended in that instant"
    assert num_calls >= 40
