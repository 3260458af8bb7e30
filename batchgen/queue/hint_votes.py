"""Does the order of shards go by the length hints? What most workers say that have seen enough answers. Pure.

Each worker holds the hints of its own rows against their answers (`worker.hint_check`). Which files those rows are of is
chance, so one worker that saw noise says little of the others' rows: most decide, and as long as they are divided it
stays as it was.
"""


class HintVotes:
    """`is_followed` begins as it is given: what is thought of the hints before anybody has seen an answer."""

    def __init__(self, *, is_followed: bool) -> None:
        self.is_followed = is_followed
        self._votes: dict[str, bool] = {}
        self._num_for = 0

    def hear(self, worker_id: str, are_useful: bool | None) -> None:
        """What a worker says now; None where it has seen too little, or nothing new."""
        if are_useful is None or self._votes.get(worker_id) == are_useful:
            return
        self.forget(worker_id)
        self._votes[worker_id] = are_useful
        self._num_for += are_useful
        num_against = len(self._votes) - self._num_for
        if self._num_for != num_against:
            self.is_followed = self._num_for > num_against

    def forget(self, worker_id: str) -> None:
        """It is gone; what it said has been heard."""
        self._num_for -= self._votes.pop(worker_id, False)
