"""Captured requests, feedback and the files made of them, as the API spells them."""

from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from api.schemas.base import Body, ResponseBody, seconds
from tunery.errors import InvalidValue
from tunery.traffic.captures import FileOrder
from tunery.traffic.model import CapturedFile, CapturedRequest

_RATED: dict[str, Any] = {"id": "chatcmpl-abc123", "rating": "bad", "correction": "lost_or_stolen_card"}
_MODEL = "ft:SmolLM2-135M-Instruct:tunery:banking:Ab12Cd34"
_CAPTURE: dict[str, Any] = {
    "object": "model.capture",
    "model": _MODEL,
    "enabled": True,
    "keep_days": 30,
    "requests": 120,
    "good": 31,
    "bad": 9,
    "corrected": 7,
}
_STOPPED: dict[str, Any] = {"object": "model.capture", "model": _MODEL, "enabled": False, "removed": 120}
_FEEDBACK: dict[str, Any] = {
    "object": "feedback",
    "id": "chatcmpl-abc123",
    "model": _MODEL,
    "rating": "bad",
    "correction": {"role": "assistant", "content": "lost_or_stolen_card"},
}
_CHAT: dict[str, Any] = {
    **_FEEDBACK,
    "object": "model.captured_request",
    "created_at": 1721764800,
    "expires_at": 1724356800,
    "messages": [{"role": "user", "content": "I lost my card. Write to <EMAIL_ADDRESS>."}],
    "tools": None,
    "answer": {"role": "assistant", "content": "card_arrival"},
    "finish_reason": "stop",
}
_LINEAGE: dict[str, Any] = {
    "object": "file.capture",
    "file": "file-abc123",
    "model": _MODEL,
    "manifest_sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "created_at": 1721764800,
    "format": "chat",
    "answers": ["good", "corrected"],
    "rows": 1,
    "requests": ["chatcmpl-abc123"],
}
_SCORES = {"good": 1, "bad": -1}


class SetCapture(Body):
    """Keeps the project's requests to a model."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"keep_days": 30}]})

    keep_days: int = Field(30, ge=1, le=365, description="Days after which a request is deleted")


class ModelCapture(ResponseBody):
    """Whether and for how long requests to a model are kept, and how many are."""

    model_config = ConfigDict(json_schema_extra={"examples": [_CAPTURE]})

    object: Literal["model.capture"] = "model.capture"
    model: str
    enabled: bool
    keep_days: int | None
    requests: int
    good: int
    bad: int
    corrected: int


class CaptureStopped(ResponseBody):
    """Nothing more is kept, and nothing is left."""

    model_config = ConfigDict(json_schema_extra={"examples": [_STOPPED]})

    object: Literal["model.capture"] = "model.capture"
    model: str
    enabled: Literal[False] = False
    removed: int = Field(description="Number of deleted requests")


class GiveFeedback(Body):
    """What somebody says of an answer: a rating, the answer that it should have been, or both."""

    model_config = ConfigDict(json_schema_extra={"examples": [_RATED]})

    id: str = Field(min_length=1, description="The id of a chat completion or a response")
    rating: Literal["good", "bad"] | None = None
    correction: str | dict[str, Any] | None = Field(None, description="A text, or an assistant's message")

    @model_validator(mode="after")
    def _says_something(self) -> "GiveFeedback":
        if self.rating is None and self.correction is None:
            raise InvalidValue(param="rating", reason="Feedback needs a 'rating', a 'correction', or both.")
        if isinstance(self.correction, dict) and self.correction.get("role") != "assistant":
            raise InvalidValue(param="correction", reason="Invalid 'correction': its role must be 'assistant'.")
        return self

    @property
    def score(self) -> int | None:
        return None if self.rating is None else _SCORES[self.rating]

    @property
    def message(self) -> dict[str, Any] | None:
        """The correction as a message."""
        if not isinstance(self.correction, str):
            return self.correction
        return {"role": "assistant", "content": self.correction}


class Feedback(ResponseBody):
    """What is known of an answer by now."""

    model_config = ConfigDict(json_schema_extra={"examples": [_FEEDBACK]})

    object: Literal["feedback"] = "feedback"
    id: str
    model: str
    rating: Literal["good", "bad"] | None
    correction: dict[str, Any] | None = Field(description="With personal data and secrets redacted")

    @classmethod
    def of(cls, row: CapturedRequest) -> "Feedback":
        names: dict[int | None, Literal["good", "bad"]] = {1: "good", -1: "bad"}
        return cls(id=row.id, model=row.model_id, rating=names.get(row.rating), correction=row.correction)


class CapturedChat(Feedback):
    """A request that was kept, with its first answer and what is known of it."""

    model_config = ConfigDict(json_schema_extra={"examples": [_CHAT]})

    object: Literal["model.captured_request"] = "model.captured_request"  # type: ignore[assignment]  # no feedback alone
    created_at: int
    expires_at: int = Field(description="When it is deleted")
    messages: list[dict[str, Any]] = Field(description="With personal data and secrets redacted, like the answer")
    tools: list[dict[str, Any]] | None
    answer: dict[str, Any]
    finish_reason: str

    @classmethod
    def of(cls, row: CapturedRequest) -> "CapturedChat":
        return cls(
            **Feedback.of(row).model_dump(exclude={"object"}),
            created_at=seconds(row.created_at),
            expires_at=seconds(row.expires_at),
            messages=row.request["messages"],
            tools=row.request.get("tools"),
            answer=row.answer,
            finish_reason=row.finish_reason,
        )


class MakeFile(FileOrder):
    """Makes a file of captured requests."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"format": "chat", "answers": ["good", "corrected"]}]})

    filename: str | None = Field(None, min_length=1, max_length=255)


class FileCapture(ResponseBody):
    """Which captured requests a file was made of."""

    model_config = ConfigDict(json_schema_extra={"examples": [_LINEAGE]})

    object: Literal["file.capture"] = "file.capture"
    file: str
    model: str
    manifest_sha256: str | None = Field(description="Checksum of the model's files when this file was made")
    created_at: int
    format: Literal["chat", "preference"]
    answers: list[str]
    rows: int
    requests: list[str] = Field(description="The captured request of each row, in the order of the file")

    @classmethod
    def of(cls, row: CapturedFile) -> "FileCapture":
        order = {name: row.order[name] for name in ("format", "answers")}
        return cls(file=row.file_id, model=row.model_id, created_at=seconds(row.created_at), **order, **row.outcome)
