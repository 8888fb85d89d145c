"""Whether to fine-tune on a file, and how: advice from its report, before any device is held."""

from fastapi import APIRouter
from sqlalchemy.orm import Session

from api.bodies import JsonRoute
from api.dependencies import CallerDep, SessionDep
from api.schemas import advice as wire
from api.schemas.wire import errors
from tunery.datasets import reports, shelf
from tunery.datasets.model import FileReport
from tunery.jobs import leases, placing
from tunery.models import registry
from tunery.planning import advisor
from tunery.planning.advice import check_technique

router = APIRouter(prefix="/v1/fine_tuning", tags=["Fine-tuning jobs"], route_class=JsonRoute)


@router.post("/advice", summary="Ask whether to fine-tune", responses=errors(404))
def give_advice(body: wire.AskAdvice, session: SessionDep, caller: CallerDep) -> wire.AdviceAnswer:
    """Counts the rows that are worth training on and says by written rules whether to prompt, to fine-tune or to
    retrieve, and with which settings. While `status` is `queued` or `running` the report is being made: ask again."""
    model = registry.find_ready(session, caller.project_id, body.model)
    check_technique(body.technique, model.facts)
    report = _report(session, caller.project_id, body)
    said = None
    if report.status == reports.READY and report.summary is not None:
        said = advisor.advise(
            advisor.rows_of(report.summary),
            body.aim,
            facts=model.facts,
            technique=body.technique,
            bf16_fits=placing.bf16_fits(model.facts, leases.devices(session)),
            has_held_out=body.validation_file is not None,
        )
    return wire.AdviceAnswer(
        **body.model_dump(include={"file", "model", "aim", "validation_file"}),
        status=report.status,
        progress=report.progress,
        error=report.error,
        advice=said,
    )


def _report(session: Session, project_id: str, body: wire.AskAdvice) -> FileReport:
    """The file's report, against the validation file where there is one. Raises NotFound, NoReport, WrongState."""
    file = shelf.find(session, project_id, body.file, param="file")
    reports.check_reported(file)
    if body.validation_file is None:
        return reports.request(session, file)
    other = shelf.find(session, project_id, body.validation_file, param="validation_file")
    reports.check_reported(other)
    return reports.request(session, file, against=other.sha256)
