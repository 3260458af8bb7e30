"""The world that makes what others reuse: nothing befalls it."""

from batchgen.spec import JobSpec
from batchgen.specs.load import make_spec

from .faults import NO_WEATHER, Weather
from .world import IN, OUT, World


class FirstWorld(World):
    def __init__(self) -> None:
        super().__init__(-1)

    def _make_earlier(self) -> None:
        return None

    def _make_weather(self) -> Weather:
        return NO_WEATHER

    def _make_job(self) -> JobSpec:
        """Of the prompts that other worlds have, every third is missing."""
        for number in range(2):
            self._plant_rows(f"{IN}/part-{number}.parquet", [row % 3 == 2 for row in range(9)], 2)
        return make_spec(
            {
                "input": {"paths": [IN], "custom_id": "key", "passthrough": ["topic"]},
                "prompt": {"column": "prompt"},
                "engine": {"kind": "simulated", "mean_tokens": 12, "sigma": 0.8, "slots": 12, "max_inflight": 12},
                "sampling": {"max_tokens": 40, "n": 2},
                "output": {"path": OUT, "rows_per_shard": 5},
                "cluster": {"workers": {"min": 1, "max": 1}},
                "retry": {"max_error_rate": 1.0},
            }
        )
