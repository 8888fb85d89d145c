"""Routes of OpenAI's API that this server does not have: refused by name, with an alternative."""

from fastapi import APIRouter

from api.dependencies import ANY_KEY
from api.request_errors import RouteNotFound

router = APIRouter(prefix="/v1", include_in_schema=False, dependencies=[ANY_KEY])

_METHODS = ["GET", "POST", "DELETE"]


@router.api_route("/fine_tuning/alpha/graders/{action}", methods=_METHODS)
def no_graders(action: str) -> None:
    raise RouteNotFound(
        what=(
            f"Graders ('{action}') are not supported here. Use method.type 'supervised' with technique full, lora or "
            "qlora, and set evaluation.test_file to score a job's model."
        )
    )


@router.api_route("/batches", methods=_METHODS)
@router.api_route("/batches/{batch:path}", methods=_METHODS)
def no_batches() -> None:
    raise RouteNotFound(
        what=(
            "Batches are not supported here. Send each request of the file to the route that it names, several at "
            "once: the model server answers them together."
        )
    )


@router.api_route("/evals", methods=_METHODS)
@router.api_route("/evals/{evaluation:path}", methods=_METHODS)
def no_evals() -> None:
    raise RouteNotFound(
        what=(
            "Evals are not supported here. Set evaluation.test_file in a job, or send "
            "`POST /v1/models/{model}/scorecards` for a model that is trained already."
        )
    )


@router.api_route("/fine_tuning/checkpoints/{checkpoint:path}", methods=_METHODS)
def no_permissions() -> None:
    raise RouteNotFound(
        what=(
            "Checkpoint permissions are not supported here: a checkpoint belongs to its project, and every key of the "
            "project may use it. `GET /v1/fine_tuning/jobs/{id}/checkpoints` lists them."
        )
    )
