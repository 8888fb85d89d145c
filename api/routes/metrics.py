"""Measurements of the whole service, for Prometheus."""

from fastapi import APIRouter
from fastapi.responses import Response

from api.dependencies import CallerDep, SessionDep
from api.json_route import JsonRoute
from api.schemas.base import errors
from tunery import monitoring
from tunery.keys.errors import Forbidden

router = APIRouter(tags=["Health"], route_class=JsonRoute)
TYPE = "text/plain; version=0.0.4; charset=utf-8"
_EXAMPLE = (
    '# HELP tunery_jobs Jobs that have not ended, by state.\n# TYPE tunery_jobs gauge\ntunery_jobs{state="queued"} 12\n'
)


@router.get(
    "/metrics",
    summary="Read the service's metrics",
    response_class=Response,
    responses=errors(403)
    | {200: {"content": {"text/plain": {"example": _EXAMPLE}}, "description": "Prometheus' text"}},
)
def read_metrics(session: SessionDep, caller: CallerDep) -> Response:
    """For administrators: jobs, devices, webhooks and requests of all projects, and how far runs were from their
    quotes."""
    if not caller.admin:
        raise Forbidden(action="read the metrics of all projects")
    return Response(monitoring.as_text(session), media_type=TYPE)
