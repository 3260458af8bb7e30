"""The questions that the embedded model was trained on and that the demo asks, with their working and their answers.

Everything comes from the given random generator: the same generator, the same questions. Five kinds:

- `sum`, `difference`: of two numbers 0 to 99, never negative. The only kinds it can do without thinking.
- `chain`: 3 to 40 numbers of two digits added and subtracted, none of them twice, each running total of two digits.
- `product`: below 1000, the second factor up to 99; worked as multiples of the first, counting down what is left.
- `gcd`: of two different numbers 1 to 99, worked by taking the smaller from the larger until both are the same.

The lengths of the workings have a long tail, as those of a reasoning model: by draw for chains and products, by nature
for gcds. Whether a question is held out of training is a property of the question, not of a list: see `is_held_out`.
"""

import hashlib
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

PHRASES = {
    "sum": ("What is {a} + {b}?", "Compute {a} + {b}.", "{a} + {b} = ?", "Add {a} and {b}."),
    "difference": ("What is {a} - {b}?", "Compute {a} - {b}.", "{a} - {b} = ?", "Subtract {b} from {a}."),
    "chain": ("What is {a}?", "Compute {a}.", "{a} = ?"),
    "product": ("What is {a} * {b}?", "Compute {a} * {b}.", "{a} * {b} = ?"),
    "gcd": ("What is gcd({a}, {b})?", "Compute gcd({a}, {b}).", "gcd({a}, {b}) = ?"),
}
# How often each kind is asked, in training and in the demo.
CHAT_MIX = {"sum": 0.5, "difference": 0.5}
THINKING_MIX = {"sum": 0.15, "difference": 0.1, "chain": 0.3, "product": 0.2, "gcd": 0.25}
HELD_OUT_ONE_IN = 16
MAX_TERMS = 40
MAX_FACTOR = 99


@dataclass(frozen=True, slots=True)
class Question:
    """`key` names what is asked, whatever the phrasing, and whatever the order of a sum or a gcd."""

    kind: str
    key: str
    text: str
    working: str
    answer: str


def is_held_out(key: str) -> bool:
    """One key in sixteen, for ever the same ones."""
    return hashlib.sha256(key.encode()).digest()[0] % HELD_OUT_ONE_IN == 0


def make_question(rng: random.Random, mix: dict[str, float], *, held_out: bool | None) -> Question:
    """A question of a kind drawn from `mix`: one held out of training (True), one fit for training (False), or any
    (None). In a question fit for training no step of a chain is a held-out sum or difference either."""
    (kind,) = rng.choices(list(mix), list(mix.values()))
    while True:
        question = MAKERS[kind](rng, held_out is False)
        if held_out is None or is_held_out(question.key) == held_out:
            return question


def phrase(rng: random.Random, kind: str, a: object, b: object = "") -> str:
    return rng.choice(PHRASES[kind]).format(a=a, b=b)


def draw_length(rng: random.Random, median: float, most: int) -> int:
    """Lognormal: one in 20 is 4.4 times the median or more."""
    return min(most, max(1, round(rng.lognormvariate(math.log(median), 0.9))))


# ---- sums and differences --------------------------------------------------------------------------------------------


def make_sum(rng: random.Random, _: bool) -> Question:
    a, b = rng.randrange(100), rng.randrange(100)
    return Question("sum", name_step(a, "+", b), phrase(rng, "sum", a, b), f"{a}+{b}={a + b}", str(a + b))


def make_difference(rng: random.Random, _: bool) -> Question:
    b, a = sorted((rng.randrange(100), rng.randrange(100)))
    return Question("difference", name_step(a, "-", b), phrase(rng, "difference", a, b), f"{a}-{b}={a - b}", str(a - b))


def name_step(a: int, sign: str, b: int) -> str:
    """The key of a sum or difference; a + b and b + a are one, or the one would give the other away."""
    return f"{max(a, b)}+{min(a, b)}" if sign == "+" else f"{a}-{b}"


def make_chain(rng: random.Random, avoid: bool) -> Question:
    """`avoid`: no step of the working is a held-out sum or difference."""
    total = rng.randrange(10, 100)
    asked = working = str(total)
    unused = set(range(10, 100)) - {total}
    for _ in range(max(3, draw_length(rng, 6, MAX_TERMS)) - 1):
        sign, number = draw_step(rng, total, unused, avoid)
        unused.discard(number)
        total += number if sign == "+" else -number
        asked += f" {sign} {number}"
        working += f"{sign}{number}={total}"
    return Question("chain", asked, phrase(rng, "chain", asked), working, str(total))


def draw_step(rng: random.Random, total: int, unused: set[int], avoid: bool) -> tuple[str, int]:
    """A sign and an unused number that keep the total within 10 to 99. Each number is there once, so that the one that
    comes next is found by the one before it, and all have two digits, so that it is found at a fixed distance: that is
    what attention does best."""
    fit = [("+", n) for n in sorted(unused) if total + n < 100] + [("-", n) for n in sorted(unused) if total - n > 9]
    while True:
        sign = rng.choice("+-")
        same = [step for step in fit if step[0] == sign] or fit
        step = same[rng.randrange(len(same))]
        if not (avoid and is_held_out(name_step(total, *step))):
            return step


# ---- products and gcds -----------------------------------------------------------------------------------------------


def make_product(rng: random.Random, _: bool) -> Question:
    b = draw_length(rng, 9, MAX_FACTOR)
    a = rng.randint(1, min(MAX_FACTOR, 999 // b))
    # Counting down, the end is seen without a look at the question; counting up, a model went on past it.
    working = " ".join(f"{b - n}:{n * a + a}" for n in range(b))
    return Question("product", f"{a}*{b}", phrase(rng, "product", a, b), working, str(a * b))


def make_gcd(rng: random.Random, _: bool) -> Question:
    a, b = rng.sample(range(1, 100), 2)
    working = "; ".join(f"{x} {y}" for x, y in list_gcd_steps(a, b))
    return Question("gcd", f"gcd {max(a, b)} {min(a, b)}", phrase(rng, "gcd", a, b), working, str(math.gcd(a, b)))


def list_gcd_steps(a: int, b: int) -> Iterator[tuple[int, int]]:
    yield a, b
    while a != b:
        a, b = (a - b, b) if a > b else (a, b - a)
        yield a, b


MAKERS: dict[str, Callable[[random.Random, bool], Question]] = {
    "sum": make_sum,
    "difference": make_difference,
    "chain": make_chain,
    "product": make_product,
    "gcd": make_gcd,
}
