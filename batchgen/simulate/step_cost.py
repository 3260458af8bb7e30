"""What one step of one rank costs, in seconds, by what is in it. Pure; the constants are in `calibration`.

A step decodes one token for each running request and prefills a part of new prompts. Its cost is a sum of physical parts:
a fixed one (kernel launches, communication, reading the weights), the matrix products of each token, and attention: each
query meets each context token that it attends to. DeepSeek-V3.2's sparse attention meets at most `top_k` of them, chosen
by an indexer that scans all. Left out: the padding of batches to CUDA graph sizes, clocks that fall with heat, and what
prefill and decode hide of one another.
"""

from dataclasses import dataclass

# Tokens attended to where attention is dense: more than any context.
DENSE = 1 << 40


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds. `context_s` is of one query and one context token in decode, `prefill_context_s` in prefill; `index_s` and
    `prefill_index_s` the indexer's of the same."""

    fixed_s: float
    token_s: float = 0.0
    context_s: float = 0.0
    prefill_context_s: float = 0.0
    index_s: float = 0.0
    prefill_index_s: float = 0.0
    top_k: int = DENSE

    def decode_s(self, num_rows: int, attended: float, context: float) -> float:
        """Of the decoding rows of one rank, without the fixed part. `attended` sums min(context, top_k) of the rows,
        `context` their contexts."""
        return self.token_s * num_rows + self.context_s * attended + self.index_s * context

    def prefill_s(self, start: int, end: int) -> float:
        """Of the prompt tokens `start` to `end` of one request whose earlier tokens are in the cache."""
        tokens = end - start
        scanned = (end * end - start * start) / 2
        return (
            self.token_s * tokens + self.prefill_context_s * self._attended(start, end) + self.prefill_index_s * scanned
        )

    def _attended(self, start: int, end: int) -> float:
        """Sum of min(i, top_k) over i from start to end."""
        knee = min(max(self.top_k, start), end)
        return (knee * knee - start * start) / 2 + (end - knee) * self.top_k
