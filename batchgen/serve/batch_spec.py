"""The JobSpec of a batch: the served model's sections, over a Parquet input with the columns that `bodies` makes. Pure."""

from batchgen.serve.spec import ServedModel
from batchgen.spec import InputSpec, JobSpec, OutputSpec, PromptSpec
from batchgen.specs.sections import PromptForm

CUSTOM_ID, SAMPLING, TOOLS = "custom_id", "sampling", "tools"
PROMPT_COLUMNS: dict[PromptForm, str] = {"messages": "messages", "text": "prompt", "token_ids": "prompt_token_ids"}
# What of an input row its answer's line is made of, beside the answer.
PASSTHROUGH = ("line", "choice", "samples", "refusal")


def make_batch_spec(
    served: ServedModel,
    form: PromptForm,
    *,
    input_url: str,
    out_url: str,
    has_tools: bool = False,
    has_sampling: bool = True,
    custom_id: str | None = CUSTOM_ID,
    passthrough: tuple[str, ...] = PASSTHROUGH,
) -> JobSpec:
    """The job. Keys were looked at line by line when the input was made, and rows of one line share theirs. Raises
    pydantic's ValidationError for sections that don't fit each other."""
    column = PROMPT_COLUMNS[form]
    prompt = PromptSpec(
        messages=column if form == "messages" else None,
        column=column if form == "text" else None,
        prompt_token_ids=column if form == "token_ids" else None,
        chat=form == "messages",
        sampling=SAMPLING if has_sampling else None,
        tools=TOOLS if has_tools else None,
    )
    rows = InputSpec(paths=(input_url,), custom_id=custom_id, passthrough=passthrough, check_unique="never")
    output = OutputSpec(
        path=out_url, journal_interval_s=served.journal_interval_s, rows_per_shard=served.rows_per_shard
    )
    return JobSpec(
        input=rows,
        prompt=prompt,
        model=served.model,
        engine=served.engine,
        sampling=served.sampling,
        output=output,
        cluster=served.cluster,
        retry=served.retry,
    )


def make_served_spec(served: ServedModel) -> JobSpec:
    """Of no batch: for what an engine and its tokenizer are made of. Raises as `make_batch_spec` does."""
    form = next(form for form in PROMPT_COLUMNS if form in served.engine.prompt_forms)
    return make_batch_spec(served, form, input_url="/-", out_url="/-")
