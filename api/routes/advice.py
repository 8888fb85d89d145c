"""Whether to fine-tune on a file, and how: advice from its report, before any device is held."""

from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import HTMLResponse, Response
from sqlalchemy.orm import Session

from api.bodies import JsonRoute
from api.dependencies import CallerDep, SessionDep, SettingsDep
from api.schemas import advice as wire
from api.schemas.wire import errors
from tunery.datasets import reports, shelf
from tunery.datasets.model import File, FileReport
from tunery.datasets.report import page
from tunery.jobs import leases, placing, quoting
from tunery.keys.ring import Caller
from tunery.models import registry
from tunery.planning import advice_page, advisor
from tunery.planning.advice import check_technique
from tunery.planning.advisor import Advice
from tunery.planning.recommendation import Aim
from tunery.planning.serving_quote import ServingQuote
from tunery.settings import Settings
from tunery.spec import Lora

router = APIRouter(tags=["Fine-tuning jobs"], route_class=JsonRoute)


@router.post("/v1/fine_tuning/advice", summary="Ask whether to fine-tune", responses=errors(404))
def give_advice(
    body: wire.AskAdvice, session: SessionDep, caller: CallerDep, settings: SettingsDep
) -> wire.AdviceAnswer:
    """Counts the rows that are worth training on and says by written rules whether to prompt, to fine-tune or to
    retrieve, and with which settings. While `status` is `queued` or `running` the report is being made: ask again."""
    _, report, said = _advise(session, caller, body)
    return wire.AdviceAnswer(
        **body.model_dump(include={"file", "model", "aim", "validation_file"}),
        status=report.status,
        progress=report.progress,
        error=report.error,
        advice=said,
        serving=None if said is None else _serving(session, caller, body, settings),
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
    model: Annotated[str, Query(min_length=1, description="A base or fine-tuned model")],
    aim: Annotated[Aim, Query(description="What the model should learn")],
    validation_file: Annotated[str | None, Query(min_length=1, description="Held-out rows, which do not count")] = None,
) -> HTMLResponse:
    """The advice as one page that needs nothing else. While the report is made, the page loads itself again."""
    asked = wire.AskAdvice(file=file_id, model=model, aim=aim, validation_file=validation_file)
    file, report, said = _advise(session, caller, asked)
    state = {"status": report.status, "progress": report.progress, "error": report.error}
    return HTMLResponse(advice_page.render(file.filename, aim, said, state=state), headers=page.HEADERS)


def _advise(session: Session, caller: Caller, body: wire.AskAdvice) -> tuple[File, FileReport, Advice | None]:
    """The advice; None while there is no report. Raises NotFound, NoReport, WrongState, InvalidValue."""
    model = registry.find_ready(session, caller.project_id, body.model)
    check_technique(body.technique, model.facts)
    file = shelf.find(session, caller.project_id, body.file, param="file")
    report = _report(session, caller.project_id, file, body.validation_file)
    if report.status != reports.READY or report.summary is None:
        return file, report, None
    said = advisor.advise(
        advisor.rows_of(report.summary),
        body.aim,
        facts=model.facts,
        technique=body.technique,
        bf16_fits=placing.bf16_fits(model.facts, leases.devices(session)),
        has_held_out=body.validation_file is not None,
    )
    return file, report, said


def _serving(session: Session, caller: Caller, body: wire.AskAdvice, settings: Settings) -> ServingQuote | None:
    facts = registry.find_ready(session, caller.project_id, body.model).facts
    return quoting.serving(facts, body.technique or Lora(), leases.devices(session), settings)


def _report(session: Session, project_id: str, file: File, against: str | None) -> FileReport:
    """The file's report, compared with another file where one is named. Raises NotFound, NoReport, WrongState."""
    reports.check_reported(file)
    if against is None:
        return reports.request(session, file)
    other = shelf.find(session, project_id, against, param="validation_file")
    reports.check_reported(other)
    return reports.request(session, file, against=other.sha256)
