"""One world: a small job, its drivers, its weather, and what must hold, all from one seed.

Until the weather calms down, drivers are killed, frozen, cut off and doubled; whoever submitted the job submits it again.
Then the schedule is fair: one driver at a time is started, and the job must be done in bounded time. Its end is looked at
by the checker and by `batchgen verify`.
"""

import asyncio
import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from . import patches  # isort: skip  # before anything of batchgen
import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.engines import create_engine
from batchgen.errors import BatchgenError, Cancelled, EngineDied, EngineRestarted, RequestFailed
from batchgen.queue.tail import TailPolicy
from batchgen.records import Generation, Request, RowId
from batchgen.spec import JobSpec
from batchgen.specs.load import make_spec
from batchgen.storage import Storage
from batchgen.stores.base import Client
from batchgen.stores.opening import opening_through
from batchgen.verify.verify import verify

from .checker import Checker, Key, Violation
from .earlier import EARLIER, Earlier, draw, make_prompt
from .faults import CALM, NO_WEATHER, Weather, choose, make_weather
from .kernel import Kernel, Process
from .pool import SimPool
from .store import SimStore

# A fair schedule must be done by then: many times what the slowest job takes without faults.
MAX_CALM_S = 900.0
MAX_ZOMBIE_S = 60.0
# After the last fault: before it, a store that fails at every turn may refuse any number of them.
MAX_RUNS = 80
MAX_DRIVERS = 4
# Rows are moved, begun or not, whenever anybody has less to do: what that gains is not asked.
EAGER = TailPolicy(min_gain_s=0.0, ahead_share=0.5, min_move_gain_s=-1e9, settle_s=2.0, trial_share=0.5)
IN, OUT = "sim://in", "sim://out"


@dataclass(slots=True)
class Outcome:
    """What became of a world. `violation` is None where all held."""

    seed: int
    violation: str | None = None
    story: list[tuple[float, str, str]] = field(default_factory=list)
    seconds: float = 0.0
    num_runs: int = 0
    num_rows: int = 0
    num_generated: int = 0
    num_reused: int = 0
    num_copied: int = 0
    num_sent_again: int = 0
    num_commits: int = 0
    num_replaced: int = 0
    num_operations: int = 0
    strikes: dict[str, int] = field(default_factory=dict)

    def tell(self) -> str:
        lines = [f"{at:9.3f}  {who:18} {words}" for at, who, words in self.story]
        return "\n".join([f"seed {self.seed}: {self.violation}", *lines])


class World:
    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.outcome = Outcome(seed)
        self.kernel = Kernel(self.rng, lambda at, who, words: self.outcome.story.append((at, who, words)))
        self.weather = self._make_weather()
        self.keys: list[Key] = []
        self.bad: set[Key] = set()
        self.changed_by: dict[str, str] = {}
        self.store = SimStore(self.kernel, self._watch)
        self.store.on_freeze = self._submit_again
        self.earlier = self._make_earlier()
        self.poison: set[Key] = set()
        self.spec = self._make_job()
        self.checker = Checker(self.keys, self.store.held)
        self.drivers: list[Process] = []
        self.workers: list[Process] = []
        self.pools: list[SimPool] = []
        self.is_done = False
        # Deaths of engines whose process lives on, and workers that died or that a driver gave up: one that is cut off does
        # not die before it can be reached.
        self.num_deaths = 0
        self.gone: set[str] = set()
        self.num_stormy: int | None = None
        self.calm_at = self.weather.until

    def _make_weather(self) -> Weather:
        """Some worlds are calm: there duplicates are generated once."""
        weather, seed = make_weather(self.rng), self.outcome.seed
        return NO_WEATHER if draw(seed, "duplicates") < 0.2 and draw(seed, "calm") < 0.4 else weather

    def _make_earlier(self) -> Earlier | None:
        """None where this kind of world has none."""
        earlier = Earlier(self.outcome.seed)
        for path, data in earlier.files.items():
            self.store.plant(f"{EARLIER}/{path}", data)
        return earlier

    def _watch(self, name: str, before: bytes | None, after: bytes | None) -> None:
        process = self.kernel.process
        self.changed_by[name] = process.name if process is not None else "world"
        self.checker.watch(name, before, after)

    # ---- the job -----------------------------------------------------------------------------------------------------

    def _make_job(self) -> JobSpec:
        rng = self.rng
        n = rng.choice([1, 1, 1, 2])
        num_files = rng.choice([1, 2])
        for number in range(num_files):
            self._plant_file(f"{IN}/part-{number}.parquet", rng.randint(1, 9), n)
        rates: dict[str, Any] = {
            "slots": rng.randint(2, 5),
            "max_inflight": rng.randint(2, 8),
            "decode_tokens_per_s": 4.0,
        }
        # Drawn apart, so that a seed meets what it met before there were budgets.
        rates["token_budget"] = random.Random(f"{self.outcome.seed}:budget").choice(["auto", 3, 6])
        rows_per_shard, workers = rng.randint(2, 5), {"min": 1, "max": rng.randint(1, 3)}
        if random.Random(f"{self.outcome.seed}:begun").random() < 0.3:
            # One engine takes all at once, and what others may have of it was begun.
            rates |= {"slots": 12, "max_inflight": 12, "token_budget": 4}
            rows_per_shard, workers = 12, {"min": 2, "max": 3}
        lease_ttl_s = rng.uniform(4, 12)
        rates |= self._poison_a_row()
        return make_spec(
            {
                "input": {"paths": [IN], "custom_id": "key", "passthrough": ["topic"], **self._make_reuse()},
                "prompt": {"column": "prompt"},
                "engine": {"kind": "simulated", "mean_tokens": 12, "sigma": 0.8, "startup_s": 0.5, **rates},
                "sampling": {"max_tokens": 40, "n": n},
                "output": {
                    "path": OUT,
                    "rows_per_shard": rows_per_shard,
                    "journal_interval_s": rng.choice([0.5, 1.0, 3.0]),
                },
                "cluster": {
                    "workers": workers,
                    "lease_ttl_s": lease_ttl_s,
                    "worker_timeout_s": rng.uniform(4, 10),
                    "stall_timeout_s": rng.uniform(8, 20),
                    "start_timeout_s": 30,
                    "drain_s": rng.choice([0.0, 1.0, 4.0]),
                    "log_interval_s": rng.choice([1.0, 5.0]),
                },
                "retry": {
                    "max_attempts": 2,
                    "backoff_s": 0.5,
                    "max_backoff_s": 5,
                    "max_shard_attempts": rng.randint(2, 4),
                    "max_error_rate": 1.0,
                    "max_deaths_alone": min(rng.choice([2, 3, 50]), 3 if self.poison else 50),
                },
            }
        )

    def _poison_a_row(self) -> dict[str, Any]:
        """In some worlds every engine dies of one row. Drawn apart, as budgets are. (Not where its answer may come from
        elsewhere.)"""
        rng = random.Random(f"{self.outcome.seed}:poison")
        good = sorted(set(self.keys) - self.bad)
        is_plain = self.earlier is not None and not self.earlier.make_input()
        if not (is_plain and good and rng.random() < 0.25):
            return {}
        name, row, _ = rng.choice(good)
        self.poison = {key for key in good if key[:2] == (name, row)}
        return {"die_text": make_prompt(name, row), "death": rng.choice(["engine", "restart"])}

    def _make_reuse(self) -> dict[str, Any]:
        return {} if self.earlier is None else self.earlier.make_input()

    def _plant_file(self, name: str, num_rows: int, n: int) -> None:
        self._plant_rows(name, [self.rng.random() < 0.08 for _ in range(num_rows)], n)

    def _plant_rows(self, name: str, is_bad: list[bool], n: int) -> None:
        """One file; a bad row has no prompt."""
        num_rows = len(is_bad)
        prompts = [
            self.earlier.choose_prompt(name, row) if self.earlier else make_prompt(name, row) for row in range(num_rows)
        ]
        rows = {
            "prompt": pa.array([None if bad else text for text, bad in zip(prompts, is_bad, strict=True)], pa.string()),
            "key": pa.array([f"{name}-{row}" for row in range(num_rows)]),
            "topic": pa.array(range(num_rows)),
        }
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(rows), sink, row_group_size=4)
        self.store.plant(name, sink.getvalue().to_pybytes())
        for row, bad in enumerate(is_bad):
            keys = [(name, row, sample) for sample in range(n)]
            self.keys += keys
            self.bad |= set(keys if bad else ())

    # ---- processes ---------------------------------------------------------------------------------------------------

    def make_process(self, name: str) -> Process:
        rng = self.rng
        rate, wall = rng.choice([1.0, 1.0, rng.uniform(0.9, 1.1)]), rng.choice([0.0, rng.uniform(-1e5, 1e5)])
        return Process(name, f"machine-{rng.randint(0, 2)}", rate, wall)

    def start_driver(self) -> None:
        self.outcome.num_runs += 1
        process = self.make_process(f"driver-{self.outcome.num_runs}")
        self.drivers.append(process)
        process.on_death.append(self._submit_again)
        self.kernel.spawn(process, lambda: self._drive(process))

    def _drive(self, process: Process) -> None:
        kernel = self.kernel
        kernel.tell("starts")
        try:
            report = patches.run.run_job(self.spec, SimView(kernel), create_pool=self.create_pool)
            kernel.tell(f"ends: {report['state']}, exit code {report['exit_code']}, {report['rows']}")
            self.is_done = report["exit_code"] == 0 and self.checker.list_errors() == self.bad | self.find_quarantined()
        except BatchgenError as error:
            kernel.tell(f"ends: {type(error).__name__}: {error}")
        finally:
            self.drivers.remove(process)
        self._submit_again()

    def find_quarantined(self) -> set[Key]:
        """Rows that were in flight, alone, when workers were killed at random: those are errors by right, but each of them
        has cost so many workers."""
        rows = self.checker.list_errors("quarantined")
        num_deaths = self.num_deaths + len(self.gone)
        if len(rows) > num_deaths // self.spec.retry.max_deaths_alone * self.spec.sampling.n:
            raise Violation(f"{len(rows)} rows are quarantined after {num_deaths} deaths")
        return rows

    def _submit_again(self) -> None:
        """Whoever submitted sees the end of it, and submits again."""
        self.kernel.call_at(self.kernel.now + self.rng.uniform(0.1, 5.0), self._start_if_none)

    def _start_if_none(self) -> None:
        """Whoever submits sees a frozen driver no more than a dead one."""
        self.drivers = [process for process in self.drivers if not process.is_dead]
        if all(driver.frozen_until > self.kernel.now for driver in self.drivers) and not self.is_done:
            self.start_driver()

    def create_pool(self, setup: Any) -> SimPool:
        driver = self.kernel.process
        assert driver is not None

        def make(worker_id: str) -> Process:
            process = self.make_process(f"{driver.name}/{worker_id}")
            process.on_death.append(lambda: self.gone.add(process.name))
            self.workers.append(process)
            return process

        pool = SimPool(self.kernel, setup, make, lambda process: self.gone.add(process.name))
        self.pools.append(pool)
        return pool

    def is_dead_here(self, holder: Any) -> bool:
        mine = self.kernel.process
        assert mine is not None
        if holder.machine != mine.machine:
            return False
        return all(strand.process.name != holder.host for strand in self.kernel.live if not strand.process.is_dead)

    # ---- the weather -------------------------------------------------------------------------------------------------

    def strike(self) -> None:
        if self.kernel.now >= self.calm_at:
            return
        self.workers = [process for process in self.workers if not process.is_dead]
        self.drivers = [process for process in self.drivers if not process.is_dead]
        name = choose(self.rng, self.weather.strikes)
        if self._carry_out(name):
            self.outcome.strikes[name] = self.outcome.strikes.get(name, 0) + 1
        self.kernel.call_at(self.kernel.now + self.rng.expovariate(1 / self.weather.pause_s), self.strike)

    def _carry_out(self, name: str) -> bool:
        """Did it strike anybody?"""
        what, _, whom = name.partition("_")
        if name == "kill_all":
            for process in [*self.workers, *self.drivers]:
                self.kernel.kill(process, "all were")
            return True
        if name == "second_driver":
            if len(self.drivers) < MAX_DRIVERS:
                self.start_driver()
            return True
        victims = self.drivers if whom.startswith(("driver", "to_stop")) else self.workers
        if not victims:
            return False
        self._hit(what, whom, self.rng.choice(victims))
        return True

    def _hit(self, what: str, whom: str, victim: Process) -> None:
        until = self.kernel.now + self.rng.choice([self.rng.uniform(0.2, 3), self.rng.uniform(3, 30)])
        self.kernel.tell(f"{what} {whom} until {until:.1f}", victim.name)
        if what == "kill":
            self.kernel.kill(victim, "at random")
        elif what == "freeze":
            victim.frozen_until = until
            self._submit_again()
        elif what == "ask":
            victim.is_asked_to_stop = True
        elif whom.endswith("store"):
            victim.store_cut_until = until
        else:
            victim.net_cut_until = until
            if self.rng.random() < 0.5:
                for pool in self.pools:
                    pool.suspect(victim)

    def calm(self) -> None:
        """From here on the schedule is fair. What was frozen or cut off comes back in its own time."""
        self.calm_at = min(self.calm_at, self.kernel.now)
        self.num_stormy = self.outcome.num_runs if self.num_stormy is None else self.num_stormy
        self.store.rates = CALM
        self.kernel.tell("calm")

    # ---- the whole ---------------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        with self._patched():
            try:
                self._run()
            except Violation as error:
                self.outcome.violation = str(error)
            except Exception as error:  # noqa: BLE001 - an error that is none of ours is a finding as well
                self.outcome.violation = f"{type(error).__name__}: {error} in {_place(error)}"
            finally:
                self.kernel.end()
        patches.collect_garbage()
        outcome, checker = self.outcome, self.checker
        outcome.seconds, outcome.num_rows = self.kernel.now, len(self.keys)
        outcome.num_commits, outcome.num_replaced = checker.num_commits, checker.num_replaced
        outcome.num_operations = self.store.num_operations
        return outcome

    def _run(self) -> None:
        kernel, until = self.kernel, self.calm_at
        self.store.rates = self.weather.rates
        kernel.call_at(0.0, self.start_driver)
        if self.weather.strikes:
            kernel.call_at(self.rng.uniform(0, 10), self.strike)
        kernel.call_at(until, self.calm)
        self._go_on(until + MAX_CALM_S)
        if not self.is_done:
            raise Violation(f"not done {MAX_CALM_S:g} s after the last fault, in {self.outcome.num_runs} runs")
        # Zombies wake up, the last of them long after the job's end. What they do must leave it right.
        self.calm()
        self.kernel.run(lambda: self.checker.violation is not None, kernel.now + MAX_ZOMBIE_S)
        self._check_violation()
        quarantined = self.find_quarantined()
        if not self.poison <= quarantined:
            raise Violation(f"{min(self.poison)} kills engines and is not quarantined")
        expected = self.bad | quarantined
        self.checker.check_end(expected)
        self._verify(is_released=False)
        self._run_once_more()
        self.checker.check_end(expected)
        if self.earlier is not None:
            self.earlier.check_end(self.checker.list_rows(), is_calm=self.weather is NO_WEATHER)
            self.outcome.num_sent_again = self.earlier.num_sent_again
            self.outcome.num_reused, self.outcome.num_copied = self.earlier.num_reused, self.earlier.num_copied
        self._verify(is_released=True)

    def _run_once_more(self) -> None:
        """It finds nothing to do, and changes no row."""
        num_commits, self.is_done = self.checker.num_commits, False
        self.start_driver()
        self._go_on(self.kernel.now + MAX_CALM_S)
        if not self.is_done or self.checker.num_commits > num_commits:
            raise Violation("a run of the finished job did not end, or committed again")

    def _go_on(self, until: float) -> None:
        def is_over() -> bool:
            num_calm = 0 if self.num_stormy is None else self.outcome.num_runs - self.num_stormy
            return self.is_done or self.checker.violation is not None or num_calm > MAX_RUNS

        self.kernel.run(is_over, until)
        self._check_violation()

    def _check_violation(self) -> None:
        if self.checker.violation is not None:
            raise Violation(self.checker.violation)

    def _verify(self, *, is_released: bool) -> None:
        """`is_released`: the last run could say that it ended; else verify may hold it for alive."""
        found: list[str] = []
        auditor = Process("verify", "machine-0")

        def look() -> None:
            verdict = verify(Storage(OUT), with_input=True)
            findings = [str(finding) for finding in verdict.findings]
            if not is_released:
                findings = [finding for finding in findings if not self._is_zombies(finding)]
            found.extend([*findings, *(verdict.todo if is_released else [])])

        self.kernel.spawn(auditor, look)
        self.kernel.run(lambda: False, self.kernel.now + 1e6)
        if found:
            raise Violation(f"batchgen verify: {found}")

    def _is_zombies(self, finding: str) -> bool:
        """May a driver that woke up too late leave this until the next run mends it? docs/crash_points.md says why. No row
        is among it, and what the run that ended last wrote is never excused."""
        path, _, what = finding.partition(": ")
        if self.changed_by.get(path) in (None, self.changed_by.get(f"{OUT}/manifest.json")):
            return False
        if path == f"{OUT}/_SUCCESS":
            return what.startswith(("is gone", "is not of the last run"))
        is_more = path.startswith(f"{OUT}/batch_stats/run-") and what.startswith("was not written by any run")
        return is_more and self.checker.has_lost_only(path.removeprefix(f"{OUT}/"))

    @contextlib.contextmanager
    def _patched(self) -> Iterator[None]:
        """This world's pool, engine, signals and dead processes under the production code."""
        run, lease, worker = patches.run, patches.driver_lease, patches.worker
        # Drawn apart, as budgets are.
        tail = EAGER if random.Random(f"{self.outcome.seed}:tail").random() < 0.7 else TailPolicy()
        make_dispatcher = run.make_dispatcher

        def make_eager(*args: Any) -> Any:
            dispatcher = make_dispatcher(*args)
            dispatcher.sharing.policy = dispatcher.staffing.tail = tail
            return dispatcher

        fakes: list[tuple[Any, str, Any]] = [
            (run, "make_dispatcher", make_eager),
            (run, "stop_on_signal", self._stop_on_signal),
            (lease, "is_dead_here", self.is_dead_here),
            (lease, "get_machine", lambda: self._me().machine),
            (lease.socket, "gethostname", lambda: self._me().name),
            (lease.os, "getpid", lambda: 1),
            (worker, "create_engine", lambda spec: self._wrap_engine(create_engine(spec))),
        ]
        before = [(module, name, getattr(module, name)) for module, name, _ in fakes]
        for module, name, fake in fakes:
            setattr(module, name, fake)
        patches.enter(self.kernel)
        try:
            with opening_through(lambda _: self._open_client()):
                yield
        finally:
            patches.leave()
            for module, name, value in before:
                setattr(module, name, value)

    def _open_client(self) -> Client:
        return self.store

    def _wrap_engine(self, engine: Any) -> Any:
        return SimEngine(engine, self)

    def _me(self) -> Process:
        process = self.kernel.process
        assert process is not None
        return process

    @contextlib.contextmanager
    def _stop_on_signal(self) -> Iterator[Callable[[], None]]:
        process = self._me()

        def check() -> None:
            if process.is_asked_to_stop:
                raise Cancelled("stopped by a signal")

        yield check


class SimView:
    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel

    def say(self, message: str) -> None:
        self._kernel.tell(message)

    def warn(self, message: str) -> None:
        self._kernel.tell(f"warning: {message}")

    def show(self, progress: Any) -> None: ...


class SimEngine:
    """The simulated engine that ships, and what may befall one."""

    def __init__(self, engine: Any, world: World) -> None:
        self._engine, self._world = engine, world

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def peek(self, row_id: RowId) -> Generation | None:
        found: Generation | None = self._engine.peek(row_id)
        return found

    async def generate(self, request: Request) -> Generation:
        world, weather = self._world, self._world.weather
        world.outcome.num_generated += 1
        if world.earlier is not None:
            try:
                world.earlier.check_sent(request, self._engine)
            except Violation as error:  # production code might catch it
                world.checker.violation = world.checker.violation or str(error)
        if world.kernel.now < world.calm_at:
            await self._suffer(weather)
        try:
            answer: Generation = await self._engine.generate(request)
        except (EngineDied, EngineRestarted):
            world.num_deaths += (request.row_id.source_file, *request.row_id.slot) in world.poison
            raise
        return answer

    async def _suffer(self, weather: Any) -> None:
        world, rng = self._world, self._world.rng
        if rng.random() < weather.engine_dies:
            world.num_deaths += 1
            self._engine.kill("the engine died at random")
        if rng.random() < weather.engine_fails:
            raise RequestFailed("engine_error", "the engine failed at random")
        if rng.random() < weather.engine_hangs:
            await self._engine._death  # until it is killed
        if rng.random() < weather.engine_is_slow:
            await asyncio.sleep(rng.uniform(0, 15))


def _place(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace is not None else "nowhere"


def run_world(seed: int) -> Outcome:
    return World(seed).run()
