"""What a served model can do, found out from its sections and its tokenizer's files; no engine is started."""

from batchgen.engines import create_tokenizer, list_refused
from batchgen.serve.batch_spec import PROMPT_COLUMNS, make_batch_spec
from batchgen.serve.body_sampling import Abilities
from batchgen.serve.spec import ServedModel


def find_abilities(served: ServedModel, max_choices: int = 128) -> Abilities:
    """Loads the tokenizer, which may take seconds. Raises SpecError where that is impossible. Without a tokenizer here the
    server is trusted with tools and thinking; logprobs need one, for the API tells tokens by their text."""
    forms = served.engine.prompt_forms
    form = next(form for form in PROMPT_COLUMNS if form in forms)
    tokenizer = create_tokenizer(make_batch_spec(served, form, input_url="/-", out_url="/-"))
    refused = list_refused(served.engine)
    return Abilities(
        forms=forms,
        refused=refused,
        guided_forms=served.engine.guided_forms,
        has_logprobs="logprobs" not in refused and tokenizer is not None,
        can_use_tools=not served.engine.has_tool_calls and (tokenizer is None or tokenizer.can_use_tools),
        can_think=tokenizer is None or tokenizer.think_end is not None,
        max_choices=max_choices,
    )
