"""Schemas for measuring prompts before any training: orders to a worker, and scores."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool

from tunery.spec import Columns

MOST_SHOTS = 32
"""Maximum number of examples in a prompt: more cost more than they gain, and a CPU takes hours to measure them."""
TIMED_ROWS = 20
"""The most rows sent again one at a time to measure latency; in a batch, a request's time includes the others'."""
METRICS = ("exact", "label_accuracy", "field_f1", "json_valid", "tool_calls", "tool_names", "chrf", "rouge_l")
"""Metrics that a target may name: those of the scorecard."""
BINARY_METRICS = frozenset({"exact", "label_accuracy", "json_valid", "tool_calls", "tool_names"})
"""Metrics that count each row as right or wrong."""

Shots = Annotated[int, Field(ge=0, le=MOST_SHOTS)]
Retrieval = Literal["none", "nearest"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ShotsOrder(_Part):
    """`shots_order.json`: which few-shot prompts to build for the rows of an eval file.

    `context`: token limit of a prompt with its answer. `max_new_tokens`: token limit of an answer.
    """

    shots: Literal["auto"] | list[Shots]
    retrieval: Retrieval = "none"
    seed: int = 0
    max_rows: int
    max_new_tokens: int | Literal["auto"] = "auto"
    context: int | None = None
    columns: Columns | None = None


class Variant(_Part):
    """A prompt format: `shots` examples before each question, either fixed or (`nearest`) the most similar to it."""

    shots: int
    nearest: bool = False
    error: str | None = Field(None, description="Why no prompts could be made")

    @property
    def name(self) -> str:
        """The name of its prompt file."""
        return f"{self.shots}-{'nearest' if self.nearest else 'shot'}"


class Prompts(_Part):
    """`shots.json`: the prompts that were built.

    `left_out`: number of examples left out because their question is also in an eval row.
    """

    variants: list[Variant]
    examples: int
    left_out: int
    limit: int = Field(description="Token limit of an answer")


class AnswerOrder(_Part):
    """`answer_order.json`: the prompts that a model is to answer.

    `tuned`: whether the model answers with its adapter. `given`: whether another program has given the answers, which
    then only need scoring.
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
    """The scores of a model with one prompt format. `error`: why it could not be measured."""

    shots: int
    nearest: bool
    rows: int = 0
    primary: str | None = Field(None, description="The task's primary metric")
    metrics: dict[str, Figure] = Field(default_factory=dict)
    prompt_tokens: float | None = Field(None, description="Mean per request")
    answer_tokens: float | None = Field(None, description="Mean per answer")
    p50_seconds: float | None = Field(None, description="Median time of a single request")
    device: str | None = Field(None, description="Device that answered, if the model ran here")
    error: str | None = None
