"""A job that was only tried, as the API spells it."""

from collections.abc import Mapping
from typing import Any, Literal
from urllib.parse import urlencode

from pydantic import ConfigDict, Field

from api.schemas import jobs
from api.schemas.base import ResponseBody
from api.schemas.reports import Status
from tunery.jobs.dry_run import DryRun
from tunery.planning.fitting import CardFit, StepPlan
from tunery.planning.peak import Estimate

_DECIDED = {"n_epochs": 3, "batch_size": 8, "learning_rate_multiplier": 1.0}
DRY_RUN: dict[str, Any] = {
    **jobs.JOB,
    "waits_for": None,
    "hyperparameters": _DECIDED,
    "method": {"type": "supervised", "supervised": {"hyperparameters": {**_DECIDED, "loss_on": "assistant"}}},
    "dry_run": True,
    "validation": {"status": "ready", "rows": 1215, "examples": 1215, "usable": 1013, "trainable": True, "error": None},
    "memory": {"cuda": {"bytes": 2254857830, "parts": {"base": 269030016}}},
    "expected": {"tokens": 16384, "recompute": False, "allocated": 8253483008, "bytes": 8753483008},
    "cards": [
        {
            "name": "T4",
            "bytes": 15676630630,
            "verdict": "fits",
            "plan": {"tokens": 16384, "recompute": False, "allocated": 8253483008, "bytes": 8753483008},
            "change": None,
        }
    ],
    "preview": "/v1/files/file-abc123/preview?model=SmolLM2-135M-Instruct&max_tokens=2048",
}


class Validation(ResponseBody):
    """What the training file's report says of it."""

    status: Status | None = Field(description="Taken from the report; null if there is none")
    rows: int | None
    examples: int | None = Field(description="Rows that a job can use")
    usable: int | None = Field(description="Rows that are usable for training")
    trainable: bool | None
    error: str | None


class Memory(ResponseBody):
    """The least memory that the run needs on one device, of rows as long as they may be."""

    bytes: int
    parts: dict[str, int] = Field(description="What it is for")


class DryRunJob(jobs.Job):
    """What a job would be. Nothing is stored: its id is unknown to every other operation."""

    model_config = ConfigDict(json_schema_extra={"examples": [DRY_RUN]})

    dry_run: Literal[True] = True
    validation: Validation
    memory: dict[str, Memory] = Field(description="By kind of device, `cuda` and `cpu`; empty if the job does not fit")
    expected: StepPlan | None = Field(
        description="How the trainer would run a step on the largest GPU here with rows of the maximum length; null if "
        "there is no GPU, or if only the trainer's probe can tell"
    )
    cards: list[CardFit] = Field(description="Known cards, whether the run fits on each, and what would make it fit")
    preview: str = Field(description="URL of the preview of the first rows' tokens")


def of(found: DryRun, *, organization: str) -> DryRunJob:
    """Returns a dry run as its owner sees it."""
    shown = jobs.of(found.job, organization=organization, warnings=found.warnings, waits_for=None)
    shown = shown.model_copy(update={"quote": found.quote})
    columns = {} if shown.columns is None else {"columns": shown.columns.spelled}
    query = urlencode({"model": shown.model, "max_tokens": shown.max_seq_length, **columns})
    return DryRunJob(
        **dict(shown),
        validation=_validation(found),
        memory={device: _memory(estimate) for device, estimate in found.memory.items()},
        expected=found.expected,
        cards=found.cards,
        preview=f"/v1/files/{found.job.training_file}/preview?{query}",
    )


def _validation(found: DryRun) -> Validation:
    said: Mapping[str, Any] = (found.report.summary if found.report else None) or {}
    return Validation(
        status=found.report.status if found.report else None,
        rows=said.get("rows"),
        examples=said.get("examples"),
        usable=said.get("usable", {}).get("rows"),
        trainable=said.get("trainable"),
        error=said.get("reason") or (found.report.error if found.report else None),
    )


def _memory(estimate: Estimate) -> Memory:
    return Memory(bytes=estimate.bytes, parts=estimate.parts)
