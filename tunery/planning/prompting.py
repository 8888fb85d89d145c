"""Prompting measured before any training: what is asked of a model, and the figures that come of it."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool

MOST_SHOTS = 32
"""Examples that a prompt has at most: beyond, prompts cost more than they gain, and a CPU measures them for hours."""
METRICS = ("exact", "label_accuracy", "field_f1", "json_valid", "tool_calls", "tool_names", "chrf", "rouge_l")
"""What a target may name: the metrics of the scorecard."""
SHARES = frozenset({"exact", "label_accuracy", "json_valid", "tool_calls", "tool_names"})
"""Metrics that count each row as right or wrong."""

Shots = Annotated[int, Field(ge=0, le=MOST_SHOTS)]
Retrieval = Literal["none", "nearest"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ShotsOrder(_Part):
    """`shots_order.json`: which prompts are to be made of an eval file's rows.

    `context`: tokens that a prompt and its answer may have together; `max_new_tokens`: those of an answer.
    """

    shots: Literal["auto"] | list[Shots]
    retrieval: Retrieval = "none"
    seed: int = 0
    max_rows: int
    max_new_tokens: int | Literal["auto"] = "auto"
    context: int | None = None


class Variant(_Part):
    """One way to prompt: `shots` examples before each question, the same ones for all questions or each its nearest."""

    shots: int
    nearest: bool = False
    error: str | None = Field(None, description="Why no prompts could be made")

    @property
    def name(self) -> str:
        """The name of the file of its prompts."""
        return f"{self.shots}-{'nearest' if self.nearest else 'shot'}"


class Prompts(_Part):
    """`shots.json`: the prompts that were made. `left_out`: examples that ask what an eval row asks."""

    variants: list[Variant]
    examples: int
    left_out: int
    limit: int = Field(description="Tokens that an answer may have")


class AnswerOrder(_Part):
    """`answer_order.json`: the prompts that a model is to answer. `tuned`: with its adapter.

    `given`: another program has answered already, and only its answers are to be scored.
    """

    variants: list[Variant]
    tuned: StrictBool = False
    given: StrictBool = False


class Figure(_Part):
    """A metric of one model with its 95 % interval."""

    score: float
    low: float | None
    high: float | None


class PromptScore(_Part):
    """What a way to prompt a model came to. `error`: why it could not be measured."""

    shots: int
    nearest: bool
    rows: int = 0
    primary: str | None = Field(None, description="The metric to reach for first")
    metrics: dict[str, Figure] = Field(default_factory=dict)
    prompt_tokens: float | None = Field(None, description="Mean of a request")
    answer_tokens: float | None = Field(None, description="Mean of an answer")
    p50_seconds: float | None = Field(None, description="Median time of a request that is alone")
    device: str | None = Field(None, description="What answered, where it was here")
    error: str | None = None
