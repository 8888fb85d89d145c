"""For load balancers and start-up scripts."""

from typing import Literal

from fastapi import APIRouter
from pydantic import ConfigDict

from api.dependencies import SessionDep
from api.schemas.base import Error, ResponseBody
from tunery import db

router = APIRouter(tags=["Health"])


class Health(ResponseBody):
    model_config = ConfigDict(json_schema_extra={"examples": [{"status": "ok"}]})

    status: Literal["ok"] = "ok"


@router.head("/healthz", include_in_schema=False)
@router.get(
    "/healthz",
    summary="Check the service",
    responses={503: {"model": Error, "description": "The database does not answer"}},
)
def healthz(session: SessionDep) -> Health:
    """Returns 200 while the database can be reached. Needs no key."""
    db.now(session)
    return Health()
