"""What every section of a spec is, and what every engine's section has. Pure; knows no kind of engine."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from batchgen.urls import check_url

Url = Annotated[str, AfterValidator(check_url)]
PromptForm = Literal["text", "messages", "token_ids"]
GuidedForm = Literal["json_schema", "regex", "grammar"]
TokenBudget = Literal["auto", "off"] | Annotated[int, Field(ge=1)]
EVERY_FORM: frozenset[PromptForm] = frozenset({"text", "messages", "token_ids"})


class Section(BaseModel):
    """Refused input is not quoted: it may be a prompt or a secret."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class EngineSection(Section):
    """What every engine's section has. A subclass gives `kind` a Literal of its own."""

    kind: str
    max_inflight: int = Field(default=128, ge=1, description="Requests sent and not answered (requests).")
    token_budget: TokenBudget = Field(
        default="off",
        description="How much of max_tokens to ask for at first (tokens); an answer that is cut off goes on, doubling. "
        "auto: as the lengths of an earlier run say (input.length_prior), else 8192; off: all at once.",
    )

    def fingerprint_fields(self) -> dict[str, Any]:
        """The fields that make the data, `kind` among them, as plain JSON values. Tuning stays out."""
        return {"kind": self.kind}

    @property
    def has_tokenizer(self) -> bool:
        """Are prompts rendered and tokenised on our side? If not, the engine gets each row's prompt as it is."""
        return True

    @property
    def prompt_forms(self) -> frozenset[PromptForm]:
        """Which forms of prompt the engine takes, as it is set up here."""
        return EVERY_FORM

    @property
    def guided_forms(self) -> frozenset[GuidedForm]:
        """What answers can be held to, as it is set up here, by an engine that can guide them at all."""
        return frozenset({"json_schema", "regex", "grammar"})

    @property
    def unheeded_fields(self) -> frozenset[str]:
        """Sampling fields that its kind can honour, and not as it is set up here: they are refused."""
        return frozenset()

    @property
    def num_gpus(self) -> int:
        """How many one engine takes, where its fields say so (GPUs). 0: they don't."""
        return 0

    @property
    def max_start_s(self) -> float:
        """How long the engine itself gives its start (s); the driver must wait longer. 0: it doesn't say."""
        return 0.0

    @property
    def max_silence_s(self) -> float:
        """How long it may make no token and end no row while it mends itself (s); the driver must wait longer."""
        return 0.0

    @property
    def has_tool_calls(self) -> bool:
        """Does the section itself give tools to every request? Then the output has the column `tool_calls`."""
        return False
