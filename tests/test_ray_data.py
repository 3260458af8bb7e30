"""The stage for Ray Data: one window over all batches, answers in order, failures as rows; and in a real pipeline."""

import asyncio
import subprocess
import sys
from typing import Any

import pyarrow as pa
import pytest
from ray_cluster import RayCluster

from batchgen.engines.simulated import SimulatedEngine
from batchgen.errors import EngineDied, SpecError
from batchgen.ray_data import Generate

SIMULATED = {"kind": "simulated", "length": "max_tokens", "decode_tokens_per_s": 100, "slots": 8, "max_inflight": 8}


async def answer(stage: Generate, batch: pa.Table) -> pa.Table:
    return pa.concat_tables([table async for table in stage(batch)])


def make_batch(prompts: list[str | None], tokens: int = 2, first: int = 0) -> pa.Table:
    sampling = [f'{{"max_tokens": {tokens}}}'] * len(prompts)
    ids = range(first, first + len(prompts))
    return pa.table({"id": list(ids), "prompt": pa.array(prompts, pa.string()), "sampling": sampling})


PROMPT = {"column": "prompt", "sampling": "sampling"}


def test_a_slow_batch_does_not_hold_the_next_ones_up() -> None:
    """Eight slots, one row that takes 2 s: twenty batches go by beside it, through one window."""

    async def main() -> list[str]:
        stage, ended = Generate(SIMULATED, prompt=PROMPT), []

        async def one(name: str, batch: pa.Table) -> None:
            await answer(stage, batch)
            ended.append(name)

        slow = asyncio.ensure_future(one("slow", make_batch(["slow"], tokens=200)))
        for number in range(20):
            await one(f"quick-{number}", make_batch(["a", "b", "c"]))
        await slow
        await stage.close()
        return ended

    assert asyncio.run(main()) == [*(f"quick-{number}" for number in range(20)), "slow"]


def test_answers_come_in_order_with_the_rows_columns_and_failures_as_rows() -> None:
    async def main() -> list[dict[str, Any]]:
        stage = Generate(SIMULATED, prompt=PROMPT, sampling={"n": 2})
        first, empty = await answer(stage, make_batch(["a", None, "c"])), await answer(stage, make_batch([]))
        assert empty.num_rows == 0
        assert empty.schema.names == first.schema.names
        await stage.close()
        await stage.close()
        return first.to_pylist()

    rows = asyncio.run(main())
    assert [(row["id"], row["sample_index"]) for row in rows] == [(i, s) for i in range(3) for s in range(2)]
    assert [row["error_type"] for row in rows] == [None, None, "null_prompt", "null_prompt", None, None]
    assert [row["completion_tokens"] for row in rows] == [2, 2, None, None, 2, 2]


def test_an_engine_that_starts_anew_gets_its_rows_again_and_a_dead_one_fails_the_batch() -> None:
    async def main(death: str) -> list[dict[str, Any]]:
        stage = Generate({**SIMULATED, "die_text": "boom", "death": death}, prompt=PROMPT, retry={"max_attempts": 2})
        answers = await answer(stage, make_batch(["a", "boom", "c"], tokens=20))
        await stage.close()
        return answers.to_pylist()

    rows = asyncio.run(main("restart"))
    assert rows[1]["error_type"] == "engine_restarted"
    assert [row["id"] for row in rows] == [0, 1, 2]
    with pytest.raises(EngineDied):
        asyncio.run(asyncio.wait_for(main("engine"), 60))


def test_an_engine_that_does_not_open_is_closed_and_tried_anew_by_the_next_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[str] = []

    class Failing(SimulatedEngine):
        async def open(self) -> None:
            done.append("open")
            if len(done) == 1:
                raise EngineDied("its server came up half")
            await super().open()

        async def close(self) -> None:
            done.append("close")
            await super().close()

    async def main() -> int:
        stage = Generate(SIMULATED, prompt=PROMPT)
        with pytest.raises(EngineDied, match="came up half"):
            await answer(stage, make_batch(["a"]))
        answers = await answer(stage, make_batch(["a"]))
        await stage.close()
        return int(answers.num_rows)

    monkeypatch.setattr("batchgen.ray_data.create_engine", lambda spec: Failing(spec.engine))
    assert asyncio.run(main()) == 1
    assert done == ["open", "close", "open", "close"]


def test_what_cannot_work_is_refused_with_the_mend() -> None:
    with pytest.raises(SpecError, match=r"Generate: engine\.slot: unknown field; did you mean 'slots'"):
        Generate({"kind": "simulated", "slot": 1})
    with pytest.raises(SpecError, match="logprobs"):
        Generate({"kind": "simulated"}, sampling={"logprobs": 1})

    async def main(batch: Any) -> None:
        await answer(Generate(SIMULATED), batch)

    with pytest.raises(SpecError, match="no column 'prompt'"):
        asyncio.run(main(pa.table({"q": ["a"]})))
    with pytest.raises(SpecError, match="'text', which is ours too; rename"):
        asyncio.run(main(pa.table({"prompt": ["a"], "text": ["b"]})))
    with pytest.raises(SpecError, match="batch_format='pyarrow'"):
        asyncio.run(main({"prompt": ["a"]}))


PIPELINE = """
import ray
from batchgen.ray_data import Generate
ray.init(log_to_driver=False)
ray.data.DataContext.get_current().enable_progress_bars = False
ds = ray.data.range(200, override_num_blocks=4).map(lambda row: {"id": row["id"], "prompt": f"row {row['id']}"})
ds = ds.map_batches(
    Generate,
    fn_constructor_kwargs={"engine": {"kind": "simulated", "mean_tokens": 5, "decode_tokens_per_s": 500}},
    batch_format="pyarrow", batch_size=16, concurrency=1,
)
rows = ds.take_all()
assert sorted(row["id"] for row in rows) == list(range(200)), len(rows)
assert all(row["text"] and row["status"] == "ok" for row in rows)
print("rows", len(rows))
"""


@pytest.mark.ray
def test_in_a_real_ray_data_pipeline(cluster: RayCluster) -> None:
    env = {**cluster.env, "RAY_ADDRESS": cluster.address}
    done = subprocess.run([sys.executable, "-c", PIPELINE], env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "rows 200"
