"""The benchmark beside other systems: its rows, oracles and server are what it says, and every failure shows as one."""

import asyncio
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchgen.bench.benchmark import Bench, Options
from batchgen.bench.measure import read_json
from batchgen.bench.oracle import find_bound_s, find_fifo_s, find_longest_first_s, find_saturation
from batchgen.bench.processes import MARK, CpuMeter, end_marked, make_env, run_child, run_server, split_cores
from batchgen.bench.summary import make_oracles, make_result_text
from batchgen.bench.ways import Way, make_quick_ways, make_ways
from batchgen.bench.workload import Workload, count_right, make_prompt, make_text, parse_row

REPO = Path(__file__).parents[1]
PEERS = REPO / "jobs" / "peers"
SMALL = Workload(num_rows=12, slots=2, mean_s=0.01, rows_per_file=5)


# ---- rows and oracles ------------------------------------------------------------------------------------------------


def test_a_row_is_the_same_wherever_it_is_asked_for() -> None:
    work = Workload()
    assert work.list_services_s() == Workload().list_services_s()
    assert work.find_service_s(7) == replace(work, num_rows=8).list_services_s()[7]
    assert parse_row(make_prompt(2999)) == 2999
    assert sum(work.list_services_s()) / 3000 == pytest.approx(0.5, rel=0.03)
    assert sorted(work.list_useless_hints_s()) == sorted(work.list_services_s())
    with pytest.raises(ValueError, match="not a prompt"):
        parse_row("hello")


def test_the_oracles_of_the_whole_workload_are_those_that_the_goals_were_set_by() -> None:
    oracles = make_oracles(Workload())
    assert oracles["fifo_saturation"] == pytest.approx(0.930, abs=0.001)
    assert oracles["longest_first_saturation"] > 0.998


def test_rows_take_the_slot_that_is_free_first() -> None:
    assert find_fifo_s([3.0, 1.0, 1.0, 4.0], 2) == 6.0
    assert find_longest_first_s([3.0, 1.0, 1.0, 4.0], 2) == 5.0
    assert find_saturation([3.0, 1.0, 1.0, 4.0], 2, 6.0) == pytest.approx(0.75)


@given(st.lists(st.floats(0.01, 10.0), min_size=1, max_size=40), st.integers(1, 8))
def test_no_order_beats_the_bound_and_longest_first_is_near_it(services_s: list[float], slots: int) -> None:
    bound_s = find_bound_s(services_s, slots) * (1 - 1e-9)
    assert bound_s <= find_fifo_s(services_s, slots)
    assert bound_s <= find_longest_first_s(services_s, slots) <= (4 / 3) * find_fifo_s(services_s, slots) + 1e-9


def test_only_rows_that_are_there_once_with_their_own_text_are_right() -> None:
    answers: list[tuple[str, str | None]] = [(str(row), make_text(row)) for row in range(4)]
    assert count_right(answers, 4) == 4
    assert count_right(answers[1:], 4) == 3
    assert count_right([*answers, answers[0]], 4) == 3
    assert count_right([("0", make_text(1)), ("1", None), *answers[2:]], 4) == 2


# ---- the server ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def run_slots(work: Workload, folder: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "batchgen.bench.server", json.dumps(asdict(work))]
    with run_server(command, split_cores()[0], make_env({}), folder / "log") as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    with run_slots(SMALL, tmp_path) as url:
        yield url


async def ask(url: str, contents: list[Any]) -> list[tuple[int, Any]]:
    async with aiohttp.ClientSession(trust_env=False) as session:

        async def ask_one(content: Any) -> tuple[int, Any]:
            body = {"messages": [{"role": "user", "content": content}]}
            async with session.post(f"{url}/v1/chat/completions", json=body) as response:
                return response.status, await response.json()

        return await asyncio.gather(*(ask_one(content) for content in contents))


def test_the_server_answers_each_row_and_says_what_it_saw(server: str) -> None:
    rows = [0, 1, 2, 3, 4, 3]
    answers = asyncio.run(ask(server, [make_prompt(row) for row in rows]))
    assert [answer["choices"][0]["message"]["content"] for _, answer in answers] == [make_text(row) for row in rows]
    stats = read_json(f"{server}/stats?reset=1")
    assert (stats["num_requests"], stats["rows"], stats["num_again"], stats["num_inflight"]) == (6, 5, 1, 0)
    assert 2 <= stats["max_inflight"] <= 6
    assert stats["service_s"] == pytest.approx(sum(SMALL.find_service_s(row) for row in range(5)))
    # Two slots, held for at least the rows' time: no shorter window is possible.
    assert stats["busy_s"] >= stats["service_s"] + SMALL.find_service_s(3) - 0.01
    assert stats["last_at"] - stats["first_at"] >= stats["busy_s"] / 2 - 0.01
    assert read_json(f"{server}/stats")["num_requests"] == 0


def test_the_server_takes_a_prompt_in_parts_and_refuses_what_is_none(server: str) -> None:
    parts = [{"type": "text", "text": make_prompt(1)}]
    (good, bad, worse) = asyncio.run(ask(server, [parts, "hello", 5]))
    assert good[1]["choices"][0]["message"]["content"] == make_text(1)
    assert (bad[0], worse[0]) == (400, 400)


def test_who_hangs_up_gives_its_slots_back(tmp_path: Path) -> None:
    slow = replace(SMALL, mean_s=600.0)
    with run_slots(slow, tmp_path) as url:

        async def hang_up() -> None:
            asking = asyncio.create_task(ask(url, [make_prompt(row) for row in range(6)]))
            await asyncio.to_thread(wait_for_open, url, 6)
            asking.cancel()
            await asyncio.wait({asking})

        asyncio.run(hang_up())
        wait_for_open(url, 0)
        stats = read_json(f"{url}/stats")
    assert (stats["num_dropped"], stats["rows"], stats["max_inflight"]) == (6, 0, 6)


def wait_for_open(url: str, num_open: int) -> None:
    give_up_at = time.monotonic() + 120
    while read_json(f"{url}/stats")["num_open"] != num_open:
        assert time.monotonic() < give_up_at, read_json(f"{url}/stats")


# ---- processes -------------------------------------------------------------------------------------------------------


def test_what_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    code = (
        "import pathlib, subprocess, time\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        f"pathlib.Path({str(pid_file)!r}).write_text(str(child.pid))\n"
        "time.sleep(600)"
    )
    reason = run_child([sys.executable, "-c", code], split_cores()[1], make_env({}), tmp_path / "log", timeout_s=3.0)
    assert reason == "not done after 3 s"
    pid = pid_file.read_text()
    give_up_at = time.monotonic() + 60
    while is_running(pid) and time.monotonic() < give_up_at:
        time.sleep(0.05)
    assert not is_running(pid)


def is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_way_ends_with_the_benchmark() -> None:
    code = "import time; from batchgen.bench.child import Child; Child(); print('up', flush=True); time.sleep(600)"
    command = [sys.executable, "-c", code, json.dumps({"report": ""})]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == b"up\n"
        process.stdin.close()
        assert process.wait(60) == 1


def test_what_carries_a_mark_can_be_ended_and_nothing_else() -> None:
    env = make_env({})
    marked, other = (subprocess.Popen(["sleep", "600"], env=one, start_new_session=True) for one in (env, make_env({})))
    try:
        end_marked(env[MARK])
        assert marked.wait(60) == -9
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_cpu_time_is_that_of_marked_processes_alone() -> None:
    burn = "import time\nwhile time.process_time() < 0.6: pass\nprint('done', flush=True); input()"
    env = make_env({})
    other = make_env({})
    with CpuMeter(env[MARK]) as meter:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        burning = [subprocess.Popen([sys.executable, "-c", burn], env=one, **pipes) for one in (env, other)]
        for process in burning:
            assert process.stdout.readline() == b"done\n"
    for process in burning:
        process.communicate(b"\n")
    assert 0.5 < sum(meter.read().values()) < 1.1


# ---- the whole -------------------------------------------------------------------------------------------------------


def test_every_way_has_a_script_a_name_of_its_own_and_settings_that_can_be_printed() -> None:
    ways = make_ways(Workload())
    assert len({(way.name, way.kind) for way in ways}) == len(ways)
    assert [way.script for way in ways if not (PEERS / way.script).exists()] == []
    assert [way.home for way in ways if way.home and not (PEERS / f"{way.home}_requirements.txt").exists()] == []
    json.dumps([dict(way.settings) for way in ways])


def test_the_quick_benchmark_measures_ours_beside_a_plain_client_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    command = [sys.executable, "jobs/benchmark.py", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert [way["way"] for way in result["ways"]] == [way.name for way in make_quick_ways(Workload())]
    for way in result["ways"]:
        assert (way["num_runs"], way["num_failed"], way["num_again"]) == (1, 0, 0)
        assert 2 <= way["max_inflight"] <= 20
        assert 0 < way["saturation"]["median"] <= 1
        assert way["before_s"]["median"] >= 0
        assert way["after_s"]["median"] >= 0
        assert way["job_s"]["median"] > way["window_s"]["median"] >= result["oracles"]["bound_s"] * 0.99
        assert way["way"] in done.stdout
    runs = (tmp_path / "runs.jsonl").read_text()
    again = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=100, check=False)
    assert (tmp_path / "runs.jsonl").read_text() == runs
    assert json.loads(again.stdout.splitlines()[-1])["ways"] == result["ways"]


def make_script(body: str) -> str:
    return f"import json, pathlib, sys, time\ngiven = json.loads(sys.argv[1])\n{body}\n"


SILENT = 'pathlib.Path(given["report"]).write_text(json.dumps({"began_at": 1.0, "ended_at": 2.0, "versions": {}}))'
WRONG = """
import pyarrow as pa, pyarrow.parquet as pq
pathlib.Path(given["output"]).mkdir()
pq.write_table(pa.table({"id": [str(row) for row in range(12)], "text": ["?"] * 12}), given["output"] + "/out.parquet")
"""


def test_a_way_that_fails_hangs_or_answers_wrongly_is_shown_as_such(tmp_path: Path) -> None:
    scripts = tmp_path / "jobs" / "peers"
    scripts.mkdir(parents=True)
    (scripts / "fails.py").write_text(make_script("raise ValueError('no such setting')"))
    (scripts / "hangs.py").write_text(make_script("time.sleep(600)"))
    (scripts / "lies.py").write_text(make_script(WRONG + SILENT))
    (scripts / "silent.py").write_text(make_script(SILENT))
    (scripts / "nowhere_requirements.txt").write_text(f"--no-index\n--find-links {tmp_path}\nno-such-package==1\n")
    ways = [
        Way("fails", "fails.py", "raises"),
        Way("hangs", "hangs.py", "sleeps", timeout_s=2.0),
        Way("lies", "lies.py", "answers wrongly"),
        Way("silent", "silent.py", "writes nothing"),
        Way("homeless", "fails.py", "can't be installed", home="nowhere"),
    ]
    said: list[str] = []
    bench = Bench(Options(tmp_path / "out", scripts, REPO / "tests" / "s3_server.py"), SMALL, said.append)
    with bench.running():
        bench.run_all(ways)
    result = bench.make_result(ways)
    assert [way["failure"] for way in result["ways"]] == [
        "exit code 1: ValueError: no such setting",
        "not done after 2 s",
        "12 rows are missing or wrong",
        "it wrote no output",
        "nowhere_requirements.txt can't be installed (CalledProcessError)",
    ]
    assert [way["saturation"] for way in result["ways"]] == [None] * 5
    assert [way["num_failed"] for way in result["ways"]] == [1] * 5
    # Once more each, and no third time.
    assert all(bench.is_missing(way, 2) for way in ways)
    with bench.running():
        bench.run_all(ways[:1])
    assert not bench.is_missing(ways[0], 3)
    text = make_result_text(result)
    assert all(way["failure"] in text for way in result["ways"])


def test_no_run_begins_when_the_time_is_over(tmp_path: Path) -> None:
    options = Options(tmp_path, PEERS, REPO / "tests" / "s3_server.py", minutes=0.0)
    bench = Bench(options, SMALL, print)
    (way, *_) = make_quick_ways(SMALL)
    with bench.running():
        bench.run_all([way])
    assert bench.is_missing(way, 1)
    assert bench.make_result([way])["ways"][0]["saturation"] is None
