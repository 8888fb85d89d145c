"""Whether to fine-tune on a file, and how: advice from its report, before any device is held."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import HTMLResponse, Response
from sqlalchemy.orm import Session

from api import serving_rates
from api.dependencies import CallerDep, ColumnsDep, SessionDep, SettingsDep, StorageDep
from api.json_route import JsonRoute
from api.schemas import advice as schemas
from api.schemas.base import errors
from tunery.artifacts import rates
from tunery.baselines import ledger, table, verdict
from tunery.baselines.model import Baseline
from tunery.baselines.order import Order
from tunery.baselines.table import Row
from tunery.datasets import files, reports
from tunery.datasets.model import File, FileReport
from tunery.datasets.report import page
from tunery.errors import InvalidValue
from tunery.jobs import leases, placing, quoting
from tunery.keys.auth import Caller
from tunery.models import registry
from tunery.models.model import Model
from tunery.planning import advice_page, advisor
from tunery.planning.advice import check_technique
from tunery.planning.advisor import Advice
from tunery.planning.recommendation import Aim
from tunery.planning.serving_quote import ServingQuote
from tunery.settings import Settings
from tunery.spec import Lora
from tunery.storage import Storage

router = APIRouter(tags=["Fine-tuning jobs"], route_class=JsonRoute)


@dataclass(frozen=True)
class _Given:
    """Advice, what it is made of, and the quote of serving. `advice`: None while there is no report; `rows`: a
    baseline's table."""

    file: File
    report: FileReport
    advice: Advice | None
    rows: list[Row]
    serving: ServingQuote | None = None


@router.post("/v1/fine_tuning/advice", summary="Ask whether to fine-tune", responses=errors(404))
def give_advice(
    body: schemas.AskAdvice, session: SessionDep, caller: CallerDep, settings: SettingsDep, storage: StorageDep
) -> schemas.AdviceAnswer:
    """Counts the usable rows and recommends, by documented rules, prompting, fine-tuning or retrieval, and settings for
    it. While `status` is `queued` or `running` the report is being made: repeat the request.

    With a `baseline` it includes the measurements; if the baseline has a target, it recommends the cheapest option that
    meets it."""
    given = _advise(session, caller, settings, storage, body)
    return schemas.AdviceAnswer(
        **body.model_dump(include={"file", "model", "aim", "validation_file", "baseline", "columns"}),
        status=given.report.status,
        progress=given.report.progress,
        error=given.report.error,
        advice=given.advice,
        table=given.rows,
        currency=settings.currency,
        serving=given.serving,
    )


@router.get(
    "/v1/files/{file_id}/advice.html",
    summary="Show whether to fine-tune on a file",
    tags=["Files"],
    response_class=Response,
    responses=errors(404) | {200: {"content": {"text/html": {"example": "<!doctype html>"}}, "description": "A page"}},
)
def show_advice(
    file_id: str,
    session: SessionDep,
    caller: CallerDep,
    settings: SettingsDep,
    storage: StorageDep,
    columns: ColumnsDep,
    model: Annotated[str, Query(min_length=1, description="A base or fine-tuned model")],
    aim: Annotated[Aim, Query(description="What the model should learn")],
    validation_file: Annotated[
        str | None, Query(min_length=1, description="Held-out rows, which are not counted as training rows")
    ] = None,
    baseline: Annotated[str | None, Query(min_length=1, description="A baseline whose table is shown")] = None,
) -> HTMLResponse:
    """The advice as a self-contained page, which reloads until the report is ready."""
    asked = schemas.AskAdvice(
        file=file_id, model=model, aim=aim, validation_file=validation_file, baseline=baseline, columns=columns
    )
    given = _advise(session, caller, settings, storage, asked)
    state = {"status": given.report.status, "progress": given.report.progress, "error": given.report.error}
    measured = [verdict.cells(row) for row in given.rows]
    shown = advice_page.render(
        given.file.filename,
        aim,
        given.advice,
        state=state,
        measured=measured,
        currency=settings.currency,
        serving=given.serving,
    )
    return HTMLResponse(shown, headers=page.HEADERS)


def _advise(session: Session, caller: Caller, settings: Settings, storage: Storage, body: schemas.AskAdvice) -> _Given:
    """Raises NotFound, NoReport, WrongState, InvalidValue."""
    model = registry.find_ready(session, caller.project_id, body.model)
    check_technique(body.technique, model.model_info)
    file = files.find(session, caller.project_id, body.file, param="file")
    baseline = _baseline(session, caller.project_id, body.baseline, model)
    rows = [] if baseline is None else table.rows(session, baseline, settings)
    report = _report(session, caller.project_id, file, body)
    if report.status != reports.READY or report.summary is None:
        return _Given(file, report, None, rows)
    base = model if model.base_id is None else session.get_one(Model, model.base_id)
    devices = leases.devices(session)
    said = advisor.advise(
        advisor.rows_of(report.summary, rates.of_file(storage, base, file, body.columns)),
        body.aim,
        model_info=model.model_info,
        technique=body.technique,
        bf16_fits=placing.bf16_fits(model.model_info, devices),
        has_held_out=body.validation_file is not None,
    )
    if baseline is not None:
        said = verdict.judge(said, rows, Order.model_validate(baseline.order).target)
    serving = quoting.serving(model, body.technique or Lora(), devices, settings, rates=serving_rates.fetch(settings))
    return _Given(file, report, said, rows, serving)


def _baseline(session: Session, project_id: str, id: str | None, model: Model) -> Baseline | None:
    """Returns the baseline that is named, once it is measured. Raises NotFound, WrongState, InvalidValue."""
    if id is None:
        return None
    found = ledger.find_measured(session, project_id, id, param="baseline")
    if found.model != model.id:
        reason = f"Baseline '{id}' measured '{found.model}'. Name that model, or create a baseline of '{model.id}'."
        raise InvalidValue(param="baseline", reason=reason)
    return found


def _report(session: Session, project_id: str, file: File, body: schemas.AskAdvice) -> FileReport:
    """The file's report, compared with another file where one is named. Raises NotFound, NoReport, WrongState."""
    reports.check_reported(file)
    if body.validation_file is None:
        return reports.request(session, file, columns=body.columns)
    other = files.find(session, project_id, body.validation_file, param="validation_file")
    reports.check_reported(other)
    return reports.request(session, file, against=other.sha256, columns=body.columns)
