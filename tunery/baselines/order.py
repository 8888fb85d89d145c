"""What a baseline is asked to measure."""

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator

from tunery.planning.prompting import METRICS, MOST_SHOTS, Retrieval, Shots
from tunery.spec import NO_BOOLEAN, Columns

Metric = Literal["exact", "label_accuracy", "field_f1", "json_valid", "tool_calls", "tool_names", "chrf", "rouge_l"]
assert get_args(Metric) == METRICS
_MOST_NUMBERS = 8
Int = Annotated[int, NO_BOOLEAN]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Target(_Part):
    """What is good enough: with it the advice stops at the cheapest thing that meets it."""

    metric: Metric | None = Field(None, description="Absent: the task's primary metric")
    at_least: Annotated[float, Field(ge=0, le=1), NO_BOOLEAN] = Field(description="0.9 is 90 %")


class Price(_Part):
    """What an external endpoint asks for a million tokens, in the currency of the server's own prices."""

    prompt: Annotated[float, Field(ge=0), NO_BOOLEAN]
    answer: Annotated[float, Field(ge=0), NO_BOOLEAN]


class External(_Part):
    """A model behind somebody else's OpenAI-compatible endpoint."""

    base_url: str = Field(min_length=1, description="The base_url of a client, such as https://api.example.com/v1")
    model: str = Field(min_length=1, max_length=256)
    price_per_million: Price | None = Field(
        None, description="Prices of prompt and answer tokens; absent: no cost is shown"
    )


class BaselineOptions(_Part):
    """How a baseline measures, without the objects that it names."""

    shots: Literal["auto"] | list[Shots] = Field(
        "auto",
        description=f"Numbers of examples in a prompt, 0 to {MOST_SHOTS}; auto: none, and as many as fit into the "
        "base's context",
    )
    retrieval: Retrieval = Field("none", description="nearest: also with the examples most similar to each question")
    max_rows: Int = Field(200, ge=1, le=1000, description="Maximum number of eval rows, from the file's start")
    max_new_tokens: Annotated[int, Field(ge=1, le=4096), NO_BOOLEAN] | Literal["auto"] = Field(
        "auto", description="Token limit of an answer; auto: set by the longest expected one"
    )
    seed: Int = Field(0, ge=0, le=2**31 - 1, description="Seed of the choice of examples")
    target: Target | None = None
    columns: Columns | None = Field(None, description="The files' columns by part, if they have other names")

    @field_validator("shots", mode="before")
    @classmethod
    def _are_numbers(cls, value: Any) -> Any:
        # Why here and not by the type: of a union's faults pydantic names that of the first member alone.
        fits = isinstance(value, list) and all(type(one) is int and 0 <= one <= MOST_SHOTS for one in value)
        if value != "auto" and not (fits and 0 < len(value) <= _MOST_NUMBERS):
            raise ValueError(f"should be 'auto', or a list of one to {_MOST_NUMBERS} numbers from 0 to {MOST_SHOTS}")
        return value


class Order(BaselineOptions):
    """`order` of a stored baseline. `compare`: ids of other models."""

    compare: list[str] = Field(default_factory=list)
    external: External | None = None

    @property
    def shows_examples(self) -> bool:
        """Whether some prompts are asked for that cannot do without examples."""
        return self.retrieval != "none" or (self.shots != "auto" and any(self.shots))
