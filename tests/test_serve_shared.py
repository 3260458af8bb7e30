"""Engines shared by batches and interactive requests, without Ray: who goes first, what is shown, who is blamed."""

import asyncio
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st

from batchgen.engines.simulated import ByteTokenizer, SimulatedEngine
from batchgen.errors import EngineDied
from batchgen.records import Generation, Request, Result, RowId, Timing, Usage
from batchgen.serve.batch_spec import make_batch_spec
from batchgen.serve.deltas import Delta, Deltas
from batchgen.serve.engine_actor import EngineActor
from batchgen.serve.errors import ApiError
from batchgen.serve.host import EngineHost
from batchgen.serve.interactive import Ask, Interactive
from batchgen.serve.interpreter import SWITCH_MEMORY_S, SWITCH_S, Switching
from batchgen.serve.places import Places
from batchgen.serve.room import MEMORY_S, Peak, count_bulk_room
from batchgen.serve.spec import ServedModel
from batchgen.specs.engine import SimulatedEngineSpec
from batchgen.storage import Storage
from batchgen.worker.setup import WorkerSetup

SIMULATED = {"kind": "simulated", "mean_tokens": 20, "decode_tokens_per_s": 400, "slots": 4, "max_inflight": 4}


# ---- the policy


def test_bulk_fills_an_engine_that_serves_urgent_requests_first() -> None:
    assert count_bulk_room(64, 30, Peak(30, 0.0), 0.0, has_urgency=True) == 64


def test_elsewhere_places_stay_free_for_as_many_as_came_lately() -> None:
    peak = Peak().note(1, 0.0).note(9, 1.0).note(2, 2.0)
    assert count_bulk_room(64, 2, peak, 2.0, has_urgency=False) == 55
    assert count_bulk_room(64, 2, peak, 2.0 + MEMORY_S, has_urgency=False) == 62
    assert count_bulk_room(64, 0, Peak(), 0.0, has_urgency=False) == 64
    assert count_bulk_room(64, 500, Peak(500, 0.0), 0.0, has_urgency=False) == 6


# ---- places


def test_the_first_deadline_goes_first_and_the_others_get_what_it_leaves() -> None:
    places = Places(2, 10, has_urgency=True)
    late, early = places.join(200.0), places.join(100.0)
    called: list[str] = []
    late.on_room, early.on_room = lambda: called.append("late"), lambda: called.append("early")
    for _ in range(2):
        assert late.fits(1)
        late.enter(1)
    assert not early.fits(1)
    late.leave(1)
    assert called[0] == "early"
    assert not late.fits(1)  # there is room, and the earlier one wants it
    assert early.fits(1)
    early.enter(1)
    assert not early.fits(1)
    places.leave(early)
    assert late.fits(1)


def test_a_worker_that_drains_holds_up_nobody() -> None:
    places = Places(2, 10, has_urgency=True)
    late, early = places.join(200.0), places.join(100.0)
    called: list[str] = []
    late.on_room = lambda: called.append("late")
    for _ in range(2):
        late.enter(1)
    assert not early.fits(1)
    late.leave(1)
    assert not late.fits(1)
    early.rest()
    assert called == ["late"]
    assert late.fits(1)


@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), max_size=60))
def test_no_place_stays_free_while_somebody_wants_it(steps: list[tuple[int, bool]]) -> None:
    """Workers that always want more: after every step all places are taken, and never more."""
    places = Places(3, 10, has_urgency=True)
    windows = [places.join(deadline) for deadline in (3.0, 1.0, 2.0)]

    def fill(window: Any) -> Callable[[], None]:
        def take() -> None:
            while window.fits(1):
                window.enter(1)

        return take

    for window in windows:
        window.on_room = fill(window)
    fill(windows[0])()
    for number, _ in steps:
        if windows[number].num_rows:
            windows[number].leave(1)
        fill(windows[number])()
        assert places.num_bulk == 3


def test_too_many_interactive_requests_are_refused() -> None:
    async def main() -> None:
        places = Places(2, 1, has_urgency=True)
        async with places.urgent():
            with pytest.raises(ApiError) as caught:
                async with places.urgent():
                    pass
        assert (caught.value.status, caught.value.retry_after_s) == (429, 2)

    asyncio.run(main())


def test_suspected_rows_are_tried_with_nothing_else_on_the_engine() -> None:
    async def main() -> None:
        places = Places(8, 8, has_urgency=True)
        trier, other = places.join(2.0), places.join(1.0)
        assert other.fits(1)
        other.enter(1)
        with trier.apart():
            assert not trier.is_alone
            urgent = places.urgent()
            asked = asyncio.ensure_future(urgent.__aenter__())
            await asyncio.sleep(0)
            other.leave(1)
            assert not other.fits(1)
            assert trier.is_alone
            assert not asked.done()
        await asked
        await urgent.__aexit__(None, None, None)
        assert other.fits(1)

    asyncio.run(main())


def test_threads_take_turns_often_only_while_interactive_requests_come() -> None:
    now, usual = [0.0], sys.getswitchinterval()
    intervals: list[float] = []
    switching = Switching(lambda: now[0], intervals.append)
    switching.look(0)
    switching.note()
    switching.note()
    assert intervals == [SWITCH_S]
    now[0] = SWITCH_MEMORY_S + 1
    switching.look(1)  # one is still here
    assert intervals == [SWITCH_S]
    switching.look(0)
    switching.look(0)
    assert intervals == [SWITCH_S, usual]
    switching.note()
    assert intervals == [SWITCH_S, usual, SWITCH_S]


def test_a_tokenizer_needs_no_torch_and_leaves_it_to_others() -> None:
    """In a process of its own, where nothing else has loaded it."""
    code = """
import sys
from batchgen.engines.hf_tokenizer import HFTokenizer
from batchgen.serve.interpreter import hiding_torch
from batchgen.spec import ModelSpec
chat = ({"role": "user", "content": "30 + 12 = ?"},)
with hiding_torch():
    ids = HFTokenizer(ModelSpec()).encode_chat(chat, thinking=False)
assert "torch" not in sys.modules
import torch
with hiding_torch():
    assert HFTokenizer(ModelSpec()).encode_chat(chat, thinking=False) == ids
assert sys.modules["torch"] is torch and len(ids) > 5
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")


# ---- text as it grows


@given(st.text(max_size=40), st.integers(1, 7), st.booleans())
def test_all_pieces_together_are_the_answer(text: str, size: int, thinking: bool) -> None:
    tokenizer = ByteTokenizer()
    whole = ("thought " + text + "</think>" + text) if thinking else text + "STOP"
    final = whole if thinking else text.partition("STOP")[0]
    parsed = tokenizer.parse(final, thinking=thinking)
    stop = () if thinking else ("STOP",)

    deltas = Deltas(0, tokenizer.decode, "</think>" if thinking else None, stop)
    ids = tokenizer.encode(whole)
    pieces = [deltas.add(ids[start : start + size]) for start in range(0, len(ids), size)]
    generation = Generation(final, tuple(ids), "stop", Usage())
    pieces.append(deltas.finish(Result(RowId("", 0, 0), 1, Timing(), generation, None, parsed.text, parsed.reasoning)))
    assert "".join(piece.text for piece in pieces if piece) == parsed.text
    assert "".join(piece.reasoning for piece in pieces if piece) == (parsed.reasoning or "")


# ---- a host


def use(work: Callable[[EngineHost], Awaitable[None]], **engine: Any) -> None:
    async def main() -> None:
        host = EngineHost(ServedModel.model_validate({"engine": SIMULATED | engine}), "node")
        await host.open()
        try:
            await work(host)
        finally:
            await host.close()

    asyncio.run(main())


def make_ask(*texts: str, sampling: str | None = None) -> Ask:
    rows = tuple({"prompt": text, "sampling": sampling, "tools": None} for text in texts)
    return Ask("text", rows, False)


def test_the_same_request_is_answered_alike_whole_and_in_pieces() -> None:
    async def work(host: EngineHost) -> None:
        ask = make_ask("one", "two", sampling='{"seed": 3}')
        whole = await host.answer(ask)
        news = [each async for each in host.stream(ask)]
        for number, result in enumerate(whole):
            pieces = [each for each in news if isinstance(each, Delta) and each.row == number]
            assert len(pieces) > 1
            assert "".join(piece.text for piece in pieces) == result.text
        assert sum(isinstance(each, Result) for each in news) == 2

    use(work, decode_tokens_per_s=80)


class Noting(SimulatedEngine):
    """Notes who was urgent."""

    def __init__(self, spec: SimulatedEngineSpec) -> None:
        super().__init__(spec)
        self.urgent: list[bool] = []

    async def generate(self, request: Request) -> Generation:
        self.urgent.append(request.is_urgent)
        return await super().generate(request)


def test_a_list_of_prompts_goes_with_bulk() -> None:
    served = ServedModel.model_validate({"engine": SIMULATED})
    assert isinstance(served.engine, SimulatedEngineSpec)
    engine = Noting(served.engine)

    async def main() -> None:
        await engine.open()
        interactive = Interactive(served, engine)
        await interactive.answer(make_ask("one"))
        assert len(await interactive.answer(replace(make_ask("one", "two"), is_bulk=True))) == 2
        await engine.close()

    asyncio.run(main())
    assert engine.urgent == [True, False, False]


def test_a_bad_row_is_its_own_failure_and_a_dead_engine_is_everybodys() -> None:
    async def work(host: EngineHost) -> None:
        bad, good = await host.answer(make_ask("refuse me", "fine"))
        assert bad.failure is not None
        assert good.generation is not None
        with pytest.raises(Exception, match="die_text"):
            await host.answer(make_ask("die now"))
        assert host.make_report().death is not None
        with pytest.raises(Exception, match="die_text"):
            await host.answer(make_ask("fine"))

    use(work, reject_text="refuse", die_text="die now")


def test_a_stream_that_is_left_leaves_nothing_behind() -> None:
    async def work(host: EngineHost) -> None:
        stream = host.stream(make_ask("one"))
        await anext(stream)
        await stream.aclose()
        assert host.make_report().num_urgent == 0

    use(work, decode_tokens_per_s=50)


def test_a_worker_that_is_let_go_while_the_engine_loads_does_not_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "node"))
    served = ServedModel.model_validate({"engine": SIMULATED})
    spec = make_batch_spec(served, "text", input_url=str(tmp_path / "in"), out_url=str(tmp_path / "out"))
    setup = WorkerSetup("w1", spec, 1, Storage(spec.output.path), pa.schema([]))

    async def main() -> None:
        actor = EngineActor(served, "identity")
        opening = asyncio.ensure_future(actor.open())
        await asyncio.sleep(0)
        attached = asyncio.ensure_future(actor.attach("run", setup, 1.0))
        await asyncio.sleep(0)
        assert await actor.detach("run") == "unknown"
        await opening
        with pytest.raises(EngineDied, match="let go"):
            await attached
        assert (await actor.report()).num_workers == 0
        assert (await actor.attach("next", setup, 1.0)).worker_id
        assert (await actor.report()).num_workers == 1
        assert await actor.detach("next") == "idle"

    asyncio.run(main())
