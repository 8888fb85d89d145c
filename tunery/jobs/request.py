"""The request for a job, from the API or from another part of the service."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, StringConstraints, ValidationError, model_validator
from pydantic_core import InitErrorDetails

from tunery.spec import (
    LEARNING_RATES,
    METHODS,
    CutAnswers,
    DpoKnobs,
    Hyperparameters,
    Int,
    Part,
    RequestedOptions,
    Seed,
    SupervisedKnobs,
)


class SupervisedHyperparameters(SupervisedKnobs, Hyperparameters):
    """OpenAI's settings of supervised training, and which tokens are learned."""


class Supervised(Part):
    hyperparameters: SupervisedHyperparameters = SupervisedHyperparameters()


class DpoHyperparameters(DpoKnobs, Hyperparameters):
    """OpenAI's settings of preference tuning, and its variants."""


class Preference(Part):
    hyperparameters: DpoHyperparameters = DpoHyperparameters()


class Method(Part):
    """How to train. `reinforcement` is known by name, so that it can be refused by name.

    A method of a plug-in has its object under its own name too, beside these.
    """

    model_config = ConfigDict(extra="allow", json_schema_extra={"additionalProperties": False})

    type: str = Field(json_schema_extra={"enum": ["supervised", "dpo", "reinforcement"]})
    supervised: Supervised | None = None
    dpo: Preference | None = None
    reinforcement: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _refuse_unknown(self) -> "Method":
        unknown = [
            InitErrorDetails(type="extra_forbidden", loc=(name,), input=value)
            for name, value in (self.model_extra or {}).items()
            if name not in METHODS
        ]
        if unknown:
            raise ValidationError.from_exception_data("Method", unknown)
        return self

    @property
    def given(self) -> dict[str, Any]:
        """The object of each method that has one, by the method's name."""
        return {name: value for name, value in self if name != "type" and value is not None}


class Wandb(Part):
    project: str = Field(min_length=1)
    name: str | None = None
    entity: str | None = None
    tags: list[Annotated[str, StringConstraints(max_length=64)]] = Field(default=[], max_length=50)


class WandbIntegration(Part):
    type: Literal["wandb"]
    wandb: Wandb


class Mlflow(Part):
    experiment_name: str = Field(min_length=1, max_length=255)
    run_name: str | None = Field(None, max_length=255, description="Absent: the job's id")


class MlflowIntegration(Part):
    """Tunery's own. Where MLflow is, its operator says: an address may hold a password, which no request may."""

    type: Literal["mlflow"]
    mlflow: Mlflow


Integration = Annotated[WandbIntegration | MlflowIntegration, Field(discriminator="type")]
"""An experiment tracker that receives a run's measurements."""


MetadataKey = Annotated[str, StringConstraints(max_length=64)]
MetadataValue = Annotated[str, StringConstraints(max_length=512)]


class OpenAIRequest(Part):
    """OpenAI's fields of a request."""

    model: str = Field(min_length=1, description="A base or fine-tuned model: its id, alias or the base's hub id")
    training_file: str = Field(min_length=1, description="A file with the purpose fine-tune")
    validation_file: str | None = None
    method: Method | None = Field(None, description="Absent: supervised")
    hyperparameters: Hyperparameters | None = Field(None, description="Deprecated: method.supervised.hyperparameters")
    suffix: str | None = Field(None, min_length=1, max_length=64, description="Part of the new model's name")
    seed: Seed | None = Field(None, description="Absent: chosen at random, and shown in the job")
    metadata: dict[MetadataKey, MetadataValue] | None = Field(None, max_length=16)
    integrations: list[Integration] | None = Field(None, max_length=5)


_LEAST_NORM = 1e-6
"""A gradient clipped to it has entries far below AdamW's epsilon (1e-8), so that nothing is learned."""
_MOST = 10**9
"""More rows, steps or questions than any run has."""


class JobRequest(RequestedOptions, OpenAIRequest):
    """A request for a fine-tune; `creation.create` makes a job of it."""

    # `TrainingOptions` has another default, for jobs of older releases: their snapshots depend on cut rows.
    cut_answers: CutAnswers = Field("limit", description=RequestedOptions.model_fields["cut_answers"].description)
    priority: Int = Field(0, ge=-10, le=10, description="Jobs with a higher priority run first")
    dry_run: bool = Field(False, description="Check only: returns what the job would be, and stores nothing")
    allow_test_on_training_file: bool = Field(
        False,
        description="Accept a test file that equals the training file, so that the scorecard measures only "
        "memorisation",
    )

    # Not bounds of the fields, which stored specs have too: jobs of older releases may be beyond them.
    @model_validator(mode="after")
    def _within_bounds(self) -> Self:
        faults = list(_beyond(self))
        if faults:
            raise ValidationError.from_exception_data("JobRequest", faults)
        return self


def _beyond(request: JobRequest) -> Iterator[InitErrorDetails]:
    """Yields the error for each setting with which no run could do anything sensible."""
    rate, norm = request.learning_rate, request.max_grad_norm
    if rate is not None and rate < LEARNING_RATES[0]:
        yield _too_small(rate, LEARNING_RATES[0], "learning_rate")
    if norm < _LEAST_NORM:
        yield _too_small(norm, _LEAST_NORM, "max_grad_norm")
    evaluation = request.evaluation
    counts = {
        ("evaluation", "every_steps"): evaluation.every_steps,
        ("evaluation", "max_rows"): evaluation.max_rows,
        ("evaluation", "general", "items"): evaluation.general.items,
        ("evaluation", "general", "prompts"): evaluation.general.prompts,
    }
    for place, count in counts.items():
        if count != "auto" and count > _MOST:
            yield InitErrorDetails(type="less_than_equal", loc=place, input=count, ctx={"le": _MOST})


def _too_small(value: float, least: float, name: str) -> InitErrorDetails:
    return InitErrorDetails(type="greater_than_equal", loc=(name,), input=value, ctx={"ge": least})
