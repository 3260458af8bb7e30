"""Will this node carry this engine? What `doctor` prints, and what an engine asks before it starts: facts of node and
checkpoint are gathered here and judged by `preflight` and `preflight_model`. Blocks for seconds; imports no engine.
"""

from batchgen.errors import SpecError, StorageError
from batchgen.paths import expand_home
from batchgen.preflight.checkpoint import CheckpointFacts
from batchgen.preflight.checkpoint_facts import read_checkpoint
from batchgen.preflight.facts import read_node
from batchgen.preflight.model import check_disk, check_files, check_model
from batchgen.preflight.preflight import Check, EngineNeeds, NodeFacts, check_machine, check_tensorrt_llm, make_error
from batchgen.spec import ModelSpec
from batchgen.specs.tensorrt_llm import TensorRTLLMEngineSpec
from batchgen.staging.staging import DEFAULT_FOLDER, find_copy, is_staged_first


def make_needs(section: TensorRTLLMEngineSpec, model: ModelSpec, max_tokens: int | None = None) -> EngineNeeds:
    """`max_tokens`: of a request; None counts with the longest that may come."""
    return EngineNeeds(
        num_gpus=section.tensor_parallel_size,
        has_attention_dp=section.enable_attention_dp,
        max_batch_size=section.max_batch_size,
        max_inflight=section.max_inflight,
        max_model_len=model.max_model_len,
        max_tokens=max_tokens,
        kv_dtype=section.kv_cache_dtype,
        kv_free_fraction=section.kv_cache_free_fraction,
        block_reuse=section.enable_block_reuse,
        chunked_prefill=section.enable_chunked_prefill,
        scheduler_policy=section.scheduler_policy,
        custom_tokenizer=section.custom_tokenizer,
    )


def preflight(
    model: ModelSpec,
    section: TensorRTLLMEngineSpec,
    *,
    node: NodeFacts | None = None,
    checkpoint: CheckpointFacts | None = None,
) -> list[Check]:
    """Before a TensorRT-LLM engine starts its processes. Raises the first thing that fails: SpecError where the
    spec must change, EngineDied where another node may do. The lines, warnings among them, where nothing fails. Takes
    seconds, and blocks: call it in a thread."""
    checks = check_trtllm(model, section, None, node, checkpoint)
    error = make_error(checks)
    if error is not None:
        raise error
    return checks


def check_trtllm(
    model: ModelSpec,
    section: TensorRTLLMEngineSpec,
    max_tokens: int | None,
    node: NodeFacts | None,
    checkpoint: CheckpointFacts | None,
) -> list[Check]:
    """All lines for a TensorRT-LLM engine; what is not given is looked at."""
    needs = make_needs(section, model, max_tokens)
    node = node or read_node(model.stage_dir or DEFAULT_FOLDER, needs.num_gpus)
    checks = [*check_machine(node), *check_tensorrt_llm(node, needs)]
    return [*checks, *check_checkpoint(model, node, needs, checkpoint)]


def check_checkpoint(
    model: ModelSpec,
    node: NodeFacts,
    needs: EngineNeeds | None,
    checkpoint: CheckpointFacts | None,
) -> list[Check]:
    """`needs` None: any engine that loads weights."""
    try:
        copy = find_copy(model)
    except (StorageError, SpecError) as error:
        return [Check("checkpoint", "fail", str(error), is_spec=True)]
    place = str(copy) if copy else model.path
    is_hub = not copy and not model.is_url and not expand_home(model.path).is_dir()
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
    if is_staged_first(model):
        checks.append(check_disk(sum(found.sizes.values()), node, is_copied=copy is not None))
    return checks
