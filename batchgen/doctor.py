"""`batchgen doctor`: looks at this node, and at what a spec asks of it, before an hour of loading does.

`examine` gathers facts (`node_facts`, `checkpoint_facts`) and lets `preflight` judge them; `preflight` is the same for an
engine that is about to start, and raises. A line for whatever can't be looked at; only a bug raises.
"""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from batchgen.checkpoint import CheckpointFacts
from batchgen.checkpoint_facts import read_checkpoint
from batchgen.engine_specs import OpenAIEngineSpec, TransformersEngineSpec
from batchgen.errors import BatchgenError, OutputError, SpecError, StorageError
from batchgen.node_facts import read_host, read_node
from batchgen.preflight import (
    Check,
    EngineNeeds,
    NodeFacts,
    check_gpus,
    check_machine,
    check_mpi,
    check_tensorrt_llm,
    check_transformers,
    make_error,
)
from batchgen.preflight_model import check_disk, check_files, check_model
from batchgen.sections import EngineSection
from batchgen.spec import JobSpec, ModelSpec
from batchgen.staging import DEFAULT_FOLDER, find_copy, is_staged_first
from batchgen.storage import Storage
from batchgen.stores.probe import probe

TENSORRT_LLM = "tensorrt_llm"
SERVER_TIMEOUT_S = 5.0


def make_needs(section: EngineSection, model: ModelSpec, max_tokens: int | None = None) -> EngineNeeds:
    """Of a TensorRT-LLM section. `max_tokens`: of a request; None counts with the longest that may come."""
    fields: dict[str, Any] = section.model_dump()
    return EngineNeeds(
        num_gpus=fields["tensor_parallel_size"],
        has_attention_dp=fields.get("enable_attention_dp", True),
        max_batch_size=fields.get("max_batch_size", 128),
        max_inflight=section.max_inflight,
        max_model_len=model.max_model_len,
        max_tokens=max_tokens,
        kv_dtype=fields.get("kv_cache_dtype", "fp8"),
        kv_free_fraction=fields.get("kv_cache_free_fraction", 0.8),
        block_reuse=fields.get("enable_block_reuse", "auto"),
        chunked_prefill=fields.get("enable_chunked_prefill", "auto"),
        scheduler_policy=fields.get("scheduler_policy", "GUARANTEED_NO_EVICT"),
        custom_tokenizer=fields.get("custom_tokenizer", "deepseek_v32"),
    )


def preflight(
    model: ModelSpec,
    section: EngineSection,
    *,
    node: NodeFacts | None = None,
    checkpoint: CheckpointFacts | None = None,
) -> list[Check]:
    """For a TensorRT-LLM engine, before it starts its processes. Raises the first thing that fails: SpecError where the
    spec must change, EngineDied where another node may do. The lines, warnings among them, where nothing fails. Takes
    seconds, and blocks: call it in a thread."""
    checks = _check_trtllm(model, section, None, node, checkpoint)
    error = make_error(checks)
    if error is not None:
        raise error
    return checks


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
    if section.kind == TENSORRT_LLM:
        return _check_trtllm(spec.model, section, spec.sampling.max_tokens, node, None)
    node = node or read_node(spec.model.stage_dir or DEFAULT_FOLDER)
    checks = check_machine(node)
    if isinstance(section, TransformersEngineSpec):
        checks += check_transformers(node, section.device)
        checks += _check_checkpoint(spec.model, None, node, None, None)
    elif isinstance(section, OpenAIEngineSpec):
        checks += asyncio.run(check_servers(spec.model, section))
    return checks


def _check_trtllm(
    model: ModelSpec,
    section: EngineSection,
    max_tokens: int | None,
    node: NodeFacts | None,
    checkpoint: CheckpointFacts | None,
) -> list[Check]:
    needs = make_needs(section, model, max_tokens)
    node = node or read_node(model.stage_dir or DEFAULT_FOLDER, needs.num_gpus)
    weights_dir: str | None = getattr(section, "weights_dir", None)
    checks = [*check_machine(node), *check_tensorrt_llm(node, needs)]
    return [*checks, *_check_checkpoint(model, weights_dir, node, needs, checkpoint)]


# ---- the model


def _check_checkpoint(
    model: ModelSpec,
    weights_dir: str | None,
    node: NodeFacts,
    needs: EngineNeeds | None,
    checkpoint: CheckpointFacts | None,
) -> list[Check]:
    """`needs` None: any engine that loads weights."""
    try:
        copy = None if weights_dir else find_copy(model)
    except (StorageError, SpecError) as error:
        return [Check("checkpoint", "fail", str(error), is_spec=True)]
    place = weights_dir or (str(copy) if copy else model.path)
    is_hub = not copy and not weights_dir and not model.is_url and not Path(model.path).expanduser().is_dir()
    if checkpoint is None and is_hub:
        if model.path.startswith(("/", ".", "~")) or model.path.count("/") > 1:
            return [Check("checkpoint", "fail", f"{model.path} is not a folder on this machine", "correct model.path")]
        what = (
            f"{model.path} is not in this node's hub cache: it is downloaded at the start and can't be looked at before"
        )
        return [Check("checkpoint", "warn", what, "run: batchgen stage SPEC")]
    try:
        found = checkpoint or read_checkpoint(place)
    except (StorageError, SpecError) as error:
        return [Check("checkpoint", "fail", str(error), is_spec=True)]
    checks = check_files(found) if needs is None else check_model(found, needs, node)
    if is_staged_first(model) and not weights_dir:
        checks.append(check_disk(sum(found.sizes.values()), node, is_copied=copy is not None))
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
