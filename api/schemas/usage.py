"""Usage of models, as OpenAI's administration API spells it."""

from typing import Any, Literal

from pydantic import ConfigDict, Field

from api.schemas.base import Answers, ResponseBody

_RESULT: dict[str, Any] = {
    "object": "organization.usage.completions.result",
    "input_tokens": 1400,
    "output_tokens": 300,
    "num_model_requests": 100,
    "model": "SmolLM2-135M-Instruct",
    "project_id": "proj_abc123",
}


_PAGE: dict[str, Any] = {
    "object": "page",
    "data": [{"object": "bucket", "start_time": 1772323200, "end_time": 1772409600, "results": [_RESULT]}],
    "has_more": True,
    "next_page": "page_2026-03-02",
}
ANSWER: Answers = {200: {"content": {"application/json": {"example": _PAGE}}}}


class UsageResult(ResponseBody):
    """The requests and tokens of one bucket, or of one group in it."""

    model_config = ConfigDict(json_schema_extra={"examples": [_RESULT]})

    object: Literal["organization.usage.completions.result"] = "organization.usage.completions.result"
    input_tokens: int = Field(description="Tokens of prompts")
    output_tokens: int = Field(description="Tokens of answers")
    num_model_requests: int = Field(description="Answered requests")
    model: str | None = Field(description="With `group_by[]=model`: the model's id, even if it was deleted")
    project_id: str | None = Field(description="With `group_by[]=project_id`: the project")


class UsageBucket(ResponseBody):
    """One day, in UTC."""

    object: Literal["bucket"] = "bucket"
    start_time: int
    end_time: int
    results: list[UsageResult]


class UsagePage(ResponseBody):
    """Days, oldest first. `page=<next_page>` asks for the next ones."""

    object: Literal["page"] = "page"
    data: list[UsageBucket]
    has_more: bool
    next_page: str | None
