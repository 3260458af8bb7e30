"""One rank's process: holds its GPU, takes requests on stdin, draws their tokens, answers on a pipe. Run by path, with the
standard library alone, so that it starts in a few hundredths of a second."""

import json
import math
import os
import random
import select
import signal
import sys
import time
import zlib
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]

from control import Control  # noqa: E402
from gpu_ledger import hold_gpu  # noqa: E402

IDLE_S = 0.02


class Active:
    """A request while it is decoded. Each token follows from all before it and the seed, so that a partial answer which
    comes back as part of a prompt goes on as it would have."""

    def __init__(self, order: dict[str, Any], alphabet: list[int], max_natural: int) -> None:
        self.order = order
        self.tokens: list[int] = []
        self.num_told = 0
        self.scheduled_at = time.monotonic()
        self.first_at: float | None = None
        self.seed = "greedy" if order["is_greedy"] else order["seed"] or 0
        self.alphabet, self.end_odds = alphabet, 2 / max_natural
        self.think_end = order["think_end"]
        self.state = 0
        for token in order["prompt"]:
            self.note(token)

    def note(self, token: int) -> None:
        self.state = zlib.crc32(b"%d," % token, self.state)

    def choose(self) -> int | None:
        """The next token; None: the end."""
        at, guided = len(self.tokens), self.order["guided"]
        if guided is not None:
            return guided[at] if at < len(guided) else None
        rng = random.Random(f"{self.state} {self.seed}")
        token: int = rng.choice(self.alphabet)
        wants_end = rng.random() < self.end_odds
        if self.think_end is not None and (wants_end or rng.random() < 1 / 16):
            token, self.think_end = self.think_end, None
        elif wants_end and not self.order["ignore_eos"] and at >= max(1, self.order["min_tokens"] or 1):
            return None
        return token

    def step(self) -> str | None:
        """One more token; the reason, when it is the last."""
        if self.order["is_empty"]:
            return "end_id"
        token = self.choose()
        self.tokens.append(self.order["end_id"] if token is None else token)
        self.note(self.tokens[-1])
        self.first_at = self.first_at or time.monotonic()
        if token is None:
            return "end_id"
        if any(self.tokens[-len(stop) :] == stop for stop in self.order["stops"]):
            return "stop_words"
        return "length" if len(self.tokens) >= self.order["max_tokens"] else None


class Rank:
    """The loop. A hung rank goes on reading orders, and does nothing about them."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.number: int = options["rank"]
        self.control = Control(os.environ.get("STAND_IN_CONTROL"))
        self.events = os.fdopen(options["event_fd"], "w", buffering=1)
        self.waiting: list[dict[str, Any]] = []
        self.active: dict[int, Active] = {}
        self.is_hung = False
        self.is_orphan = bool(self.control.get("orphans"))
        self.rest = b""

    def run(self) -> None:
        if self.is_orphan:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.tell({"ready": os.getpid()})
        is_open = True
        while is_open or self.is_orphan:
            is_busy = (self.active or self.waiting) and not self.is_hung
            is_open = is_open and self.read(0 if is_busy else IDLE_S)
            if not is_open:
                self.active.clear()
                self.waiting.clear()
                time.sleep(IDLE_S if self.is_orphan else 0.0)
            self.obey()
            if not self.is_hung:
                self.iterate()

    def read(self, wait_s: float) -> bool:
        """Takes what orders there are; False at the end of the main process."""
        if not select.select([0], [], [], wait_s)[0]:
            return True
        data = os.read(0, 2**20)
        *lines, self.rest = (self.rest + data).split(b"\n")
        for line in lines:
            order = json.loads(line)
            if "abort" not in order:
                self.waiting.append(order)
            elif order["abort"] in self.active or any(each["id"] == order["abort"] for each in self.waiting):
                self.active.pop(order["abort"], None)
                self.waiting = [each for each in self.waiting if each["id"] != order["abort"]]
                self.tell({"id": order["abort"], "tokens": [], "reason": "cancelled"})
        return bool(data)

    def obey(self) -> None:
        if self.control.has_fired("die", self.number):
            os._exit(1)
        self.is_hung = self.control.has_fired("hang") or self.is_hung
        numbers = [*self.active, *(order["id"] for order in self.waiting)]
        if numbers and (self.control.get("fail_all") or self.control.has_fired("fail_active", self.number)):
            for number in numbers:
                self.tell({"id": number, "error": "CUDA error: an illegal memory access was encountered"})
            self.active.clear()
            self.waiting.clear()

    def iterate(self) -> None:
        if not (self.active or self.waiting):
            return
        while self.waiting and len(self.active) < self.options["max_batch_size"]:
            order = self.waiting.pop(0)
            self.active[order["id"]] = Active(
                order, self.options["alphabet"], self.control.get("max_natural_tokens", 64)
            )
        time.sleep(self.control.get("token_s", 0.0))
        for number, active in list(self.active.items()):
            reason = active.step()
            num_tokens = len(active.tokens)
            if reason or num_tokens == 1 or num_tokens % self.options["stream_interval"] == 0:
                event = make_event(active, reason, self.options["alphabet"])
                if self.control.get("nan_token") in active.order["prompt"] and "logprobs" in event:
                    event["logprobs"] = [[[other, math.nan] for other, _ in pairs] for pairs in event["logprobs"]]
                self.tell(event)
                active.num_told = num_tokens
            if reason:
                del self.active[number]

    def tell(self, event: dict[str, Any]) -> None:
        try:
            self.events.write(json.dumps(event) + "\n")
        except BrokenPipeError:  # the main process is gone, and this rank stays: an orphan
            self.active.clear()


def make_event(active: Active, reason: str | None, alphabet: list[int]) -> dict[str, Any]:
    event: dict[str, Any] = {
        "id": active.order["id"],
        "tokens": active.tokens[active.num_told :],
        "reason": reason,
        "scheduled_at": active.scheduled_at,
        "first_at": active.first_at,
    }
    if active.order["logprobs"]:
        event["logprobs"] = [make_logprobs(active, token, alphabet) for token in event["tokens"]]
    return event


def make_logprobs(active: Active, token: int, alphabet: list[int]) -> list[list[float]]:
    """[token, logprob] of the likeliest, and of the drawn one where it is not among them."""
    likeliest = random.Random(token).sample(alphabet, active.order["logprobs"])
    pairs = [[other, -0.5 - rank] for rank, other in enumerate(likeliest)]
    return pairs if token in likeliest else [*pairs, [token, -9.0]]


if __name__ == "__main__":
    told = json.loads(sys.argv[1])
    memory = hold_gpu(os.environ["STAND_IN_GPU_DIR"], told["rank"]) if os.environ.get("STAND_IN_GPU_DIR") else None
    print(f"[rank {told['rank']}] noise on stdout", flush=True)
    print(f"[rank {told['rank']}] noise on stderr", file=sys.stderr, flush=True)
    Rank(told).run()
