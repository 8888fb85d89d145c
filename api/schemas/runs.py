"""The API's objects of a job's run: events, checkpoints, measurements, artifacts."""

from dataclasses import asdict
from typing import Any, Literal

from pydantic import ConfigDict, Field

from api.schemas.base import ResponseBody, seconds
from tunery.artifacts import reproduction
from tunery.artifacts.answers import AnsweredRow
from tunery.jobs import model


class Event(ResponseBody):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "object": "fine_tuning.job.event",
                    "id": "ftevent-abc123",
                    "created_at": 1721764800,
                    "level": "info",
                    "message": "Step 300/300: training loss=0.15",
                    "data": {"step": 300, "train_loss": 0.1499, "total_steps": 300},
                    "type": "metrics",
                }
            ]
        }
    )

    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    id: str
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    data: dict[str, Any] | None
    type: Literal["message", "metrics"]

    @classmethod
    def of(cls, row: model.JobEvent) -> "Event":
        return cls(
            id=row.id,
            created_at=seconds(row.created_at),
            level=row.level,
            message=row.message,
            data=row.data,
            type=row.type,
        )


class Checkpoint(ResponseBody):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "object": "fine_tuning.job.checkpoint",
                    "id": "ftckpt_zc4Q7MP6XxulcVzj4MZdwsAB",
                    "created_at": 1721764867,
                    "fine_tuned_model_checkpoint": "ft:SmolLM2-135M-Instruct:tunery:banking:96olL566:ckpt-step-88",
                    "fine_tuning_job_id": "ftjob-abc123",
                    "metrics": {"step": 88, "train_loss": 0.478, "full_valid_loss": 0.567},
                    "step_number": 88,
                }
            ]
        }
    )

    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    id: str
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    metrics: dict[str, int | float]
    step_number: int

    @classmethod
    def of(cls, row: model.Checkpoint) -> "Checkpoint":
        return cls(
            id=row.id,
            created_at=seconds(row.created_at),
            fine_tuned_model_checkpoint=row.model_id,
            fine_tuning_job_id=row.job_id,
            metrics={**row.metrics, "step": row.step},
            step_number=row.step,
        )


class Measured(ResponseBody):
    """One step's measurements; what was not measured at that step is not there."""

    model_config = ConfigDict(
        extra="allow",
        frozen=True,
        json_schema_extra={"examples": [{"step": 12, "train_loss": 1.62, "learning_rate": 0.0009, "grad_norm": 2.1}]},
    )

    step: int


class ScorecardRow(ResponseBody):
    """A test row as both models answered it. A row of a pair has its other answer, and how likely each is."""

    model_config = ConfigDict(
        extra="allow",
        frozen=True,
        json_schema_extra={
            "examples": [
                {
                    "object": "fine_tuning.job.scorecard.row",
                    "id": "answer_12_4821",
                    "number": 12,
                    "messages": [{"role": "user", "content": "My card has not come."}],
                    "wanted": "card_arrival",
                    "base": "I am sorry to hear that.",
                    "tuned": "card_arrival",
                    "base_right": False,
                    "tuned_right": True,
                    "flipped": True,
                    "other": None,
                    "base_log_probabilities": None,
                    "tuned_log_probabilities": None,
                }
            ]
        },
    )

    object: Literal["fine_tuning.job.scorecard.row"] = "fine_tuning.job.scorecard.row"
    id: str
    number: int = Field(description="Position among the scored rows, from 1")
    messages: list[dict[str, Any]]
    wanted: str
    base: str = Field(description="The base's answer")
    tuned: str
    base_right: bool
    tuned_right: bool
    flipped: bool = Field(description="Exactly one of the two answers is correct")
    other: str | None = Field(None, description="For a pair: the answer that is not preferred")
    base_log_probabilities: list[float] | None = Field(
        None, description="For a pair: under the base, of the preferred and of the other answer"
    )
    tuned_log_probabilities: list[float] | None = None

    @classmethod
    def of(cls, row: AnsweredRow) -> "ScorecardRow":
        answered = row.answered
        flipped = answered["base_right"] != answered["tuned_right"]
        return cls(id=row.id, number=row.number, flipped=flipped, **answered)


class Pair(ResponseBody):
    """A value of both jobs; `equal` is null where one of them is not known."""

    name: str
    original: Any
    rerun: Any
    equal: bool | None


class Curve(ResponseBody):
    """A loss of both jobs, step by step."""

    name: str
    steps: tuple[int, int] = Field(description="Steps for which the original and the rerun have this value")
    compared: int = Field(description="Steps for which both have this value")
    max_relative_difference: float | None
    at_step: int | None = Field(description="The step with the largest difference")


class Reproduction(ResponseBody):
    """A job beside the one that it runs again."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "object": "fine_tuning.job.reproduction",
                    "job": "ftjob-def456",
                    "rerun_of": "ftjob-abc123",
                    "status": "reproduced",
                    "bitwise": True,
                    "tolerance": 0.005,
                    "inputs": [{"name": "seed", "original": 42, "rerun": 42, "equal": True}],
                    "environment": [{"name": "versions.torch", "original": "2.13.0", "rerun": "2.13.0", "equal": True}],
                    "losses": [
                        {
                            "name": "train_loss",
                            "steps": [300, 300],
                            "compared": 300,
                            "max_relative_difference": 0.0,
                            "at_step": 1,
                        }
                    ],
                    "weights": [
                        {
                            "name": "adapter_model.safetensors",
                            "original": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
                            "rerun": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
                            "equal": True,
                        }
                    ],
                    "scores": [{"name": "exact", "original": 0.86, "rerun": 0.86, "equal": True}],
                }
            ]
        }
    )

    object: Literal["fine_tuning.job.reproduction"] = "fine_tuning.job.reproduction"
    job: str
    rerun_of: str
    status: Literal["pending", "reproduced", "differs"] = Field(
        description="pending: until both have succeeded. reproduced: no input differs, and the weights are equal or "
        "each loss is within the tolerance"
    )
    bitwise: bool | None = Field(description="Whether all weights are equal; null if they were deleted")
    tolerance: float
    inputs: list[Pair] = Field(description="Data, template, base and plan, which define the run")
    environment: list[Pair] = Field(description="Versions, hardware, precision and micro-batches")
    losses: list[Curve]
    weights: list[Pair] = Field(description="SHA-256 of the model's own weight files")
    scores: list[Pair] = Field(description="The tuned models on the same test rows")

    @classmethod
    def of(cls, found: reproduction.Reproduction) -> "Reproduction":
        return cls.model_validate(asdict(found))


class Artifact(ResponseBody):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "object": "fine_tuning.job.artifact",
                    "path": "adapter_model.safetensors",
                    "bytes": 19560000,
                    "sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
                }
            ]
        }
    )

    object: Literal["fine_tuning.job.artifact"] = "fine_tuning.job.artifact"
    path: str
    bytes: int
    sha256: str
