"""Fine-tuning jobs, as the API spells them: OpenAI's fields in OpenAI's order, then Tunery's own."""

import math
import time
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from api.schemas.base import Body, ResponseBody, answer_of, maybe_seconds, of_stored, seconds
from tunery.jobs import model
from tunery.jobs.request import DpoHyperparameters, JobRequest, SupervisedHyperparameters
from tunery.jobs.states import State
from tunery.planning.quote import Actual, Quote
from tunery.spec import Hyperparameters, RequestedOptions, Technique, TrainingOptions
from tunery.trainer_protocol import Scorecard, Served

# --- what is asked for --------------------------------------------------------------------------------------------

# The page at /docs sends the project's newest training files in place of these (`api/web/docs.js`).
CREATE_EXAMPLES: dict[str, Any] = {
    "plain": {
        "summary": "Defaults: a LoRA whose settings are chosen from the data",
        "value": {"model": "SmolLM2-135M-Instruct", "training_file": "file-abc123"},
    },
    "lora": {
        "summary": "LoRA with its settings, validation and early stopping",
        "value": {
            "model": "SmolLM2-135M-Instruct",
            "training_file": "file-abc123",
            "validation_file": "file-def456",
            "suffix": "banking",
            "seed": 42,
            "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3, "batch_size": 8}}},
            "technique": {"type": "lora", "r": 16, "alpha": 32, "target_modules": "all-linear"},
            "learning_rate": 0.001,
            "early_stopping": {"patience": 3},
            "select": "best",
            "metadata": {"team": "search"},
        },
    },
    "qlora": {
        "summary": "QLoRA on the textbook's layers",
        "value": {
            "model": "SmolLM2-135M-Instruct",
            "training_file": "file-abc123",
            "technique": {"type": "qlora", "r": 8, "alpha": 32, "dropout": 0.1, "target_modules": ["q_proj", "v_proj"]},
        },
    },
    "dpo": {
        "summary": "Preference tuning on pairs of answers",
        "value": {
            "model": "SmolLM2-135M-Instruct",
            "training_file": "file-abc123",
            "method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.1, "n_epochs": 1}}},
        },
    },
}


class CreateJob(JobRequest, Body):
    """A request for a fine-tune. The fields after `integrations` are Tunery's own; with the official client they go
    into `extra_body`."""

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        """A client that has no value for a field sends null or nothing; both mean the default."""
        return _without_nulls(data, cls.model_fields)


def _without_nulls(data: Any, names: Collection[str] | None = None) -> Any:
    if isinstance(data, list):
        return [_without_nulls(item) for item in data]
    if not isinstance(data, dict):
        return data
    return {
        name: value if name == "metadata" else _without_nulls(value)
        for name, value in data.items()
        if value is not None or (names is not None and name not in names)
    }


class RerunJob(CreateJob):
    """What is to be other than in the job that runs again: any field of a create request. The fields of an object are
    merged with those that the job had."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"seed": 7, "learning_rate": 0.0005}]})

    model: str | None = Field(None, min_length=1)  # type: ignore[assignment]  # the job has one
    training_file: str | None = Field(None, min_length=1)  # type: ignore[assignment]

    @property
    def changes(self) -> dict[str, Any]:
        """Only what was sent."""
        sent = self.model_dump(mode="json", exclude_unset=True)
        return {name: value for name, value in sent.items() if value is not None}


class PublishModel(Body):
    model_config = ConfigDict(
        json_schema_extra={"examples": [{"reason": "The general drop is on science questions; we route tickets"}]}
    )

    reason: str = Field(min_length=1, max_length=1000, description="The reason, which is stored with the job")


# --- what is answered ---------------------------------------------------------------------------------------------

QUOTE: dict[str, Any] = {
    "device": "NVIDIA H200",
    "gpus": 1,
    "seconds": {"low": 31.0, "expected": 36.5, "high": 43.8},
    "gpu_hours": {"low": 0.0086, "expected": 0.0101, "high": 0.0122},
    "cost": {"low": 0.0388, "expected": 0.0456, "high": 0.0547},
    "currency": "USD",
    "parts": {"start": 24.1, "training": 8.4, "evaluation": 0.0, "saving": 4.0, "export": 0.0},
    "tokens": 189844,
    "tokens_from": "report",
    "speed_from": "same",
    "measured": ["ftjob-def456"],
    "basis": "Tokens are those of the file's report; the speed is that of the last run here of this base ...",
    "at_creation": None,
}
JOB: dict[str, Any] = {
    "object": "fine_tuning.job",
    "id": "ftjob-abc123",
    "model": "SmolLM2-135M-Instruct",
    "created_at": 1721764800,
    "finished_at": None,
    "fine_tuned_model": None,
    "organization_id": "tunery",
    "result_files": [],
    "status": "validating_files",
    "validation_file": None,
    "training_file": "file-abc123",
    "hyperparameters": {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"},
    "method": {
        "type": "supervised",
        "supervised": {
            "hyperparameters": {
                "n_epochs": "auto",
                "batch_size": "auto",
                "learning_rate_multiplier": "auto",
                "loss_on": "assistant",
            }
        },
    },
    "metadata": None,
    "error": None,
    "seed": 683058546,
    "trained_tokens": None,
    "estimated_finish": None,
    "integrations": [],
    "user_provided_suffix": None,
    "usage_metrics": None,
    "shared_with_openai": False,
    "base_model": "SmolLM2-135M-Instruct",
    "rerun_of": None,
    "waits_for": "a worker to read its files",
    "phase": None,
    "progress": {"step": 0, "total_steps": None},
    **RequestedOptions().model_dump(mode="json"),
    "priority": 0,
    "scorecard": None,
    "served": None,
    "quote": QUOTE,
    "actual": None,
    "warnings": [],
}


class JobError(ResponseBody):
    code: str
    message: str
    param: str | None


class SupervisedEcho(ResponseBody):
    hyperparameters: SupervisedHyperparameters


class MethodEcho(ResponseBody):
    type: Literal["supervised"] = "supervised"
    supervised: SupervisedEcho


class DpoEcho(ResponseBody):
    hyperparameters: DpoHyperparameters


class PreferenceEcho(ResponseBody):
    """Preference tuning, `beta` and `loss` among its hyperparameters."""

    type: Literal["dpo"] = "dpo"
    dpo: DpoEcho


class OtherMethodEcho(ResponseBody):
    """A method of a plug-in, its hyperparameters under its own name."""

    model_config = ConfigDict(extra="allow", frozen=True)

    type: str


class GateCheck(ResponseBody):
    """A limit of the gate, and what was measured with its 95 % interval."""

    name: str
    limit: float
    value: float | None
    low: float | None
    high: float | None
    status: Literal["passed", "failed", "inconclusive"]


class Published(ResponseBody):
    """Who published a withheld model against its gate, and why."""

    reason: str
    key: str
    at: int


class GateAnswer(ResponseBody):
    """The gate as it was asked for, and what came of it."""

    min_task_gain: float | None
    max_general_drop: float | None
    max_kl: float | None
    on_inconclusive: Literal["publish", "withhold"]
    status: Literal["passed", "failed", "inconclusive"] | None = Field(
        None, description="Null until the model has been evaluated"
    )
    checks: list[GateCheck] = []
    withheld_model: str | None = Field(
        None, description="The model that the gate withholds; `fine_tuned_model` is null until it is published"
    )
    published: Published | None = None


class ServedAnswer(Served):
    """Whether the model server gave the answers of the scorecard, and what came of it."""

    withheld_model: str | None = Field(
        None, description="The model that this check withholds; `fine_tuned_model` is null until it is published"
    )
    published: Published | None = None


class Progress(ResponseBody):
    """How far a run is. More keys than these two come with the run."""

    model_config = ConfigDict(extra="allow", frozen=True)

    step: int
    total_steps: int | None


class OpenAIJob(ResponseBody):
    """OpenAI's fields of a job, and how far its run is."""

    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    id: str
    model: str = Field(description="As given in the request: a fine-tuned model, an alias or a base's id")
    created_at: int
    finished_at: int | None
    fine_tuned_model: str | None
    organization_id: str
    result_files: list[str]
    status: Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
    validation_file: str | None
    training_file: str
    hyperparameters: Hyperparameters = Field(description='"auto" until the files have been read, then a number')
    method: MethodEcho | PreferenceEcho | OtherMethodEcho
    metadata: dict[str, str] | None
    error: JobError | None
    seed: int
    trained_tokens: int | None
    estimated_finish: int | None
    integrations: list[dict[str, Any]]
    user_provided_suffix: str | None
    usage_metrics: None = None
    shared_with_openai: Literal[False] = False

    base_model: str = Field(description="The base's own id, whichever name the request used")
    rerun_of: str | None = Field(description="The job of which this one is a rerun")
    waits_for: str | None = Field(description="Why a job has not started yet")
    phase: str | None = Field(description="What a running job is doing")
    progress: Progress


if TYPE_CHECKING:
    _Answered = TrainingOptions[Technique | None, float | None]
else:
    _Answered = answer_of(
        TrainingOptions[Technique | None, float | None],
        technique="As requested; the decided values once the files have been read",
        learning_rate="The peak learning rate, once it is decided",
    )


class Job(_Answered, OpenAIJob):
    model_config = ConfigDict(json_schema_extra={"examples": [JOB]})

    gate: GateAnswer | None = Field(description="The conditions for publishing the model, and the result")  # type: ignore[assignment]  # an answer says more
    priority: int
    scorecard: Scorecard | None = Field(description="Base and tuned model on the same test rows")
    served: ServedAnswer | None = Field(
        description="Whether the model server reproduced the tuned model's answers before the model was published"
    )
    quote: Quote | None = Field(description="Expected time and cost of the run")
    actual: Actual | None = Field(description="Actual time and cost, once a run of the job has ended")
    warnings: list[str]


_KNOBS = ("n_epochs", "batch_size", "learning_rate_multiplier")


def status_of(row: model.Job) -> str:
    """A running job that was asked to pause reads paused from then on, though its save takes a moment."""
    return State.PAUSED.value if row.state == State.RUNNING and row.pause_requested == "pause" else row.state


def of(row: model.Job, *, organization: str, warnings: Sequence[str], waits_for: str | None) -> Job:
    """Returns a job's row as its owner sees it."""
    settled = row.plan or row.spec
    knobs = Hyperparameters(**{name: row.plan[name] for name in _KNOBS} if row.plan else row.spec["hyperparameters"])
    shown = dict(
        id=row.id,
        model=row.model_name,
        created_at=seconds(row.created_at),
        finished_at=maybe_seconds(row.finished_at),
        fine_tuned_model=None if row.withholds_model else row.tuned_model,
        organization_id=organization,
        result_files=[row.result_file] if row.result_file else [],
        status=status_of(row),
        validation_file=row.validation_file,
        training_file=row.training_file,
        hyperparameters=knobs,
        method=_method(settled, knobs),
        metadata=row.user_metadata,
        error=_error_of(row),
        seed=settled["seed"],
        trained_tokens=row.trained_tokens,
        estimated_finish=_estimated_finish(row),
        integrations=row.integrations,
        user_provided_suffix=row.suffix,
        base_model=row.base_model,
        rerun_of=row.rerun_of,
        waits_for=waits_for,
        phase=row.phase,
        progress=Progress(**{**row.progress, "step": row.step, "total_steps": row.total_steps}),
        priority=row.priority,
        scorecard=None if row.scorecard is None else Scorecard.model_validate(row.scorecard),
        served=_served(row),
        quote=None if row.quote is None else Quote.model_validate(row.quote),
        actual=None if row.actual is None else Actual.model_validate(row.actual),
        warnings=list(warnings),
        **(_options(settled) | {"gate": _gate(row, settled.get("gate"))}),
    )
    return of_stored(Job, shown)


def _gate(row: model.Job, asked: dict[str, Any] | None) -> GateAnswer | None:
    if asked is None:
        return None
    found = row.gate or {}
    shown: dict[str, Any] = {name: found[name] for name in ("status", "checks", "published") if name in found}
    return of_stored(GateAnswer, {**asked, **shown, "withheld_model": _withheld(row, row.gate)})


def _served(row: model.Job) -> ServedAnswer | None:
    return None if row.served is None else ServedAnswer(**row.served, withheld_model=_withheld(row, row.served))


def _withheld(row: model.Job, verdict: dict[str, Any] | None) -> str | None:
    """Returns the model, where this verdict is one that withholds it."""
    return row.tuned_model if row.withholds_model and verdict is not None and verdict["withheld"] else None


def _method(stored: dict[str, Any], knobs: Hyperparameters) -> MethodEcho | PreferenceEcho | OtherMethodEcho:
    """Returns the method of a stored spec or plan; one of an older release has none, and was supervised."""
    own = dict(stored.get("method") or {"type": "supervised"})
    name = own.pop("type")
    if name == "supervised":
        chosen = of_stored(SupervisedHyperparameters, knobs.model_dump() | own)
        return MethodEcho(supervised=SupervisedEcho(hyperparameters=chosen))
    if name == "dpo":
        learned = of_stored(DpoHyperparameters, knobs.model_dump() | own)
        return PreferenceEcho(dpo=DpoEcho(hyperparameters=learned))
    return OtherMethodEcho(type=name, **{name: {"hyperparameters": knobs.model_dump() | own}})


def _estimated_finish(row: model.Job) -> int | None:
    """Never in the past: a run that takes longer than was estimated is about to end."""
    if row.estimated_finish is None or status_of(row) != State.RUNNING:
        return None
    return max(seconds(row.estimated_finish), math.ceil(time.time()) + 1)


def _options(stored: dict[str, Any]) -> dict[str, Any]:
    """Returns the options of a stored spec or plan; an option that was added since has its default."""
    fields = TrainingOptions.model_fields.items()
    return {name: stored[name] if name in stored else field.get_default() for name, field in fields}


def _error_of(row: model.Job) -> JobError | None:
    if row.error_code is None:
        return None
    return JobError(code=row.error_code, message=row.error_message or "", param=row.error_param)
