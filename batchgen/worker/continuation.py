"""Between the sender and the engine: rows are asked for in parts, and each goes to the rank that has its beginning.

`Continuation` answers as an engine does; `budget` decides how much to ask for, `placement` where, `seam` makes one answer
of the parts. Whoever sends the requests sees one request and one answer: a part that fails is the request's failure, and
its retry goes on from the parts that were finished, so that it costs at most one part. They are kept in `partials`, which
is journaled: so does a row that another worker had before. `save` keeps what the engine has of a row by now, where it can
say so (`Peeking`), for one that is to be stopped.

Invariants: an answer has no more than the request's max_tokens; while one request is pinned to a rank all are, those of
rows that can't be continued included.
"""

import asyncio
import itertools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from batchgen.engines import get_engine_kind, make_facts
from batchgen.engines.base import Answering, Engine, EngineFacts, Peeking, Tokenizer
from batchgen.errors import RequestFailed
from batchgen.lengths import LengthPrior, list_quantiles
from batchgen.records import Generation, Partial, Request, RowId
from batchgen.spec import JobSpec
from batchgen.worker.budget import (
    MAX_LENGTHS,
    EngineCost,
    Ladder,
    choose_budget,
    choose_ladder,
    list_unresumable,
    make_ladder,
)
from batchgen.worker.partials import Partials
from batchgen.worker.placement import Placer
from batchgen.worker.seam import can_hide_stop, count_undecided, extend, find_seam_stop, join
from batchgen.worker.stops import find_stop

log = logging.getLogger(__name__)

# A prompt, where nothing is known of the job's.
USUAL_PROMPT_TOKENS = 1000
# Of a continued prompt; the last block is never found, and some are gone by then.
REUSE_SHARE = 0.9


class Continuation:
    """See the module. `resumable`: sampling fields that this engine's rows may have in parts, beyond the usual ones.
    `has_hints`: requests' `expected_tokens` are their own, not a mean of many. Belongs to one event loop."""

    def __init__(
        self,
        engine: Engine,
        facts: EngineFacts,
        ladder: Ladder,
        *,
        resumable: frozenset[str] = frozenset(),
        has_hints: bool = False,
        placer: Placer | None = None,
        partials: Partials | None = None,
    ) -> None:
        self._engine, self._facts, self._ladder = engine, facts, ladder
        self._resumable, self._has_hints, self._placer = resumable, has_hints, placer
        self._is_resumable = facts.is_resumable and bool(ladder.rungs)
        self.partials = Partials() if partials is None else partials
        self._numbers = itertools.count()
        self._inflight: dict[RowId, Request] = {}

    @property
    def is_resumable(self) -> bool:
        """Are rows asked for in parts, those that can be?"""
        return self._is_resumable

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._engine.tokenizer

    async def generate(self, request: Request) -> Generation:
        """The whole answer. Raises what the engine does."""
        answer = await self._generate(self._recall(request))
        self.partials.forget(request.row_id)
        return answer

    async def _generate(self, request: Request) -> Generation:
        while True:
            ladder = self._ladder if self._can_continue(request) else Ladder()
            budget = self._choose_budget(request, ladder)
            part, request = await self._ask(request, budget)
            before, left = request.partial, request.sampling.max_tokens - count_done(request)
            if before is None and (part.finish_reason != "length" or budget == left):
                return part
            if part.token_ids is None and before is None:
                self._note_unresumable()
                continue
            stop = request.sampling.stop
            num_kept = None if before is None else find_seam_stop(before, part, stop, self._decode)
            if num_kept is None and budget < left and is_cut_off(part, budget):
                request = replace(request, partial=(partial := extend(before, part)))
                self.partials.note(request.row_id, partial, request.rank)
            elif before is None:
                return part
            else:
                return await self._join(request, before, part, num_kept)

    # ---- one part ----------------------------------------------------------------------------------------------------

    def _can_continue(self, request: Request) -> bool:
        is_tokenised = request.token_ids is not None
        if can_hide_stop(request.sampling.stop, keeps_stop=self._facts.keeps_stop):
            return False
        return self._is_resumable and is_tokenised and not list_unresumable(request.sampling, self._resumable)

    def _choose_budget(self, request: Request, ladder: Ladder) -> int:
        num_prompt, num_done = len(request.token_ids or ()), count_done(request)
        limit = self._facts.max_prompt_tokens
        budget = choose_budget(
            ladder,
            num_prompt=num_prompt,
            num_done=num_done,
            max_tokens=request.sampling.max_tokens,
            max_prompt_tokens=limit,
            expected=request.expected_tokens if self._has_hints else None,
        )
        if request.partial is None or not ladder.rungs:
            return budget
        undecided = count_undecided(request.partial, request.sampling.stop, self._decode)
        fits = limit is None or num_prompt + num_done + undecided <= limit
        return min(budget, undecided) if undecided and fits else budget

    async def _ask(self, request: Request, budget: int) -> tuple[Generation, Request]:
        """(the next part, the request with the rank that had it)."""
        sampling = replace(request.sampling, max_tokens=budget)
        with self._placed(request) as placed:
            self._inflight[request.row_id] = placed
            try:
                part = await self._engine.generate(replace(placed, sampling=sampling))
            finally:
                self._inflight.pop(request.row_id, None)
        return part, placed

    @contextmanager
    def _placed(self, request: Request) -> Iterator[Request]:
        """The request with its rank, in flight there."""
        if self._placer is None or request.token_ids is None:
            yield request
            return
        key, ids, total_tokens = next(self._numbers), request.ids, self._engine.total_tokens
        if request.rank is None:
            request = replace(request, rank=self._placer.place(key, ids, total_tokens))
        else:
            self._placer.place_again(key, request.rank, len(ids), total_tokens)
        try:
            yield request
        finally:
            self._placer.release(key, self._engine.total_tokens)

    # ---- the answer --------------------------------------------------------------------------------------------------

    def _decode(self, token_ids: Sequence[int]) -> str:
        assert self.tokenizer is not None, "an engine that is resumable has one"
        return self.tokenizer.decode(token_ids)

    async def _join(self, request: Request, before: Partial, part: Generation, num_kept: int | None) -> Generation:
        """In a thread: a long answer takes milliseconds to decode."""
        if part.token_ids is None:
            raise RequestFailed("bad_response", "a part of the answer came without the token ids that the others had")
        keeps_stop = self._facts.keeps_stop
        return await asyncio.to_thread(
            join, request, before, part, self._decode, num_kept=num_kept, keeps_stop=keeps_stop
        )

    def _note_unresumable(self) -> None:
        """A server that takes the wish for token ids and gives none: its rows go in one shot from here on."""
        if self._is_resumable:
            log.warning("answers come without token ids and can't be continued; max_tokens is asked for at once")
        self._is_resumable = False

    # ---- between two tries -------------------------------------------------------------------------------------------

    def can_save(self, request: Request) -> bool:
        """Can another engine of this kind go on with what this one has of the row?"""
        return self._can_continue(request)

    def save(self, row_id: RowId) -> None:
        """Keep what the engine has of the row by now. No answer of it may be awaited any more."""
        request = self._inflight.get(row_id)
        part = self._engine.peek(row_id) if isinstance(self._engine, Peeking) and request is not None else None
        if request is None or part is None or not part.token_ids or not self._can_continue(request):
            return
        whole, stop = extend(request.partial, part), request.sampling.stop
        has_ended = len(whole.token_ids) >= request.sampling.max_tokens
        if stop and not has_ended:  # the engine may be about to see that it has
            has_ended = find_stop(self._decode(whole.token_ids), stop) is not None
        if not has_ended:
            self.partials.note(row_id, whole, request.rank)

    def _recall(self, request: Request) -> Request:
        """The request with what was generated for it before, where this engine can go on with that."""
        kept = self.partials.get(request.row_id)
        if kept is None:
            return request
        again = replace(request, partial=kept.partial, rank=kept.rank)
        if kept.is_own or self._can_take_over(again):
            return again
        self.partials.forget(request.row_id)
        return request

    def _can_take_over(self, request: Request) -> bool:
        """Between two runs an engine may be set up in another way."""
        num_done, limit = count_done(request), self._facts.max_prompt_tokens
        fits = limit is None or len(request.token_ids or ()) + num_done <= limit
        return fits and num_done < request.sampling.max_tokens and self._can_continue(request)


def is_cut_off(part: Generation, budget: int) -> bool:
    """Did the part end because no more was asked for? One that is shorter met a limit of the engine's own."""
    num_tokens = max(len(part.token_ids or ()), part.usage.completion_tokens or 0)
    return part.finish_reason == "length" and bool(part.token_ids) and num_tokens >= budget


def count_done(request: Request) -> int:
    return 0 if request.partial is None else len(request.partial.token_ids)


# ---- what the spec asks for ------------------------------------------------------------------------------------------


def make_serving(engine: Engine, spec: JobSpec, prior: LengthPrior | None) -> Answering:
    """What the sender sends to: the open engine itself where neither budgets nor ranks are wanted or to be had."""
    facts, capabilities = make_facts(spec.engine, engine.version), get_engine_kind(spec.engine.kind).capabilities
    ladder = make_job_ladder(spec, facts, prior, engine.max_model_len)
    placer = Placer(facts.num_ranks, max_rows=facts.max_rank_rows) if facts.num_ranks > 1 else None
    if not ladder.rungs and placer is None:
        return engine
    log.info("answers in parts of %s tokens, over %d ranks", ladder.rungs[:1] or "all", facts.num_ranks)
    return Continuation(
        engine,
        facts,
        ladder,
        resumable=capabilities.resumable_fields,
        has_hints=spec.input.length_hint is not None,
        placer=placer,
    )


def make_job_ladder(spec: JobSpec, facts: EngineFacts, prior: LengthPrior | None, max_model_len: int | None) -> Ladder:
    """As `engine.token_budget` says. Rows that bring a max_tokens of their own may bring any."""
    wanted, max_tokens = spec.engine.token_budget, spec.sampling.max_tokens
    if wanted == "off" or not facts.is_resumable:
        return Ladder()
    if spec.prompt.sampling is not None and max_model_len is not None:
        max_tokens = max(max_tokens, max_model_len)
    if wanted != "auto":
        return make_ladder(wanted, max_tokens)
    lengths = list_quantiles(prior, MAX_LENGTHS) if prior is not None else ()
    reuse_share = REUSE_SHARE if facts.has_block_reuse else 0.0
    cost = EngineCost(reuse_share=reuse_share)
    if facts.max_rank_rows is not None:
        cost = replace(cost, max_rows=facts.max_rank_rows)
    return choose_ladder(lengths, num_prompt=USUAL_PROMPT_TOKENS, max_tokens=max_tokens, cost=cost)
