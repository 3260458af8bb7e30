"""What befalls a world: chosen by its seed, between its begin and the time when faults end."""

import random
from dataclasses import dataclass

from .store import Rates

CALM = Rates()


@dataclass(frozen=True, slots=True)
class Weather:
    """`strikes`: what strikes, with weights; `pause_s` between two strikes, on average; `until`: when all is calm again."""

    rates: Rates
    strikes: tuple[tuple[str, float], ...]
    pause_s: float
    until: float
    engine_fails: float
    engine_hangs: float
    engine_dies: float
    engine_is_slow: float


NO_WEATHER = Weather(CALM, (), 1.0, 0.0, 0.0, 0.0, 0.0, 0.0)

STRIKES = (
    "kill_worker",
    "freeze_worker",
    "cut_worker_net",
    "cut_worker_store",
    "kill_driver",
    "freeze_driver",
    "cut_driver_store",
    "kill_all",
    "second_driver",
    "ask_to_stop",
)


def make_weather(rng: random.Random) -> Weather:
    """Some worlds meet everything, most a few things often: a fault hides behind another."""

    def some(chance: float, most: float) -> float:
        return rng.uniform(0, most) if rng.random() < chance else 0.0

    strikes = tuple((name, rng.uniform(0.2, 1.0)) for name in STRIKES if rng.random() < 0.45)
    freezes_at = rng.choice(["", "", "/data/", "manifest", "report", "lease/", "journal/", "plan/", "batch_stats"])
    rates = Rates(
        fails=some(0.4, 0.05),
        loses_reply=some(0.4, 0.05),
        is_retried=some(0.5, 0.2),
        kills=some(0.5, 0.02),
        freezes=rng.uniform(0.1, 0.5) if freezes_at else some(0.3, 0.1),
        freezes_at=freezes_at,
        freeze_s=rng.uniform(5, 40),
        is_slow=some(0.4, 0.05),
        slow_s=rng.uniform(2, 25),
        is_stale=some(0.3, 0.3),
        stale_s=rng.uniform(0.5, 10),
    )
    return Weather(
        rates=rates,
        strikes=strikes,
        pause_s=rng.choice([2.0, 5.0, 12.0]),
        until=rng.uniform(20, 120),
        engine_fails=some(0.4, 0.6),
        engine_hangs=some(0.3, 0.03),
        engine_dies=some(0.3, 0.03),
        engine_is_slow=some(0.3, 0.2),
    )


def choose(rng: random.Random, strikes: tuple[tuple[str, float], ...]) -> str:
    return rng.choices([name for name, _ in strikes], [weight for _, weight in strikes])[0]
