"""What a served model can do, found out from its sections and its tokenizer; no engine is started."""

from batchgen.engines import list_refused
from batchgen.engines.base import Tokenizer
from batchgen.serve.body_sampling import Abilities
from batchgen.serve.spec import ServedModel


def find_abilities(served: ServedModel, tokenizer: Tokenizer | None, max_choices: int = 128) -> Abilities:
    """Without a tokenizer here the server is trusted with tools and thinking; logprobs need one, for the API tells tokens
    by their text."""
    refused = list_refused(served.engine)
    return Abilities(
        forms=served.engine.prompt_forms,
        refused=refused,
        guided_forms=served.engine.guided_forms,
        has_logprobs="logprobs" not in refused and tokenizer is not None,
        can_use_tools=not served.engine.has_tool_calls and (tokenizer is None or tokenizer.can_use_tools),
        can_think=tokenizer is None or tokenizer.think_end is not None,
        max_choices=max_choices,
    )
