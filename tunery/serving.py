"""The messages between API and model server: which model answers, where its files are, and measured rates.

The user's body is sent unchanged, with a `Chosen` added as the field MODEL_FIELD.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import to_json

MODEL_FIELD = "tunery_model"
LOAD_ROUTE = "/v1/load"
"""Where a `Chosen` is sent whose first request is expected."""
TEXT_FIELD = "tunery_text"
"""A text to continue, in place of `messages`."""

_SHA256 = Field(pattern="^[0-9a-f]{64}$")


class _Sealed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Files(_Sealed):
    """A model's folder in storage: under `prefix`, listed by the manifest with this sha256."""

    id: str
    prefix: str
    manifest_sha256: Annotated[str, _SHA256]


class TunedFiles(Files):
    """The files of a job's model: an adapter on the base, or (`full`) a whole model."""

    technique: Literal["full", "lora", "qlora"]


class Chosen(_Sealed):
    """The model of a request, found and authorised by the API. `tuned` is null when the base itself answers."""

    base: Files
    tuned: TunedFiles | None = None
    project_id: str | None = Field(None, description="Who asks: no keys and values are shared with others")

    @property
    def weights(self) -> Files:
        """The folder of the base weights; a full fine-tune is its own base."""
        return self.tuned if self.tuned and self.tuned.technique == "full" else self.base

    @property
    def adapter(self) -> Files | None:
        return None if self.tuned is None or self.tuned.technique == "full" else self.tuned

    @property
    def template(self) -> Files:
        """The folder of the tokenizer and chat template for the prompt: that of the tuned model, if there is one."""
        return self.tuned or self.base


Way = Literal["merged", "adapter", "many_merged", "many_adapters"]
"""The models that shared forward passes: one whole model, one adapter, several whole models, or several adapters."""


class Rate(_Sealed):
    """Measurements of one way to serve a base, since the model server started. All `passes` together took `seconds`."""

    base: str
    way: Way
    tokens: int
    seconds: float
    passes: int


class Rates(_Sealed):
    """The model server's measurements. `device`: its driver's name, or cpu."""

    device: str
    rates: list[Rate]


def encode(body: Mapping[str, Any], chosen: Chosen) -> bytes:
    """Returns the body for the model server. A MODEL_FIELD in the user's body is replaced."""
    return to_json({**body, MODEL_FIELD: chosen})
