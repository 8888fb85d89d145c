"""Files and Uploads, as the API spells them."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from api.schemas.base import Body, Deleted, ResponseBody, maybe_seconds, seconds
from api.schemas.reports import STATE, ReportState
from tunery.datasets import model
from tunery.field_reasons import formed
from tunery.rows.preview_model import Preview
from tunery.spec import Int

Purpose = Literal["fine-tune", "assistants", "batch", "vision", "user_data", "evals"]

FILE: dict[str, Any] = {
    "id": "file-abc123",
    "object": "file",
    "bytes": 120000,
    "created_at": 1677610602,
    "expires_at": None,
    "filename": "mydata.jsonl",
    "purpose": "fine-tune",
    "status": "processed",
    "status_details": None,
    "report": STATE,
}


class ExpiresAfter(Body):
    """When the file deletes itself."""

    anchor: Literal["created_at"]
    seconds: Int = Field(
        ge=3600, le=2_592_000, description="Seconds after the file's creation: from an hour to 30 days"
    )


class FileFields(Body):
    """The text fields beside an uploaded file."""

    purpose: Purpose
    expires_after: ExpiresAfter | None = None


class File(ResponseBody):
    model_config = ConfigDict(json_schema_extra={"examples": [FILE]})

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["uploaded", "processed", "error"]
    status_details: str | None = Field(description="Why the file cannot be used for training")
    report: ReportState | None = Field(description="Only for a training file; not in OpenAI's API")

    @classmethod
    def of(cls, row: model.File, report: model.FileReport | None = None) -> "File":
        return cls(
            id=row.id,
            bytes=row.bytes,
            created_at=seconds(row.created_at),
            expires_at=maybe_seconds(row.expires_at),
            filename=row.filename,
            purpose=row.purpose,
            status=row.status,
            status_details=row.status_details,
            report=None if report is None else ReportState.of(report),
        )


class FileDeleted(Deleted):
    model_config = ConfigDict(
        json_schema_extra={"examples": [{"id": "file-abc123", "object": "file", "deleted": True}]}
    )

    object: Literal["file"] = "file"


class CreateUpload(Body):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "bytes": 2147483648,
                    "filename": "training_examples.jsonl",
                    "mime_type": "text/jsonl",
                    "purpose": "fine-tune",
                }
            ]
        }
    )

    bytes: Int = Field(ge=1, description="Size of the whole file in bytes")
    filename: str = Field(min_length=1, max_length=255)
    mime_type: str = Field(max_length=255)
    purpose: Purpose
    expires_after: ExpiresAfter | None = None


class CompleteUpload(Body):
    model_config = ConfigDict(
        json_schema_extra={"examples": [{"part_ids": ["part_abc123", "part_def456"], "md5": None}]}
    )

    part_ids: list[str] = Field(min_length=1, description="All parts, in the order of the file")
    md5: Annotated[str, *formed("[0-9a-fA-F]{32}", "an MD5 of 32 hexadecimal digits")] | None = Field(
        None, description="MD5 of the whole file, in hexadecimal"
    )


class Upload(ResponseBody):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": "upload_abc123",
                    "object": "upload",
                    "bytes": 2147483648,
                    "created_at": 1719184911,
                    "filename": "training_examples.jsonl",
                    "purpose": "fine-tune",
                    "status": "pending",
                    "expires_at": 1719188511,
                    "file": None,
                }
            ]
        }
    )

    id: str
    object: Literal["upload"] = "upload"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["pending", "completed", "cancelled", "expired"]
    expires_at: int
    file: File | None

    @classmethod
    def of(cls, row: model.Upload, file: model.File | None = None, report: model.FileReport | None = None) -> "Upload":
        return cls(
            id=row.id,
            bytes=row.bytes,
            created_at=seconds(row.created_at),
            filename=row.filename,
            purpose=row.purpose,
            status=row.status,
            expires_at=seconds(row.expires_at),
            file=None if file is None else File.of(file, report),
        )


class UploadPart(ResponseBody):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": "part_def456",
                    "object": "upload.part",
                    "created_at": 1719185911,
                    "upload_id": "upload_abc123",
                }
            ]
        }
    )

    id: str
    object: Literal["upload.part"] = "upload.part"
    created_at: int
    upload_id: str

    @classmethod
    def of(cls, row: model.UploadPart) -> "UploadPart":
        return cls(id=row.id, created_at=seconds(row.created_at), upload_id=row.upload_id)


PREVIEW: dict[str, Any] = {
    "object": "file.preview",
    "file": "file-abc123",
    "model": "SmolLM2-135M-Instruct",
    "chat_template_sha256": "0" * 64,
    "max_tokens": 2048,
    "shape": "chat messages",
    "passed": True,
    "rows": [
        {
            "number": 1,
            "line": None,
            "name": "example 1",
            "sequences": [
                {
                    "tokens": [
                        {"id": 1, "text": "<|im_start|>", "state": "masked"},
                        {"id": 28120, "text": "Hello", "state": "trained"},
                        {"id": 2, "text": "<|im_end|>", "state": "trained"},
                    ],
                    "trained": 2,
                    "masked": 1,
                    "cut": 0,
                    "omitted": 0,
                }
            ],
            "failed": [],
            "error": None,
        }
    ],
    "checks": [
        {
            "name": "one_bos",
            "passed": True,
            "what": "No row begins with two BOS tokens",
            "rows": [],
            "advice": None,
        }
    ],
}


class FilePreview(Preview, ResponseBody):
    """What a model learns of a file's first rows, token by token."""

    model_config = ConfigDict(json_schema_extra={"examples": [PREVIEW]})

    object: Literal["file.preview"] = "file.preview"
    file: str
