"""Measurements of the whole service, for Prometheus."""

from fastapi import APIRouter
from fastapi.responses import Response

from api.dependencies import CallerDep, SessionDep
from api.json_route import JsonRoute
from api.schemas.base import errors
from tunery.jobs import quote_errors
from tunery.keys.errors import Forbidden

router = APIRouter(tags=["Health"], route_class=JsonRoute)
TYPE = "text/plain; version=0.0.4; charset=utf-8"
_EXAMPLE = '# TYPE tunery_jobs_in_quoted_range counter\ntunery_jobs_in_quoted_range{speed_from="same"} 12\n'


@router.get(
    "/metrics",
    summary="Read the service's metrics",
    response_class=Response,
    responses=errors(403)
    | {200: {"content": {"text/plain": {"example": _EXAMPLE}}, "description": "Prometheus' text"}},
)
def read_metrics(session: SessionDep, caller: CallerDep) -> Response:
    """For administrators: the deviation of all projects' runs from their quotes."""
    if not caller.admin:
        raise Forbidden(action="read the metrics of all projects")
    return Response(quote_errors.as_text(session), media_type=TYPE)
