"""The process that holds ingress and conductor is killed with SIGKILL, again and again, in the middle of batches.

Nothing is lost, nothing is there twice, and every batch ends with all of its requests accounted for. The engine's own
call log beside the store says that nothing was generated again but what a kill met in flight or not yet journaled.
"""

import random
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import openai
import pytest
from serve_ledger import Ledger, wait_for_calls
from serve_process import TERMINAL, Server, create, make_endpoint_tree, make_line, read_lines, upload, wait_over

from batchgen.engines.simulated import read_calls
from batchgen.serve.state import State
from batchgen.storage import Storage
from batchgen.verify.verify import verify

NUM_ROWS = 240
# Four rows in a fifth of a second: a batch takes some seconds, so kills meet it in every state.
ENGINE = {
    "kind": "simulated",
    "slots": 8,
    "max_inflight": 12,
    "sigma": 0,
    "mean_tokens": 10,
    "decode_tokens_per_s": 100,
}


def run_with_kills(tmp_path: Path, gaps: list[int], num_rows: int) -> None:
    """`gaps`: calls of engines before each kill, so that it meets the batches at work however fast the machine is."""
    tree = make_endpoint_tree(str(tmp_path / "store"))
    calls = str(tmp_path / "calls")
    tree["models"]["killed"] = {**tree["models"]["slow"], "engine": {**ENGINE, "call_log": calls}}
    server = Server(tmp_path / "endpoint", tree)
    ledger = Ledger(State(tree["store"]), calls, "acme")
    server.start()
    try:
        client = server.client(max_retries=0)
        lines = [make_line(f"r{number}", model="killed") for number in range(num_rows)]
        batches = [create(client, lines).id, create(client, [*lines[:50], b"no json"]).id]
        ledger.batch_ids = batches
        for gap in gaps:
            wait_for_calls(calls, gap)
            server.kill()
            ledger.note()
            server.start()
            client = server.client(max_retries=0)
            if len(batches) < 4:
                batches.append(create(client, lines[:60]).id)
        done = {id_: wait_over(client, id_, 300) for id_ in batches}
        assert [batch.status for batch in done.values()] == ["completed", "failed", *["completed"] * (len(done) - 2)]
        for number, batch in enumerate(done.values()):
            check_whole(client, server, batch, {0: num_rows, 1: 0}.get(number, 60))
        num_again = ledger.check(num_rows + 60 * (len(done) - 2))
        print(
            f"{len(gaps)} kills, {num_rows} rows in one batch: {num_again} generated again; safe at {ledger.num_safe}"
        )
        assert ledger.num_safe[-1] > 0
        check_nothing_is_left(server)
    finally:
        server.stop()


def check_whole(client: openai.OpenAI, server: Server, batch: openai.types.Batch, num_rows: int) -> None:
    assert batch.request_counts is not None
    assert (batch.request_counts.completed, batch.request_counts.failed) == (num_rows, 0)
    assert set(read_lines(client, batch.output_file_id)) == {f"r{number}" for number in range(num_rows)}
    if num_rows:
        verdict = verify(Storage(State(server.tree["store"]).job_url("acme", batch.id)))
        assert verdict.findings == []


def check_nothing_is_left(server: Server) -> None:
    """No batch waits for ever. (The sign of one that never came to its record stays for an hour.)"""
    end = time.monotonic() + 20
    state = State(server.tree["store"])
    while any(state.read_batch(*place) for place in state.list_open()):
        assert time.monotonic() < end
        time.sleep(0.1)


def test_three_kills_lose_nothing_and_repeat_only_what_was_not_safe(tmp_path: Path) -> None:
    run_with_kills(tmp_path, [60, 0, 70], NUM_ROWS)


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_twenty_kills_lose_nothing(tmp_path: Path) -> None:
    rng = random.Random(2)
    run_with_kills(tmp_path, [rng.randint(0, 240) for _ in range(20)], 4500)


@pytest.mark.parametrize("path", ["t/acme/batches", "open/acme", "t/acme/content", "t/acme/inputs", "claims"])
def test_a_kill_as_soon_as_something_was_written(tmp_path: Path, path: str) -> None:
    """Right after the first object of each kind, wherever that leaves the batch."""
    server = Server(tmp_path / "endpoint", make_endpoint_tree(str(tmp_path / "store")))
    server.start()
    try:
        client = server.client()
        file_id = upload(client, b"").id  # so that t/acme is there
        folder = tmp_path / "store" / path
        before = set(folder.rglob("*")) if folder.exists() else set()
        batch_id = create_while_watching(server, folder, before)
        server.kill()
        server.start()
        client = server.client()
        listed = [batch.id for batch in client.batches.list(limit=100)]
        if batch_id is None:
            again = create(client, [make_line("a")]).id
            listed.append(again)
        for id_ in {*listed, *([batch_id] if batch_id else [])}:
            assert wait_over(client, id_).status == "completed"
        assert client.files.retrieve(file_id).id == file_id
        check_nothing_is_left(server)
    finally:
        server.stop()


def create_while_watching(server: Server, folder: Path, before: set[Path]) -> str | None:
    """The batch's id, where the reply came before the first new object was seen."""
    made: list[str] = []

    def ask() -> None:
        try:
            made.append(create(server.client(), [make_line("a")]).id)
        except (openai.APIConnectionError, httpx.TransportError):
            return  # killed in the middle of it

    asker = threading.Thread(target=ask)
    asker.start()
    end = time.monotonic() + 20
    while not (folder.exists() and set(folder.rglob("*")) - before):
        assert time.monotonic() < end
    server.kill()
    asker.join()
    return made[0] if made else None


def test_a_signal_drains_and_the_batch_goes_on(tmp_path: Path) -> None:
    server = Server(tmp_path / "endpoint", make_endpoint_tree(str(tmp_path / "store")))
    server.start()
    try:
        client = server.client()
        batch = create(client, [make_line(f"r{number}", model="slow") for number in range(32)])
        while (counts := client.batches.retrieve(batch.id).request_counts) is None or counts.completed < 8:
            time.sleep(0.1)
        server.stop()
        server.start()
        known = server.client().batches.retrieve(batch.id)
        assert known.status not in TERMINAL
        assert wait_over(server.client(), batch.id).status == "completed"
    finally:
        server.stop()


def test_two_conductors_share_the_batches_and_run_none_twice(tmp_path: Path) -> None:
    """Two whole endpoints on one store."""
    tree = make_endpoint_tree(str(tmp_path / "store"))
    tree["models"]["slow"]["engine"] = {**ENGINE, "call_log": str(tmp_path / "calls")}
    (tmp_path / "calls").mkdir()
    one = Server(tmp_path / "one", tree)
    two = Server(tmp_path / "two", tree)
    try:
        one.start()
        two.start()
        client = one.client()
        lines = [make_line(f"r{number}", model="slow") for number in range(40)]
        batches = [create(client, lines).id for _ in range(6)]
        for id_ in batches:
            assert wait_over(client, id_).status == "completed"
        calls = Counter(call[:3] for call in read_calls(str(tmp_path / "calls")))
        assert set(calls.values()) == {1}
        assert len(calls) == 6 * 40
    finally:
        one.stop()
        two.stop()
