"""`batchgen doctor`: looks at this node, and at what a spec asks of it, before an hour of loading does.

`node_check` looks at node and model; here are the servers, the output, and the table. A line for whatever can't be looked
at; only a bug raises.
"""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any, cast

from batchgen.errors import BatchgenError, OutputError
from batchgen.preflight.check import check_checkpoint, check_trtllm
from batchgen.preflight.facts import read_host, read_node
from batchgen.preflight.preflight import Check, NodeFacts, check_gpus, check_machine, check_mpi, check_transformers
from batchgen.spec import JobSpec, ModelSpec
from batchgen.specs.engine import OpenAIEngineSpec, TransformersEngineSpec
from batchgen.specs.tensorrt_llm import TensorRTLLMEngineSpec
from batchgen.staging.staging import DEFAULT_FOLDER
from batchgen.storage import Storage
from batchgen.stores.probe import probe
from batchgen.worker.budget import count_first

TENSORRT_LLM = "tensorrt_llm"
SERVER_TIMEOUT_S = 5.0


def examine(spec: JobSpec | None, node: NodeFacts | None = None) -> list[Check]:
    """Everything that can be looked at from here. Without a spec: the node alone, and nothing is missed on it."""
    if spec is None:
        node = node or read_node(DEFAULT_FOLDER)
        found = node.packages.get(TENSORRT_LLM)
        what = found or f"not installed; only engine.kind {TENSORRT_LLM} needs it"
        vendor = Check(TENSORRT_LLM, "ok", what)
        return [*check_machine(node), *check_gpus(node, 0), vendor, *check_mpi(node, is_needed=False)]
    return [*_check_engine(spec, node), *_check_output(spec)]


def _check_engine(spec: JobSpec, node: NodeFacts | None) -> list[Check]:
    section = spec.engine
    if isinstance(section, TensorRTLLMEngineSpec):
        max_tokens = count_first(section.token_budget, spec.sampling.max_tokens)
        return check_trtllm(spec.model, section, max_tokens, node, None)
    node = node or read_node(spec.model.stage_dir or DEFAULT_FOLDER)
    checks = check_machine(node)
    if isinstance(section, TransformersEngineSpec):
        checks += check_transformers(node, section.device)
        checks += check_checkpoint(spec.model, node, None, None)
    elif isinstance(section, OpenAIEngineSpec):
        checks += asyncio.run(check_servers(spec.model, section))
    return checks


# ---- servers


async def check_servers(model: ModelSpec, section: OpenAIEngineSpec) -> list[Check]:
    """Asks each as a worker would at its start, and no longer than a person waits."""
    timeouts = {name: min(getattr(section, name), SERVER_TIMEOUT_S) for name in ("open_timeout_s", "connect_timeout_s")}
    fields = {**section.model_dump(include=section.model_fields_set), **timeouts, "send_token_ids": False}
    alone = [OpenAIEngineSpec.model_validate({**fields, "base_urls": [url]}) for url in section.base_urls]
    return list(await asyncio.gather(*[_check_server(model, each) for each in alone]))


async def _check_server(model: ModelSpec, section: OpenAIEngineSpec) -> Check:
    from batchgen.engines.openai import OpenAIEngine

    engine, (url,) = OpenAIEngine(model, section), section.base_urls
    try:
        await engine.open()
    except BatchgenError as error:
        return Check(
            "server", "fail", f"{url}: {error}", f"start it, or correct engine.base_urls ({section.api_key_env})"
        )
    finally:
        await engine.close()
    return Check("server", "ok", f"{url} answers")


# ---- the output


def _check_output(spec: JobSpec) -> list[Check]:
    try:
        abilities = probe(Storage(spec.output.path))
    except OutputError as error:
        return [Check("output", "fail", str(error), is_spec=True)]
    if abilities.is_exclusive:
        return [Check("output", "ok", f"{spec.output.path} can be written, and decides who creates a file")]
    if spec.output.lock_url is not None:
        return [Check("output", "ok", f"{spec.output.path} can be written; the lock is at output.lock_url")]
    what = f"no conditional writes ({abilities.reason}): another cluster's run on it can't be kept out"
    return [Check("output", "warn", what, "set output.lock_url to a store that has them")]


# ---- for people and programs


def make_value(checks: Sequence[Check]) -> dict[str, Any]:
    """For programs. `exit_code` is 2 when something fails."""
    counts = {verdict: sum(check.verdict == verdict for check in checks) for verdict in ("ok", "warn", "fail")}
    state, exit_code = ("failed", 2) if counts["fail"] else ("ok", 0)
    return {
        "state": state,
        "exit_code": exit_code,
        "host": read_host(),
        **counts,
        "checks": [asdict(c) for c in checks],
    }


def make_rows(checks: Iterable[Check]) -> list[tuple[str, str, str]]:
    """(verdict, name, what and mend) for a table."""
    return [(c.verdict, c.name, f"{c.what}\n-> {c.mend}" if c.mend else c.what) for c in checks]


def print_checks(console: Any, checks: Sequence[Check]) -> None:
    """A table on a rich console."""
    from rich.table import Table
    from rich.text import Text

    styles = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    table = Table(title=read_host(), title_justify="left")
    for column in ("", "what", "found"):
        table.add_column(column, overflow="fold")
    for verdict, name, text in make_rows(checks):
        table.add_row(Text(verdict, style=styles[verdict]), Text(name), Text(text))
    cast(Any, console).print(table)
