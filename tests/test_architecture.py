"""The shape of the package: imports run one way, vendors stay behind their seams, files and functions stay small.

`LAYERS` is the whole import direction: a module imports only from layers above its own line, lazily or not. A new module
fails here until it is given its place; a module that fits nowhere is a cycle in the making.
"""

import ast
import functools
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path

import pytest

import batchgen

ROOT = Path(batchgen.__file__).parent
MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 300

LAYERS = [
    ["specs", "queue", "worker", "driver", "verify", "staging", "preflight", "chaos", "reuse", "gates"],
    ["names", "row_ranges", "batches", "errors", "urls", "paths", "parquet"],
    ["logs"],
    ["records", "queue.suspects"],
    ["specs.sections", "queue.orders", "worker.spilled"],
    ["specs.tensorrt_llm", "specs.sampling", "specs.retry", "specs.input"],
    ["specs.patterns"],
    ["specs.gates"],
    ["specs.engine"],
    ["queue.lazy_heap", "queue.leases", "queue.tail", "queue.hint_votes", "queue.claim_table"],
    ["queue.begun"],
    [
        "spec",
        "queue.events",
        "build",
        "worker.tasks",
        "worker.window",
        "worker.pace",
        "driver.signals",
        "verify.damage",
        "worker.seal",
    ],
    ["preflight.tokenizer_files", "specs.saved", "specs.reference"],
    ["reuse.fingerprint", "gates.decide", "gates.fit", "gates.texts"],
    ["gates.count"],
    # pure decisions
    ["prompt", "plan", "queue.backlog", "queue.scaling", "queue.governor", "lengths", "worker.answer", "verify.rows"],
    ["stats", "queue.work_queue", "queue.progress", "queue.roster", "queue.timeline"],
    ["worker.budget", "worker.placement", "worker.stops", "queue.trial_queue", "queue.pulse"],
    ["metrics"],
    ["worker.seam", "worker.partials"],
    ["preflight.checkpoint", "staging.plan", "engines.trtllm.env"],
    ["preflight.preflight"],
    ["preflight.model"],
    ["quantize", "quantize.recipe"],
    ["quantize.architecture"],
    ["quantize.weigh"],
    # the embedded model's questions, and how it was made
    ["demo_questions", "training", "training.recipe", "training.muon"],
    # benchmarks, and what their scores say
    ["evaluate", "evaluate.extract", "evaluate.templates", "evaluate.statistics", "evaluate.speed"],
    ["evaluate.benchmarks"],
    # engines in virtual time
    ["simulate", "simulate.step_cost", "simulate.published"],
    ["simulate.rank"],
    ["simulate.engine"],
    ["simulate.calibration", "simulate.workload"],
    ["simulate.policies", "simulate.oracle"],
    ["reuse.index"],
    # the store seam
    ["stores", "stores.base"],
    ["stores.local", "stores.remote"],
    ["stores.s3"],
    ["stores.opening"],
    ["storage"],
    ["driver.fence"],
    ["stores.probe", "specs.load", "read", "write", "journal", "driver.lease"],
    ["worker.shard_footer", "batch_stats", "worker.handoff"],
    # weights on the node's own disk
    ["staging.fetch", "staging.lock"],
    ["staging.hub"],
    ["staging.staging", "preflight.checkpoint_facts", "preflight.facts"],
    ["preflight.check"],
    # the engine seam
    ["engines.byte_tokenizer"],
    ["engines.base", "engines.sampling", "engines.hf_tokenizer", "engines.breaker", "engines.openai_wire"],
    ["engines.deepseek_turns"],
    ["engines.deepseek_v32"],
    ["engines.deepseek_tokenizer"],
    # TensorRT-LLM: between its process and the actor
    ["engines.trtllm", "engines.trtllm.wire"],
    # on its own process's side of the wire
    ["engines.trtllm.sampling", "engines.trtllm.errors", "engines.trtllm.port"],
    ["engines.trtllm.vendor"],
    # and on the actor's side of it; the keeper is run as a file and imports nothing
    ["engines.trtllm.keeper", "engines.trtllm.gpu", "engines.trtllm.args", "engines.trtllm.health"],
    ["engines.trtllm.host", "engines.trtllm.probe"],
    ["engines.trtllm.serve"],
    ["engines.trtllm.child"],
    ["engines.trtllm.orphans", "engines.trtllm.tokenizer"],
    ["engines.trtllm.process"],
    ["engines.trtllm.client"],
    ["engines.openai_stream", "engines.openai_errors", "engines.openai_http"],
    ["quantize.nvfp4", "quantize.folder"],
    ["quantize.weights"],
    ["engines.nvfp4_model"],
    ["engines.hf_model"],
    ["engines.decode", "engines.simulated"],
    ["engines.lanes", "engines.replies"],
    ["engines.transformers", "engines.openai", "engines.tensorrt_llm"],
    ["engines.table"],
    ["engines"],
    ["chaos.faults"],
    ["preflight.doctor"],
    ["training.rows", "training.save", "training.accuracy"],
    ["training.train"],
    # one worker
    ["worker.result_batch", "worker.read_ahead", "worker.hint_check", "worker.collector"],
    ["worker.partial_rows"],
    ["manifest", "worker.open_shard", "worker.prepare"],
    ["length_files", "reuse.outputs", "reuse.desk", "reuse.answers"],
    ["reuse.carrier", "gates.scan", "reuse.copies", "reuse.lookout"],
    ["gates.watch", "reuse.duplicates"],
    ["engines.contract_subject"],
    ["engines.contract_answers"],
    ["engines.contract"],
    ["worker.continuation", "worker.ready"],
    ["worker.shard_files", "worker.sender", "specs.validate"],
    ["specs.inputs"],
    ["worker.feeder"],
    ["worker.setup", "worker.shares", "ray_data"],
    ["worker.spill"],
    ["worker.worker", "driver.job", "replay"],
    # the same rows in larger files
    ["compact", "compact.digest", "compact.plan"],
    ["compact.compact"],
    # many workers
    ["queue.inquiry", "queue.sharing", "queue.ledger", "queue.staffing", "queue.claims"],
    # many virtual workers
    ["simulate.open_rows"],
    ["simulate.record"],
    ["simulate.worker", "simulate.cluster", "simulate.plot"],
    ["simulate.scenario"],
    ["simulate.profile", "simulate.from_spec", "simulate.sources"],
    ["simulate.fluid"],
    ["simulate.estimate"],
    ["simulate.report", "simulate.figures_ranks", "simulate.figures_moves"],
    ["simulate.figures"],
    ["ray_metrics"],
    ["driver.inline_pool", "ray_pool", "driver.dispatch"],
    ["driver.pools"],
    # one run
    ["driver.screen"],
    ["driver.hold", "driver.view"],
    # what a job did
    ["report", "report.figures", "report.svg"],
    ["report.records"],
    ["report.distributions", "report.waste", "report.lanes", "report.charts", "report.generations", "report.gates"],
    ["report.tiles", "report.value", "report.text"],
    ["report.page"],
    ["report.by"],
    ["driver.run_record"],
    # an NVFP4 checkpoint
    ["quantize.spec", "quantize.calibrate", "quantize.check"],
    ["quantize.spec_load", "quantize.job"],
    ["driver.inventory"],
    ["driver.control"],
    ["driver.watch"],
    ["driver.finish", "driver.foresee", "driver.live_page", "verify.files", "verify.folder"],
    ["driver.run", "verify.verify", "report.reading"],
    # pipelines: decisions, then what carries them out
    ["pipelines", "pipelines.calendar", "pipelines.template", "pipelines.events", "pipelines.publish"],
    ["pipelines.past", "pipelines.spec"],
    ["pipelines.partitions", "pipelines.history"],
    ["pipelines.graph", "pipelines.decide", "pipelines.log"],
    ["pipelines.cleanup", "pipelines.filters", "pipelines.arrival", "pipelines.orders", "pipelines.overview"],
    ["pipelines.limits", "pipelines.source", "pipelines.priors"],
    ["pipelines.check", "pipelines.hooks", "pipelines.submit"],
    ["pipelines.load"],
    ["pipelines.execute", "pipelines.ray_jobs", "pipelines.aftermath"],
    ["pipelines.keeper"],
    ["pipelines.scheduler"],
    ["chaos.chaos", "chaos.child", "library"],
    ["demo", "bench.decode", "bench.queue", "bench.placement", "bench.memory", "bench.endpoint"],
    # benchmarks as jobs
    [
        "evaluate.spec",
        "evaluate.folder",
        "evaluate.dataset",
        "evaluate.targets",
        "evaluate.sandbox",
        "evaluate.math_grader",
    ],
    ["evaluate.spec_load", "evaluate.rounds", "evaluate.compare"],
    ["evaluate.programs", "evaluate.table"],
    ["evaluate.score"],
    ["evaluate.job"],
    ["evaluate.card_demo"],
    ["bench.worker"],
    # beside other systems; a peer's process may have no more of ours than child and workload
    ["bench", "bench.workload", "bench.oracle", "bench.child", "bench.processes", "bench.homes"],
    ["bench.ways", "bench.inputs", "bench.server"],
    ["bench.runs"],
    ["bench.measure", "bench.summary"],
    ["bench.benchmark", "bench.saturation", "bench.serving"],
    ["bench.delta", "bench.progress", "bench.gates"],
    # the endpoint, as far as it needs no Ray
    ["serve"],
    [
        "serve.errors",
        "serve.ids",
        "serve.rates",
        "serve.paging",
        "serve.ranges",
        "serve.wire",
        "serve.spec",
        "serve.door",
    ],
    ["serve.records", "serve.batch_spec", "serve.lines", "serve.answers", "serve.keys", "serve.body_sampling"],
    ["serve.upload_records"],
    ["serve.load", "serve.bodies", "serve.state", "serve.closing"],
    ["serve.abilities", "serve.parts", "serve.once", "serve.endpoint", "serve.claims", "serve.jobs"],
    ["serve.uploads"],
    ["serve.convert", "serve.results", "serve.sweep", "serve.upload", "serve.guard", "serve.batch_run"],
    ["serve.dataset"],
    ["serve.steps", "serve.create", "serve.routes_files"],
    ["serve.routes_uploads"],
    ["serve.conductor", "serve.routes_batches", "serve.page", "serve.routes_page"],
    ["serve.app"],
    ["serve.plain"],
    # shared engines, and the endpoint on Ray Serve
    ["serve.room", "serve.growing", "serve.described"],
    ["serve.deltas"],
    ["serve.places", "serve.interactive"],
    ["serve.host", "serve.routes_completions"],
    ["serve.interpreter"],
    ["serve.exposition", "serve.engine_actor"],
    ["serve.ray_engines"],
    ["serve.ray_shared_pool"],
    ["serve.gateway"],
    ["serve.deployment"],
    ["serve.local"],
    ["cli.base"],
    [
        "cli.jobs",
        "cli.outputs",
        "cli.reports",
        "cli.nodes",
        "cli.models",
        "cli.simulate",
        "cli.chaos",
        "cli.serve",
    ],
    ["cli.evaluate", "cli.pipelines", "cli.replay"],
    ["cli"],
    ["cli.__main__"],
    # what `import batchgen` offers, each loaded when it is asked for
    ["__init__"],
]
PURE = {
    "names",
    "records",
    "queue.events",
    "queue.orders",
    "errors",
    "urls",
    "specs.sections",
    "specs.engine",
    "specs.tensorrt_llm",
}
PURE |= {"spec", "prompt", "plan", "specs.sampling", "batches", "engines.deepseek_turns", "engines.deepseek_v32"}
PURE |= {"gates.decide", "gates.count", "gates.fit", "gates.texts", "specs.gates", "specs.patterns"}
PURE |= {"reuse.fingerprint", "specs.saved", "specs.input"}
PURE |= {"row_ranges", "queue.suspects", "queue.trial_queue", "specs.retry"}
PURE |= {
    "queue.work_queue",
    "queue.governor",
    "queue.tail",
    "queue.progress",
    "queue.pulse",
    "metrics",
    "queue.roster",
    "queue.backlog",
    "queue.lazy_heap",
    "queue.leases",
    "queue.scaling",
    "lengths",
    "stats",
    "worker.answer",
    "verify.rows",
}
PURE |= {"queue.begun", "queue.hint_votes", "queue.claim_table"}
PURE |= {
    "queue.timeline",
    "report.waste",
    "report.gates",
    "report.tiles",
    "report.lanes",
    "report.distributions",
    "report.svg",
    "report.charts",
    "report.figures",
}
PURE |= {"report.value", "report.text", "worker.read_ahead", "worker.hint_check", "worker.pace"}
PURE |= {"worker.read_ahead", "worker.hint_check", "worker.pace"}
PURE |= {"worker.budget", "worker.placement", "worker.stops", "worker.seam", "worker.partials", "engines.base"}
PURE |= {"preflight.checkpoint", "staging.plan", "preflight.preflight", "preflight.model"}
PURE |= {"quantize.recipe", "quantize.architecture", "quantize.weigh"}
PURE |= {"evaluate.extract", "evaluate.templates", "evaluate.statistics", "evaluate.speed"}
PURE |= {"bench.oracle", "bench.runs"}
PURE |= {"pipelines", "pipelines.calendar", "pipelines.template", "pipelines.events", "pipelines.spec"}
PURE |= {"pipelines.graph", "pipelines.decide", "pipelines.past", "pipelines.partitions", "pipelines.history"}
PURE |= {"pipelines.limits"}
PURE |= {"engines.trtllm.sampling", "engines.trtllm.env", "engines.trtllm.args", "engines.trtllm.health"}
PURE |= {
    "simulate",
    "simulate.step_cost",
    "simulate.published",
    "simulate.rank",
    "simulate.engine",
    "simulate.calibration",
}
PURE |= {"compact.digest", "compact.plan"}
PURE |= {"serve.errors", "serve.ids", "serve.rates", "serve.paging", "serve.ranges", "serve.wire", "serve.records"}
PURE |= {"serve.room", "serve.growing", "serve.deltas", "serve.described", "serve.upload_records"}
PURE |= {"serve.spec", "serve.batch_spec", "serve.bodies", "serve.body_sampling", "serve.lines", "serve.answers"}
# What only does I/O: pure modules may not even import it from the standard library.
EFFECTS = {
    "os",
    "pathlib",
    "io",
    "socket",
    "subprocess",
    "threading",
    "asyncio",
    "time",
    "tempfile",
    "shutil",
    "random",
}

# vendor -> the only modules that may import it. '()' after a name: only inside functions, so that it loads when used.
VENDORS = {
    # ray_jobs: the job API is an HTTP client, no part of the cluster that workers join.
    "cronsim": {"pipelines.calendar"},
    "duckdb": {"pipelines.filters()"},
    "ray": {
        "ray_pool",
        # ray_metrics: Ray's metrics alone; in ray_pool it would be two ideas in one file
        "ray_metrics",
        "pipelines.ray_jobs",
        "serve.engine_actor",
        "serve.ray_engines",
        "serve.ray_shared_pool",
        "serve.gateway",
        "serve.deployment",
    }
    | {"serve.local"},
    "torch": {"engines.sampling", "engines.decode", "engines.hf_model()", "engines.transformers()", "bench.decode()"}
    | {"training.muon()", "training.train()", "training.save()", "training.accuracy()", "bench.worker()"}
    | {"quantize.nvfp4", "quantize.weights", "quantize.calibrate", "quantize.check", "engines.nvfp4_model"}
    | {"quantize.folder()", "quantize.job()", "bench.worker()"},
    "transformers": {"bench.decode()", "engines.hf_model()", "engines.hf_tokenizer()", "training.train()"}
    | {"engines.nvfp4_model()", "quantize.job()", "bench.worker()"},
    "modelopt": {"quantize.calibrate()"},
    "safetensors": {"engines.hf_model()", "quantize.folder()"},
    "jinja2": {"engines.hf_tokenizer", "report.page()"},
    "tensorrt_llm": {"engines.trtllm.vendor()"},
    "huggingface_hub": {"staging.hub()"},
    "fsspec": {"stores.remote", "stores.s3"},
    "s3fs": {"stores.s3"},
    "aiohttp": {"stores.remote", "engines.openai", "engines.openai_http", "bench.server()"},
    "botocore": {"stores.remote"},
    "pynvml": {"engines.trtllm.gpu()", "preflight.facts()"},
    "yaml": {"specs.load", "pipelines.source"},
    "jsonschema": {"specs.sampling()", "gates.fit()"},
    "referencing": {"specs.sampling()", "gates.fit()"},
    "numpy": {"evaluate.statistics", "evaluate.speed", "reuse.index", "gates.texts"},
    "fastapi": {
        "serve.routes_completions",
        "serve.deployment",
        "serve.app",
        "serve.routes_files",
        "serve.routes_uploads",
        "serve.routes_batches",
        "serve.routes_page",
    },
    "starlette": {"serve.app", "serve.routes_files", "serve.routes_page", "serve.guard"},
    "uvicorn": {"serve.plain()"},
    "python_multipart": {"serve.upload"},
    "scipy": {"evaluate.statistics", "evaluate.targets()"},
    "h5py": {"evaluate.targets()"},
    "math_verify": {"evaluate.math_grader()"},
    "typer": {
        "cli.base",
        "cli.jobs",
        "cli.outputs",
        "cli.reports",
        "cli.replay",
        "cli.nodes",
        "cli.models",
        "cli.simulate",
        "cli.chaos",
        "cli.serve",
        "cli.evaluate",
        "cli.pipelines",
    },
    "rich": {
        "bench.progress",
        "driver.view",
        "driver.screen",
        "cli.outputs()",
        "cli.jobs()",
        "cli.reports()",
        "cli.nodes()",
        "cli.models()",
    }
    | {"preflight.doctor()"},
}
# Modules that import a heavy vendor at their top: whoever imports one of them does so lazily, or is one itself.
HEAVY = {
    "ray",
    "torch",
    "transformers",
    "safetensors",
    "jinja2",
    "tensorrt_llm",
    "fsspec",
    "s3fs",
    "aiohttp",
    "botocore",
}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


SOURCES = {name_of(path): path.read_text() for path in sorted(ROOT.rglob("*.py"))}


def of_each(modules: Iterable[str]) -> Callable[[Callable[[str], None]], Callable[[], None]]:
    """A test that tells of all modules at once: as thousands of tests these take longer to be counted than to be made."""

    def make_test(check: Callable[[str], None]) -> Callable[[], None]:
        def test() -> None:
            wrong = []
            for module in modules:
                try:
                    check(module)
                except AssertionError as error:
                    wrong.append(f"{module}: {error}")
            assert wrong == [], "\n".join(wrong)

        return test

    return make_test


every_module = of_each(SOURCES)


@functools.cache
def parse(module: str) -> ast.Module:
    return ast.parse(SOURCES[module])


def walk(node: ast.AST, is_lazy: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """(import, does it run only when a function is called, or never)."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, is_lazy
        is_deferred = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        is_typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        yield from walk(child, is_lazy or is_deferred or is_typing)


def list_imports(module: str) -> list[tuple[str, bool]]:
    """(full dotted name, is lazy) of everything the module imports; for `from a import b` both a and a.b."""
    found: list[tuple[str, bool]] = []
    for node, is_lazy in walk(parse(module)):
        if isinstance(node, ast.Import):
            found += [(alias.name, is_lazy) for alias in node.names]
        else:
            assert node.level == 0, f"{module}: relative import on line {node.lineno}; write it in full"
            assert node.module is not None
            found += [(node.module, is_lazy), *((f"{node.module}.{alias.name}", is_lazy) for alias in node.names)]
    return found


def list_ours(module: str) -> set[tuple[str, bool]]:
    """(module of ours, is lazy) that the module imports."""
    names = ((name.removeprefix("batchgen."), is_lazy) for name, is_lazy in list_imports(module))
    # `from batchgen.engines.base import X` runs engines/__init__.py too, but that is no dependency on what is in it.
    return {(name, is_lazy) for name, is_lazy in names if name in SOURCES and name != "__init__"}


def list_vendors(module: str) -> set[tuple[str, bool]]:
    return {(name.partition(".")[0], is_lazy) for name, is_lazy in list_imports(module)}


# ---- the direction


def test_every_module_has_one_place() -> None:
    placed = list(chain.from_iterable(LAYERS))
    assert sorted(placed) == sorted(SOURCES), "LAYERS must name each module of the package once: give new ones a place"


@every_module
def test_imports_run_one_way(module: str) -> None:
    rank = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    wrong = [other for other, _ in list_ours(module) if rank[other] >= rank[module]]
    assert wrong == [], f"{module} imports {wrong}, which are not below it: LAYERS says who may import whom"


@of_each(sorted(PURE))
def test_pure_modules_import_pure_modules_and_no_effects(module: str) -> None:
    assert {other for other, _ in list_ours(module)} <= PURE
    assert {vendor for vendor, _ in list_vendors(module)} & EFFECTS == set()


# ---- vendors


@every_module
def test_a_vendor_is_imported_at_its_seam_only(module: str) -> None:
    for vendor, is_lazy in list_vendors(module):
        if vendor in VENDORS:
            allowed = VENDORS[vendor]
            assert module in allowed or (is_lazy and f"{module}()" in allowed), (
                f"{module} imports {vendor}{'' if is_lazy else ' at its top'}; only {sorted(allowed)} may"
            )


def test_parquet_is_read_through_its_one_door() -> None:
    """`batchgen.parquet` says why."""
    doors = {"pq.read_table", "pq.ParquetFile", "pq.ParquetDataset"}
    calls = ((name, node) for name in SOURCES for node in ast.walk(parse(name)) if isinstance(node, ast.Call))
    assert {name for name, call in calls if ast.unparse(call.func) in doors} == {"parquet"}


@every_module
def test_every_vendor_is_known(module: str) -> None:
    everywhere = {"batchgen", "pyarrow", "pydantic", "pydantic_core"}
    foreign = {vendor for vendor, _ in list_vendors(module)} - sys.stdlib_module_names - everywhere
    assert foreign <= VENDORS.keys(), f"{module} imports {foreign - VENDORS.keys()}: give it a line in VENDORS"


def test_whoever_loads_a_heavy_vendor_at_its_top_is_itself_loaded_lazily() -> None:
    heavy = {module for module in SOURCES if {vendor for vendor, lazy in list_vendors(module) if not lazy} & HEAVY}
    assert heavy == {
        "ray_pool",
        "ray_metrics",
        "pipelines.ray_jobs",
        "serve.engine_actor",
        "serve.ray_engines",
        "serve.ray_shared_pool",
        "serve.gateway",
        "serve.deployment",
        "serve.local",
        "stores.remote",
        "stores.s3",
        "engines.sampling",
        "engines.decode",
        "engines.hf_tokenizer",
        "engines.openai",
        "engines.openai_http",
        "engines.nvfp4_model",
        "quantize.nvfp4",
        "quantize.weights",
        "quantize.calibrate",
        "quantize.check",
    }
    # hf_tokenizer needs jinja2 only, and what imports it at its top is imported lazily in turn.
    allowed = heavy | {"engines.hf_model", "engines.transformers", "engines.deepseek_tokenizer"}
    allowed |= {"engines.trtllm.tokenizer", "engines.tensorrt_llm"}
    grown = {module for module in SOURCES if {other for other, lazy in list_ours(module) if not lazy} & allowed}
    assert grown <= allowed, f"{sorted(grown - allowed)} would load a heavy vendor with themselves"


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


SHOW = "print(*sorted(m for m in {names} if m in sys.modules))"


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import batchgen", HEAVY | {"pyarrow", "pydantic", "yaml", "typer", "rich"}),
        ("import batchgen.cli", HEAVY | {"pyarrow", "pydantic", "yaml"}),
        # All that a driver and a simulated worker on a local disk need.
        ("import batchgen.driver.run, batchgen.driver.inline_pool, batchgen.engines.simulated", HEAVY),
        # It starts with each engine, beside a vendor that has enough to load.
        ("import batchgen.engines.trtllm.child", HEAVY | {"pyarrow", "pydantic", "yaml"}),
    ],
)
def test_importing_loads_no_vendor_before_it_is_used(code: str, absent: set[str]) -> None:
    assert run_python(f"import sys; {code}; {SHOW.format(names=sorted(absent))}").split() == []


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["--version"]])
def test_the_command_line_answers_without_loading_a_vendor(arguments: list[str]) -> None:
    code = (
        "import sys, batchgen.cli\n"
        f"sys.argv = ['batchgen', *{arguments}]\n"
        "try: batchgen.cli.main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        f"print('LOADED', *(m for m in {sorted(HEAVY)} if m in sys.modules))"
    )
    assert run_python(code).splitlines()[-1].split() == ["LOADED"]


# ---- sizes and words


@every_module
def test_a_module_says_what_it_is(module: str) -> None:
    assert (ast.get_docstring(parse(module)) or "").strip(), f"{module} has no docstring"


@every_module
def test_files_are_short(module: str) -> None:
    num_lines = len(SOURCES[module].splitlines())
    assert num_lines <= MAX_FILE_LINES, f"{module} has {num_lines} lines; split it"


@every_module
def test_functions_are_short(module: str) -> None:
    for node in ast.walk(parse(module)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            num_lines = node.end_lineno - node.lineno + 1
            assert num_lines <= MAX_FUNCTION_LINES, f"{module}.{node.name} has {num_lines} lines; split it"


# Words of DESIGN section 6 that are said another way here, as parts of our own names.
NEVER = {"uid", "replica", "fleet", "chunk", "max_new_tokens", "concurrency"}


@every_module
def test_names_use_the_projects_words(module: str) -> None:
    named = {
        node.name
        for node in ast.walk(parse(module))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    } | {node.arg for node in ast.walk(parse(module)) if isinstance(node, ast.arg)}
    assert {name for name in named if NEVER & {name, *name.lower().split("_")}} == set()
