"""What gates ask of output rows, counted: by the worker of the rows of a shard file, which keeps the figures in the file's
footer, and by whoever looks at a file that has none of these rules. Pure: Arrow in, values out.

Duplicates are another matter (`texts`): what repeats may stand in two files.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from batchgen.batches import GateCounts
from batchgen.gates.fit import Test, make_schema_test
from batchgen.spec import JobSpec
from batchgen.specs.patterns import match_any

SMALL = ("status", "finish_reason", "completion_tokens")


@dataclass(frozen=True, slots=True)
class Rules:
    """What is looked for in texts. `refusals` is empty and `schema` None where no gate asks."""

    refusals: tuple[str, ...] = ()
    schema: str | None = None

    @property
    def digest(self) -> str:
        """Figures with the same one are of the same rules."""
        return hashlib.blake2b(json.dumps([self.refusals, self.schema]).encode(), digest_size=8).hexdigest()

    @property
    def columns(self) -> list[str]:
        return [*SMALL, "text"] if self.refusals or self.schema is not None else [*SMALL]


def make_rules(spec: JobSpec) -> Rules:
    """Of both gates together."""
    gates = spec.gates
    wants_refusals = any(gate.max_refusal_rate is not None for gate in gates.gates)
    return Rules(gates.refusals if wants_refusals else (), spec.gate_schema if gates.wants_schema else None)


def make_counter(rules: Rules) -> Callable[[pa.Table], GateCounts]:
    """Counts output rows, of whose columns it needs those of the rules."""
    is_fit = make_schema_test(rules.schema) if rules.schema is not None else None
    digest = rules.digest

    def count(rows: pa.Table) -> GateCounts:
        ok = rows.select(rules.columns).filter(
            pc.equal(rows["status"], "ok")
        )  # Arrow can't filter every passthrough type
        texts = pc.fill_null(ok["text"], "") if "text" in ok.schema.names else None
        return GateCounts(
            rules=digest,
            truncated=pc.sum(pc.equal(ok["finish_reason"], "length")).as_py() or 0,
            tokens=pc.sum(ok["completion_tokens"]).as_py() or 0,
            refused=count_refusals(texts, rules.refusals) if rules.refusals else None,
            unfit=count_misfits(texts, is_fit) if is_fit is not None else None,
        )

    return count


def count_refusals(texts: pa.ChunkedArray, patterns: tuple[str, ...]) -> int:
    return sum(pc.sum(match_any(part, patterns)).as_py() or 0 for part in texts.chunks)


def count_misfits(texts: pa.ChunkedArray, is_fit: Test) -> int:
    """One at a time: a file's may be hundreds of megabytes."""
    return sum(not is_fit(text.as_py()) for part in texts.chunks for text in part)
