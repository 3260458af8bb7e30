"""The rows of the benchmark and what the engine does with each: all of it follows from the row's number. Pure.

A row holds a slot of the server for a lognormal time and is answered with a text of its own, so that every way of running
the rows meets the same service times in whatever order it sends them, and its output can be checked row by row. Standard
library only: a peer's process imports it from an environment without ours.
"""

import hashlib
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

# What the server says it decoded, so that lengths and times say the same.
TOKENS_PER_S = 100.0
PROMPT = re.compile(r"row (\d+):")


@dataclass(frozen=True, slots=True)
class Workload:
    """`mean_s` and `sigma` are of the lognormal service time. In the input every row's exact length stands beside it as
    a hint, and another row's as a useless one."""

    num_rows: int = 3_000
    slots: int = 64
    mean_s: float = 0.5
    sigma: float = 0.8
    seed: int = 7
    rows_per_file: int = 125

    def find_service_s(self, row: int) -> float:
        """How long the row holds a slot (s)."""
        drawn = random.Random(f"{self.seed}:{row}").lognormvariate(0.0, self.sigma)
        return self.mean_s * drawn / math.exp(self.sigma * self.sigma / 2)

    def list_services_s(self) -> list[float]:
        return [self.find_service_s(row) for row in range(self.num_rows)]

    def list_useless_hints_s(self) -> list[float]:
        """The same lengths, dealt out to other rows."""
        return random.Random(self.seed).sample(self.list_services_s(), self.num_rows)


def count_tokens(service_s: float) -> int:
    return max(1, round(service_s * TOKENS_PER_S))


def make_prompt(row: int) -> str:
    return f"row {row}: say something about {hashlib.blake2b(str(row).encode(), digest_size=24).hexdigest()}"


def parse_row(prompt: str) -> int:
    """The number of the row that this is the prompt of. Raises ValueError."""
    found = PROMPT.match(prompt)
    if found is None:
        raise ValueError("not a prompt of this benchmark")
    return int(found[1])


def make_text(row: int) -> str:
    """What the server answers."""
    words = [hashlib.blake2b(f"{row}/{number}".encode(), digest_size=4).hexdigest() for number in range(20)]
    return f"of row {row}: {' '.join(words)}"


def count_right(answers: Sequence[tuple[str, str | None]], num_rows: int) -> int:
    """Rows that are there once, with their own text. `answers`: (id, text) of every output row."""
    expected = {str(row): make_text(row) for row in range(num_rows)}
    seen: dict[str, int] = {}
    for row_id, _ in answers:
        seen[row_id] = seen.get(row_id, 0) + 1
    return sum(seen[row_id] == 1 and expected.get(row_id) == text for row_id, text in answers)
