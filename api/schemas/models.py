"""Models, as the API spells them."""

from pathlib import PurePath
from typing import Any, Literal

from pydantic import ConfigDict, Field

from api.schemas.base import Body, Deleted, ResponseBody, seconds
from api.schemas.runs import Artifact
from tunery.models import model
from tunery.spec import Columns, Evaluation, Export

Exported = model.Model
"""Under a name of its own: the answer has a field `model`."""
BASE: dict[str, Any] = {
    "id": "SmolLM2-135M-Instruct",
    "object": "model",
    "created": 1686935002,
    "owned_by": "tunery",
    "shutdown_date": None,
    "kind": "base",
    "status": "ready",
    "status_details": None,
    "source": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "aliases": ["gpt-4o-mini-2024-07-18"],
    "base_model": None,
    "job": None,
    "technique": None,
    "params": 134515008,
    "context_length": 8192,
    "techniques": {"lora": None, "qlora": None, "full": None},
    "manifest_sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
}


class Model(ResponseBody):
    model_config = ConfigDict(json_schema_extra={"examples": [BASE]})

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    shutdown_date: None = None

    kind: Literal["base", "tuned", "checkpoint"]
    status: Literal["processing", "ready", "error"]
    status_details: str | None
    source: str | None = Field(
        description="Where a base comes from; accepted wherever a body names a model. Only administrators see more "
        "than the last part of a path on the workers' disk. For an imported adapter, the name of its archive"
    )
    aliases: list[str]
    base_model: str | None = Field(description="For an alias or a fine-tuned model, the base's own id")
    job: str | None = Field(description="The job that created the model")
    technique: str | None
    params: int | None
    context_length: int | None
    techniques: dict[str, str | None] | None = Field(
        description="For each technique, why the base cannot be trained with it, or null if it can. Null: not tested"
    )
    manifest_sha256: str | None

    @classmethod
    def of(
        cls, row: model.Model, *, owner: str, aliases: list[str], for_administrator: bool, alias: str | None = None
    ) -> "Model":
        """Returns a model as the caller may see it; with `alias`, which one of `aliases` is, under that name."""
        details, source = row.status_details, row.source
        if not for_administrator and source is not None and source.startswith(("/", "~", ".")):
            source = PurePath(source).name
            shown = f"It could not be converted. `GET /v1/models/{row.id}` shows the reason to administrators."
            details = details and shown
        return cls(
            id=alias or row.id,
            created=seconds(row.created_at),
            owned_by=owner,
            kind=row.kind,
            status=row.status,
            status_details=details,
            source=source,
            aliases=aliases,
            base_model=row.id if alias else row.base_id,
            job=row.job_id,
            technique=row.technique,
            params=row.model_info.get("params"),
            context_length=row.model_info.get("context_length"),
            techniques=row.model_info.get("techniques"),
            manifest_sha256=row.manifest_sha256,
        )


class ModelDeleted(Deleted):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"id": "ft:SmolLM2-135M-Instruct:tunery::7p4lURel", "object": "model", "deleted": True}]
        }
    )

    object: Literal["model"] = "model"


class ModelArtifact(Artifact):
    """A file of a model, as that of a job is listed."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "object": "model.artifact",
                    "path": "model.safetensors",
                    "bytes": 269060552,
                    "sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
                }
            ]
        }
    )

    object: Literal["model.artifact"] = "model.artifact"  # type: ignore[assignment]


class AskExport(Export, Body):
    """As the `export` of a job."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"merged": True, "gguf": ["q8_0"]}]})

    rows_file: str | None = Field(
        None,
        min_length=1,
        description="A file of rows to verify a merge, in place of those of the model's job. Required for an imported "
        "adapter, which has no job",
    )
    columns: Columns | None = Field(None, description="The columns of `rows_file` by part, if they have other names")

    @property
    def export(self) -> Export:
        """What is asked for, without the rows."""
        return Export.model_validate(self.model_dump(exclude={"rows_file", "columns"}))


class ExportResult(ResponseBody):
    """An export that was written or refused; `message` says what it is, or why it is not."""

    path: str
    message: str
    is_refused: bool


class ModelExport(ResponseBody):
    """The last export of a model. What it wrote is among the model's artifacts."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "object": "model.export",
                    "model": "ft:SmolLM2-135M-Instruct:tunery::7p4lURel",
                    "status": "succeeded",
                    "asked": {"merged": False, "gguf": ["q8_0"], "fp8": False, "adapter_gguf": False},
                    "rows_file": None,
                    "columns": None,
                    "results": [
                        {
                            "path": "gguf/model-q8_0.gguf",
                            "message": "144.8 MB, of the architecture llama",
                            "is_refused": False,
                        }
                    ],
                    "error": None,
                }
            ]
        }
    )

    object: Literal["model.export"] = "model.export"
    model: str
    status: Literal["queued", "succeeded", "failed"] = Field(
        description="failed: the export ended with an error, or one of its parts failed a check"
    )
    asked: Export
    rows_file: str | None
    columns: Columns | None = None
    results: list[ExportResult]
    error: str | None

    @classmethod
    def of(cls, row: Exported) -> "ModelExport":
        return cls(model=row.id, **{"rows_file": None, **(row.export or {})})


class AskScorecard(Body):
    """As the `evaluation` of a job, without what belongs to training."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"evaluation": {"test_file": "file-abc123"}}]})

    evaluation: Evaluation
    columns: Columns | None = Field(None, description="The test file's columns by part, if they have other names")


class ModelScorecard(ResponseBody):
    """The last scorecard of an adapter that was asked for. Its rows' answers are among the model's artifacts."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "object": "model.scorecard",
                    "model": "ft:SmolLM2-135M-Instruct:tunery::7p4lURel",
                    "status": "queued",
                    "evaluation": {"test_file": "file-abc123"},
                    "columns": None,
                    "scorecard": None,
                    "error": None,
                }
            ]
        }
    )

    object: Literal["model.scorecard"] = "model.scorecard"
    model: str
    status: Literal["queued", "succeeded", "failed"]
    evaluation: Evaluation
    columns: Columns | None = None
    scorecard: dict[str, Any] | None = Field(description="Base and tuned model on the same test rows, as in a job")
    error: str | None

    @classmethod
    def of(cls, row: Exported) -> "ModelScorecard":
        return cls(model=row.id, **(row.scoring or {}))


class AdapterFields(Body):
    """The text fields beside an adapter's archive."""

    base: str = Field(min_length=1)
    suffix: str | None = Field(None, max_length=64)
    technique: Literal["lora", "qlora"] = "lora"


class AddModel(Body):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"source": "HuggingFaceTB/SmolLM2-360M-Instruct", "id": "SmolLM2-360M-Instruct"}]
        }
    )

    source: str = Field(
        min_length=1, max_length=1024, description="A hub id, or a folder or .gguf file that the workers can read"
    )
    id: str | None = Field(None, description="Absent: derived from the last part of the source")
    chat_template: str | None = Field(
        None, min_length=1, max_length=1 << 20, description="Jinja template that replaces the model's own"
    )


class AddAlias(Body):
    model_config = ConfigDict(
        json_schema_extra={"examples": [{"alias": "gpt-4o-mini-2024-07-18", "model": "SmolLM2-135M-Instruct"}]}
    )

    alias: str
    model: str


class Alias(ResponseBody):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"object": "model.alias", "alias": "gpt-4o-mini-2024-07-18", "model": "SmolLM2-135M-Instruct"}]
        }
    )

    object: Literal["model.alias"] = "model.alias"
    alias: str
    model: str


class EngineCommand(ResponseBody):
    """How an engine is started on a model's files."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "engine": "llama.cpp",
                    "files": "gguf/model-q8_0.gguf",
                    "command": "llama-server -m tuned/gguf/model-q8_0.gguf --jinja",
                }
            ]
        }
    )

    engine: Literal["download", "peft", "transformers", "vllm", "llama.cpp", "ollama"]
    files: str = Field(description="Relative to the model's folder; empty: the folder itself")
    command: str = Field(description="In the parent of the model's folder")
