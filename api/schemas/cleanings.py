"""Cleanings of files, as the API spells them."""

from typing import Any

from pydantic import ConfigDict, Field

from api.schemas.base import Body, ResponseBody, seconds
from tunery.datasets import model
from tunery.datasets.cleaning.order import Cleaning, HeldOut
from tunery.spec import named_columns

LINEAGE: dict[str, Any] = {
    "object": "file.cleaning",
    "file": "file-abc123",
    "source": "file-def456",
    "source_sha256": "9f2c0000000000000000000000000000000000000000000000000000000000aa",
    "against": None,
    "base": None,
    "columns": None,
    "held_out": None,
    "progress": 1.0,
    "created_at": 1719184911,
    "actions": [{"kind": "exact_duplicate", "action": "keep_one", "min_score": 0.0}],
    "held_out_rows": None,
    "counts": {"rows": 3, "judged": 3, "kept": 2, "held_out": 0, "dropped": 1, "changed": 1},
    "kinds": {"exact_duplicate": {"dropped": 1, "changed": 0}, "pii": {"dropped": 0, "changed": 1}},
    "dropped": [{"line": 2, "kind": "exact_duplicate", "why": "The rows are the same. The other: line 1."}],
    "changed": [{"line": 3, "kind": "pii", "before": "an e-mail address", "after": "mail <EMAIL_ADDRESS>"}],
}


class CleanFile(Cleaning, Body):
    """What a new file is to be made of a file's rows."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"recommended": True},
                {"actions": [{"kind": "pii", "action": "redact"}], "held_out": {"share": 0.1, "seed": 0}},
            ]
        }
    )

    against: str | None = Field(
        None, min_length=1, description="A test or validation file, whose rows must not be in this file"
    )
    base: str | None = Field(None, min_length=1, description="A model whose tokenizer counts the tokens")

    @property
    def order(self) -> Cleaning:
        """What is asked for, without the other file and the model."""
        return Cleaning.model_validate(self.model_dump(exclude={"against", "base"}))


class DroppedRow(ResponseBody):
    """A row of the source that is not in the new file."""

    line: int
    kind: str
    why: str


class ChangedRow(ResponseBody):
    """A row that was changed. `before` shows no value that was redacted."""

    line: int
    kind: str
    before: str
    after: str


class FileCleaning(ResponseBody):
    """How a file came of another one. What was done is null or empty until the file's status is `processed`."""

    model_config = ConfigDict(json_schema_extra={"examples": [LINEAGE]})

    object: str = "file.cleaning"
    file: str
    source: str
    source_sha256: str | None
    against: str | None
    base: str | None
    columns: dict[str, str] | None = Field(description="The columns by which rows were read; null: by their own names")
    progress: float = Field(description="Progress, from 0 to 1")
    held_out: str | None = Field(description="The file with the held-out rows")
    held_out_rows: HeldOut | None = Field(description="The requested actions")
    created_at: int
    actions: list[dict[str, Any]] = Field(description="The applied actions, including recommended ones")
    counts: dict[str, int]
    kinds: dict[str, dict[str, int]]
    dropped: list[DroppedRow]
    changed: list[ChangedRow]

    @classmethod
    def of(cls, row: model.FileCleaning) -> "FileCleaning":
        done = row.outcome or {}
        return cls(
            file=row.file_id,
            source=row.source_id,
            source_sha256=done.get("source_sha256"),
            against=row.against_id,
            base=row.base_id,
            columns=named_columns(Cleaning.model_validate(row.order).columns) or None,
            progress=row.progress,
            held_out=row.held_out_id,
            held_out_rows=row.order["held_out"],
            created_at=seconds(row.created_at),
            actions=done.get("actions", row.order["actions"]),
            **{name: done.get(name, {}) for name in ("counts", "kinds")},
            **{name: done.get(name, []) for name in ("dropped", "changed")},
        )
