"""Advice on files, as the API spells it."""

from typing import Any, Literal

from pydantic import ConfigDict, Field

from api.schemas.base import Body, ResponseBody
from api.schemas.reports import Status
from tunery.baselines.table import Row
from tunery.planning.advisor import Advice
from tunery.planning.recommendation import Aim
from tunery.planning.serving_quote import ServingQuote
from tunery.spec import Columns, Technique

ASKED: dict[str, Any] = {"file": "file-abc123", "model": "SmolLM2-135M-Instruct", "aim": "output_format"}
SAID: dict[str, Any] = {
    "recommendation": "fine_tune",
    "reasons": [{"rule": "more_than_1000", "text": "1,013 usable rows are more than 1,000: ..."}],
    "rows": {
        "total": 1215,
        "usable": 1013,
        "left_out": {"near_duplicate": 151},
        "answer_tokens": 10308,
        "refused": None,
    },
    "suggestions": [{"field": "technique.r", "value": 4, "rule": "rank_of_form", "text": "Format and style are ..."}],
    "warnings": [],
    "settings": {"technique": {"type": "lora", "r": 4}},
}


class AskAdvice(Body):
    """A file, the base that may be trained on it, and what for."""

    model_config = ConfigDict(json_schema_extra={"examples": [ASKED]})

    file: str = Field(min_length=1, description="A file with the purpose fine-tune")
    model: str = Field(min_length=1, description="A base or fine-tuned model: id, alias or the base's hub id")
    aim: Aim = Field(description="What the model should learn")
    validation_file: str | None = Field(
        None,
        min_length=1,
        description="Held-out rows, which are not counted as training rows. Absent: a split is suggested",
    )
    baseline: str | None = Field(
        None, min_length=1, description="A baseline of the model; the advice then includes its results"
    )
    technique: Technique | None = Field(None, description="To be assessed. Absent: one is suggested")
    columns: Columns | None = Field(None, description="The files' columns by part, if they have other names")


class AdviceAnswer(ResponseBody):
    """Advice on a file. `advice` is null until `status` is `ready`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "object": "fine_tuning.advice",
                    **ASKED,
                    "validation_file": None,
                    "baseline": None,
                    "columns": None,
                    "status": "ready",
                    "progress": 1.0,
                    "error": None,
                    "advice": SAID,
                    "table": [],
                    "currency": "USD",
                }
            ]
        }
    )

    object: Literal["fine_tuning.advice"] = "fine_tuning.advice"
    file: str
    model: str
    aim: Aim
    validation_file: str | None
    baseline: str | None
    columns: Columns | None
    status: Status = Field(description="Status of the file's report, on which the advice is based")
    progress: float = Field(description="Progress of the report, from 0 to 1")
    error: str | None = Field(description="Why the report failed")
    advice: Advice | None
    serving: ServingQuote | None = Field(
        None,
        description="Expected cost of the tuned model's answers, on a GPU of this server or on a card that can hold "
        "the base",
    )
    table: list[Row] = Field(description="The baseline's table, once it is measured")
    currency: str = Field(description="Currency of the table's costs, set by the operator")
