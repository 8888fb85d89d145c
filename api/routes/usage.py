"""What the project has used, in the dialect of OpenAI's administration API."""

from datetime import UTC, date, datetime, time, timedelta
from typing import Annotated, Literal

from fastapi import APIRouter, Query

from api.dependencies import CallerDep, SessionDep
from api.schemas import usage as schemas
from api.schemas.base import errors
from tunery.errors import InvalidValue
from tunery.traffic import usage
from tunery.traffic.model import ModelUsage

router = APIRouter(prefix="/v1/organization", tags=["Usage"])

_DAY = timedelta(days=1)
_LAST = 253_402_214_400
"""The last day that a date can have."""
Group = Literal["model", "project_id"]


@router.get("/usage/completions", summary="List the tokens used", responses=errors() | schemas.ANSWER)
def list_completions_usage(
    session: SessionDep,
    caller: CallerDep,
    start_time: Annotated[int, Query(ge=0, le=_LAST, description="Unix time; its whole day is included")],
    end_time: Annotated[int | None, Query(ge=0, le=_LAST, description="End of the period; default: now")] = None,
    bucket_width: Annotated[  # noqa: ARG001  only checked
        Literal["1d"], Query(description="Usage is stored per day")
    ] = "1d",
    group_by: Annotated[list[Group] | None, Query(alias="group_by[]")] = None,
    models: Annotated[list[str] | None, Query(alias="models[]", description="Only these ids")] = None,
    project_ids: Annotated[list[str] | None, Query(alias="project_ids[]", description="Only these")] = None,
    limit: Annotated[int, Query(ge=1, le=31, description="Days per page")] = 7,
    page: Annotated[str | None, Query(description="`next_page` of the previous page")] = None,
) -> schemas.UsagePage:
    """Requests to models and their tokens by day, for the key's project."""
    first = datetime.fromtimestamp(start_time, UTC).date() if page is None else _day(page)
    until = datetime.now(UTC) if end_time is None else datetime.fromtimestamp(end_time - 1, UTC)
    end = min(until.date() + _DAY, first + limit * _DAY)
    mine = project_ids is None or caller.project_id in project_ids
    found = usage.list_days(session, caller.project_id, first=first, before=end, models=models) if mine else []
    days = [first + place * _DAY for place in range(max(0, (end - first).days))]
    grouped = frozenset(group_by or ())
    data = [_bucket(day, [one for one in found if one.day == day], grouped, caller.project_id) for day in days]
    more = until.date() >= end
    return schemas.UsagePage(data=data, has_more=more, next_page=f"page_{end.isoformat()}" if more else None)


def _day(page: str) -> date:
    try:
        return date.fromisoformat(page.removeprefix("page_"))
    except ValueError:
        reason = f"Invalid 'page': '{page}'. Send the 'next_page' of the previous page."
        raise InvalidValue(param="page", reason=reason) from None


def _bucket(day: date, found: list[ModelUsage], grouped: frozenset[Group], project_id: str) -> schemas.UsageBucket:
    begins = int(datetime.combine(day, time(), UTC).timestamp())
    parts = [[one] for one in found] if "model" in grouped else [found] * bool(found)
    results = [
        schemas.UsageResult(
            input_tokens=sum(one.prompt_tokens for one in part),
            output_tokens=sum(one.completion_tokens for one in part),
            num_model_requests=sum(one.requests for one in part),
            model=part[0].model_id if "model" in grouped else None,
            project_id=project_id if "project_id" in grouped else None,
        )
        for part in parts
    ]
    return schemas.UsageBucket(start_time=begins, end_time=begins + 86_400, results=results)
