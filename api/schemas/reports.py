"""Reports of files, as the API spells them."""

from typing import Any, Literal

from pydantic import ConfigDict, Field

from api.schemas.base import ResponseBody, maybe_seconds, seconds
from tunery.datasets import model

Status = Literal["queued", "running", "ready", "failed"]

STATE: dict[str, Any] = {
    "status": "ready",
    "progress": 1.0,
    "rows": 1215,
    "findings": 182,
    "trainable": True,
    "error": None,
}
FINDING: dict[str, Any] = {
    "kind": "contradiction",
    "lines": [941, 1066],
    "score": 0.93,
    "why": "For nearly the same question the intent is 'a' in one row and 'b' in the other.",
    "action": "Keep the correct row, and correct or drop the other.",
    "against": [],
}


class ReportState(ResponseBody):
    """How far a file's report is, and what it says in short."""

    model_config = ConfigDict(json_schema_extra={"examples": [STATE]})

    status: Status
    progress: float = Field(description="Progress, from 0 to 1")
    rows: int | None
    findings: int | None = Field(description="Number of findings")
    trainable: bool | None = Field(description="Whether the file can be used for a job; null until the report is ready")
    error: str | None = Field(description="Why the report failed")

    @classmethod
    def of(cls, row: model.FileReport) -> "ReportState":
        said = {name: (row.summary or {}).get(name) for name in ("rows", "findings", "trainable")}
        return cls(status=row.status, progress=row.progress, error=row.error, **said)


class Finding(ResponseBody):
    """Something about some rows."""

    model_config = ConfigDict(json_schema_extra={"examples": [FINDING]})

    kind: str
    lines: list[int] = Field(description="Lines of the file, from 1; of a JSON array or Parquet, its rows")
    score: float = Field(description="Confidence from 0 to 1; comparable within a kind")
    why: str
    action: str = Field(description="What to do")
    against: list[int] = Field([], description="Lines of the other file, likewise")


class Usable(ResponseBody):
    """The rows that a cleaning keeps as the report recommends, less answers that refuse."""

    rows: int
    left_out: dict[str, int] = Field(description="Rows that are not usable, by the kind of their first finding")
    answer_bytes: int = Field(description="UTF-8 bytes of the assistant messages in the usable rows")


class FileReport(ResponseBody):
    """A file's report. What comes behind `finished_at` is null or empty until `status` is `ready`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "object": "file.report",
                    "file": "file-abc123",
                    "base": None,
                    "against": None,
                    "columns": None,
                    "status": "ready",
                    "progress": 1.0,
                    "error": None,
                    "created_at": 1719184911,
                    "finished_at": 1719184914,
                    "trainable": True,
                    "reason": None,
                    "format": "JSONL",
                    "shape": "chat messages rows",
                    "rows": 1215,
                    "examples": 1215,
                    "rows_named": 249,
                    "usable": {"rows": 1013, "left_out": {"contradiction": 120}, "answer_bytes": 41233},
                    "warnings": [],
                    "counts": {"contradiction": 1},
                    "figures": {},
                    "findings": [FINDING],
                }
            ]
        }
    )

    object: Literal["file.report"] = "file.report"
    file: str
    base: str | None = Field(description="The model whose tokenizer counted the tokens")
    against: str | None = Field(description="The file with which it is compared")
    columns: dict[str, str] | None = Field(description="The columns by which rows were read; null: by their own names")
    status: Status
    progress: float
    error: str | None
    created_at: int
    finished_at: int | None
    trainable: bool | None = None
    reason: str | None = Field(None, description="Why the file cannot be used for a job")
    format: str | None = None
    shape: str | None = Field(None, description="What the rows are, and what their columns become")
    are_pairs: bool | None = Field(None, description="Whether the rows are preference pairs, which only `dpo` takes")
    rows: int | None = Field(
        None, description="Rows that were checked: all of them, unless the file has more than 100 MB of text"
    )
    examples: int | None = None
    rows_named: int | None = Field(None, description="Rows with a finding")
    usable: Usable | None = Field(None, description="Rows without a finding")
    warnings: list[str] = []
    counts: dict[str, int] = Field({}, description="Number of findings of each kind")
    figures: dict[str, Any] = Field({}, description="Statistics of all rows; with `base` also of their tokens")
    findings: list[Finding] = []

    @classmethod
    def of(cls, row: model.FileReport, *, file: str, base: str | None, against: str | None) -> "FileReport":
        """How far the report is, without what is stored of it."""
        return cls(
            file=file,
            base=base,
            against=against,
            columns=row.columns or None,
            status=row.status,
            progress=row.progress,
            error=row.error,
            created_at=seconds(row.created_at),
            finished_at=maybe_seconds(row.finished_at),
        )


_STATE = {"object", "file", "base", "against", "columns", "status", "progress", "error", "created_at", "finished_at"}
SAID = set(FileReport.model_fields) - _STATE
"""The fields that the stored report has."""
