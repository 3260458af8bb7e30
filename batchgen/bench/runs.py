"""What one run of one way gave, as a value, and that value as a line of text. Pure."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True, slots=True)
class Run:
    """Unknown is None. `load` is the machine's load average before it began, `max_inflight` the most that the server saw,
    `num_again` rows that it was sent more than once."""

    way: str
    kind: str
    key: str
    num_rows: int
    failure: str | None = None
    num_right: int | None = None
    saturation: float | None = None
    window_s: float | None = None
    max_inflight: int | None = None
    num_again: int | None = None
    job_s: float | None = None
    before_s: float | None = None
    after_s: float | None = None
    cpu_s: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str | None] = field(default_factory=dict)
    load: float | None = None


def dump_run(run: Run) -> str:
    return json.dumps(asdict(run))


def load_run(line: str) -> Run:
    return Run(**json.loads(line))
