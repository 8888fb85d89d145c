"""Baselines: prompting measured on a user's own task before any training; a worker does it."""

from fastapi import APIRouter
from fastapi.responses import StreamingResponse
from sqlalchemy.orm import Session

from api.dependencies import After, CallerDep, SessionDep, SettingsDep, StorageDep, UpTo100
from api.json_route import JsonRoute
from api.schemas import baselines as schemas
from api.schemas.base import CursorList, errors
from tunery.baselines import duration, external, ledger, table
from tunery.baselines.model import Baseline
from tunery.baselines.order import Order
from tunery.datasets import files
from tunery.models import registry
from tunery.models.model import Model
from tunery.settings import Settings

router = APIRouter(prefix="/v1/fine_tuning/baselines", tags=["Fine-tuning jobs"], route_class=JsonRoute)


def _shown(session: Session, settings: Settings, row: Baseline) -> schemas.Baseline:
    shown = schemas.Baseline.of(row, table.rows(session, row, settings), currency=settings.currency)
    return shown.model_copy(update={"warnings": _warnings(session, settings, row)})


def _warnings(session: Session, settings: Settings, row: Baseline) -> list[str]:
    """Of one that has not ended: which of its models are too large for the CPU, if they are asked there."""
    if row.status not in ledger.LIVE or settings.io_gpu is not None:
        return []
    order = Order.model_validate(row.order)
    return duration.warnings(order, [session.get_one(Model, id) for id in (row.model, *order.compare)])


@router.post("", summary="Measure prompting", responses=errors(404, 429))
def create_baseline(
    body: schemas.AskBaseline, session: SessionDep, caller: CallerDep, settings: SettingsDep
) -> schemas.Baseline:
    """Before any training, the model answers the eval rows without and with examples in the prompt. A worker runs it;
    `tunery baseline` waits for the table."""
    project = caller.project_id
    model = registry.find_ready(session, project, body.model)
    eval_file = files.find(session, project, body.eval_file, param="eval_file")
    examples = body.examples_file and files.find(session, project, body.examples_file, param="examples_file")
    others = [registry.find_ready(session, project, name, param="compare") for name in body.compare]
    order = ledger.compared(body.order, others)
    key = _sealed_key(body, settings)
    row = ledger.request(session, project, model, eval_file, examples or None, order, external_key=key)
    return _shown(session, settings, row)


def _sealed_key(body: schemas.AskBaseline, settings: Settings) -> str | None:
    """Returns the key of the external endpoint, encrypted. Raises Unsupported, InvalidValue, EndpointRefused."""
    if body.external is None:
        return None
    external.check(body.external, settings)
    if body.external.api_key is None or settings.external_secret is None:
        return None
    return external.seal(body.external.api_key, settings.external_secret)


@router.get("", summary="List baselines", responses=errors(404))
def list_baselines(
    session: SessionDep,
    caller: CallerDep,
    settings: SettingsDep,
    after: After = None,
    limit: UpTo100 = 20,
) -> CursorList[schemas.Baseline]:
    """Newest first."""
    rows, more = ledger.list_page(session, caller.project_id, after=after, limit=limit)
    return CursorList.of([_shown(session, settings, row) for row in rows], has_more=more)


@router.get("/{baseline_id}", summary="Retrieve a baseline", responses=errors(404))
def retrieve_baseline(
    baseline_id: str, session: SessionDep, caller: CallerDep, settings: SettingsDep
) -> schemas.Baseline:
    """Its table also has a row for each fine-tune of the model with the same eval rows."""
    return _shown(session, settings, ledger.find(session, caller.project_id, baseline_id))


@router.post("/{baseline_id}/cancel", summary="Cancel a baseline", responses=errors(404))
def cancel_baseline(
    baseline_id: str, session: SessionDep, caller: CallerDep, settings: SettingsDep
) -> schemas.Baseline:
    """Only an unfinished baseline can be cancelled."""
    return _shown(session, settings, ledger.cancel(session, caller.project_id, baseline_id))


@router.get(
    "/{baseline_id}/answers",
    summary="Download a baseline's answers",
    response_class=StreamingResponse,
    responses=errors(404)
    | {200: {"content": {"application/jsonl": {"example": "{}"}}, "description": "One line per answer"}},
)
def download_answers(
    baseline_id: str, session: SessionDep, caller: CallerDep, storage: StorageDep
) -> StreamingResponse:
    """JSON Lines: the messages, the expected answer and the model's answer."""
    row = ledger.find_measured(session, caller.project_id, baseline_id)
    return StreamingResponse(storage.read(f"{row.prefix}/answers.jsonl"), media_type="application/jsonl")
