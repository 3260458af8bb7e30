"""What a request asks, as 16 bytes: two requests with one fingerprint may have one answer. Pure.

Into it goes, and nothing else:

- the model: `model.path` and `model.revision` as the spec names them, and the engine section's own `fingerprint_fields`;
- the rendered prompt: the token ids that are sent, chat template, system message, tools and truncation included; for an
  engine that renders itself the prompt as it is sent (text, messages and tools, or ids);
- whether the answer may call tools, for it is then read differently;
- sampling as resolved for the request: the job's, the row's own, `max_tokens` as the context leaves room for; the job's
  seed, not the one that is made of it and the row's place: a row that moved is the same row;
- the sample index, so that n answers of one prompt stay n answers.

Greedy sampling (temperature 0) draws nothing: top_p, top_k, min_p, seed and sample index are then left out. Not in it:
where the row stands, its key, the columns copied, engine tuning, the engine's version, and what lies at `model.path`:
other weights under an old name look the same.
"""

import hashlib
import json
from array import array
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache

from batchgen.records import Prompt, SamplingParams
from batchgen.spec import JobSpec

VERSION = 1
NUM_BYTES = 16
# Of no effect where the likeliest token is always taken.
DRAWING = ("top_p", "top_k", "min_p", "seed")


def is_greedy(sampling: SamplingParams) -> bool:
    """Does the same request have the same answer, as far as the engine's arithmetic allows?"""
    return sampling.temperature == 0


def may_copy(spec: JobSpec) -> bool:
    """May a row of the job have a copy of another's answer?"""
    policy, may_be_greedy = spec.input.duplicates, spec.sampling.temperature == 0 or spec.prompt.sampling is not None
    return spec.output.row_fingerprints and (policy == "copy" or (policy == "auto" and may_be_greedy))


class Fingerprinter:
    """Of the requests of one job. Thread-safe."""

    def __init__(self, spec: JobSpec) -> None:
        fields = {
            "version": VERSION,
            "model": {"path": spec.model.path, "revision": spec.model.revision},
            "engine": spec.engine.fingerprint_fields(),
        }
        self._job = hashlib.blake2b(_dump(fields), digest_size=NUM_BYTES)

    def make(
        self,
        token_ids: Sequence[int] | None,
        prompt: Prompt,
        sampling: SamplingParams,
        n: int,
    ) -> list[bytes]:
        """Of the n samples of one row. `token_ids`: the rendered prompt where it is rendered here. `sampling`: with the
        job's seed."""
        row = self._job.copy()
        row.update(_digest_sampling(sampling))
        # Of fixed length all of it, so that no two rows make the same bytes; the prompt, of any length, comes last.
        row.update((b"\1" if prompt.tools is not None else b"\0") + (b"p" if token_ids is None else b"i"))
        row.update(_write_prompt(prompt) if token_ids is None else array("I", token_ids))
        if n == 1:
            row.update(b"\0\0\0\0")
            return [row.digest()]
        places = [0] * n if is_greedy(sampling) else range(n)
        return [_add(row, place) for place in places]


def _add(row: hashlib.blake2b, sample_index: int) -> bytes:
    sample = row.copy()
    sample.update(sample_index.to_bytes(4, "little"))
    return sample.digest()


# Most jobs have one for all of their rows.
@lru_cache(maxsize=256)
def _digest_sampling(sampling: SamplingParams) -> bytes:
    left_out = DRAWING if is_greedy(sampling) else ()
    fields = {name: value for name, value in asdict(sampling).items() if name not in left_out}
    return hashlib.blake2b(_dump(fields), digest_size=NUM_BYTES).digest()


def _write_prompt(prompt: Prompt) -> bytes:
    """Keys in their own order: a template may show them in it."""
    parts = [prompt.text, prompt.messages, prompt.token_ids, prompt.tools]
    return json.dumps(parts, ensure_ascii=False, default=str).encode()


def _dump(fields: dict[str, object]) -> bytes:
    return json.dumps(fields, sort_keys=True, ensure_ascii=True).encode()
