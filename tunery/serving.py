"""What API and model server tell each other: which model answers and where its files lie, and how fast answers came.

The user's own body travels as it is, with a `Chosen` beside its fields under the name MODEL_FIELD.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import to_json

MODEL_FIELD = "tunery_model"
TEXT_FIELD = "tunery_text"
"""A text to go on from, in place of `messages`."""

_SHA256 = Field(pattern="^[0-9a-f]{64}$")


class _Sealed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Files(_Sealed):
    """A model's folder in storage: under `prefix`, listed by the manifest with this sha256."""

    id: str
    prefix: str
    manifest_sha256: Annotated[str, _SHA256]


class TunedFiles(Files):
    """What a job made: an adapter on the base, or (`full`) a whole model of its own."""

    technique: Literal["full", "lora", "qlora"]


class Chosen(_Sealed):
    """The model of a request, found and authorised by the API. `tuned` is null when the base itself answers."""

    base: Files
    tuned: TunedFiles | None = None
    project_id: str | None = Field(None, description="Who asks: no keys and values are shared with others")

    @property
    def weights(self) -> Files:
        """The folder that whole weights come from: a full fine-tune is its own base."""
        return self.tuned if self.tuned and self.tuned.technique == "full" else self.base

    @property
    def adapter(self) -> Files | None:
        return None if self.tuned is None or self.tuned.technique == "full" else self.tuned

    @property
    def template(self) -> Files:
        """The folder whose tokenizer and chat template render the prompt: the run's own where there was a run."""
        return self.tuned or self.base


Way = Literal["merged", "adapter", "many_merged", "many_adapters"]
"""What shared the passes: one whole model, one adapter beside its base, several whole models, or several adapters."""


class Rate(_Sealed):
    """What one way to serve a base has come to since the model server began. `passes` took `seconds` together."""

    base: str
    way: Way
    tokens: int
    seconds: float
    passes: int


class Rates(_Sealed):
    """What the model server has measured. `device`: as its driver names it, or cpu."""

    device: str
    rates: list[Rate]


def encode(body: Mapping[str, Any], chosen: Chosen) -> bytes:
    """Returns the body that the model server gets. A MODEL_FIELD of the user's own is replaced."""
    return to_json({**body, MODEL_FIELD: chosen})
