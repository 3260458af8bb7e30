"""Trials of suspected rows that end otherwise than by being given back: the queue and the inquiry, without workers."""

from pathlib import Path

from makers import make_job_spec, make_shard, make_worker_info

from batchgen.journal import JournalIndex
from batchgen.queue.inquiry import Inquiry
from batchgen.queue.suspects import accuse
from batchgen.queue.trial_queue import TrialQueue
from batchgen.queue.work_queue import QueuedShard
from batchgen.storage import Storage


def test_a_trial_ends_when_its_shards_turn_out_to_be_committed(tmp_path: Path) -> None:
    """By a worker that was taken for dead and lived. The trial's lease ends by the file that it finds, and its worker gets
    other work: it would wait apart for ever."""
    spec = make_job_spec(output={"path": str(tmp_path / "out")})
    shards = [QueuedShard(make_shard(number)) for number in range(3)]
    queue = TrialQueue(shards, epoch=1, retry=spec.retry, cluster=spec.cluster)
    inquiry = Inquiry(Storage(spec.output.path), spec, queue, JournalIndex(), print)
    suspected = [(0, ((0, 1),)), (1, ((0, 1),))]
    # One group for each half: the second one is tried when the first is done with.
    inquiry.state = accuse(inquiry.state, suspected, max_group=1, now=0.0)
    queue.hold(inquiry.state.shards)
    queue.add_worker(make_worker_info("w1"), 0.0)
    for number in (0, 1):
        (lease,) = inquiry.lend(0.0, num_starting=0)
        assert (lease.shard.number, lease.only) == (number, ((0, 1),))
        assert queue.lease_next(0.0) is None, "nothing beside suspects"
        assert queue.complete("w1", lease.batch_id, number)
        inquiry.note_committed(number)
        inquiry.note_returned("w1", lease.batch_id)
        assert not inquiry.is_trying("w1")
    assert inquiry.state.groups == ()
    last = queue.lease_next(0.0)
    assert last is not None
    assert (last.shard.number, last.worker_id) == (2, "w1")


def test_of_a_trial_over_two_shards_the_other_goes_on(tmp_path: Path) -> None:
    spec = make_job_spec(output={"path": str(tmp_path / "out")})
    shards = [QueuedShard(make_shard(number)) for number in range(4)]
    queue = TrialQueue(shards, epoch=1, retry=spec.retry, cluster=spec.cluster)
    inquiry = Inquiry(Storage(spec.output.path), spec, queue, JournalIndex(), print)
    inquiry.state = accuse(inquiry.state, [(number, ((0, 1),)) for number in range(4)], max_group=8, now=0.0)
    queue.hold(inquiry.state.shards)
    queue.add_worker(make_worker_info("w1"), 0.0)
    first, second = inquiry.lend(0.0, num_starting=0)
    queue.complete("w1", first.batch_id, first.shard.number)
    inquiry.note_committed(first.shard.number)
    inquiry.note_returned("w1", first.batch_id)
    assert inquiry.is_trying("w1")
    assert inquiry.lend(0.0, num_starting=0) == []
    queue.give_back("w1", second.batch_id, 0.0, "its rows are journaled")
    inquiry.note_returned("w1", second.batch_id)
    assert [lease.shard.number for lease in inquiry.lend(0.0, num_starting=0)] == [2, 3]
