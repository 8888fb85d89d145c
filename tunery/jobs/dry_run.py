"""Dry runs: a job's request is checked, planned and estimated. Nothing is stored."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from shlex import quote
from typing import Any

from sqlalchemy.orm import Session

from tunery.datasets import reports
from tunery.datasets.model import File, FileReport
from tunery.datasets.rules import LEAST_EXAMPLES
from tunery.failures import InvalidNExamples, InvalidTrainingFile, JobFailure
from tunery.jobs import leases, placing, quoting
from tunery.jobs.model import Job
from tunery.jobs.states import State
from tunery.models.model import Model
from tunery.planning import advice, advisor, capacity, fitting
from tunery.planning.fitting import CardFit, StepPlan
from tunery.planning.peak import Estimate
from tunery.planning.prices import Prices
from tunery.planning.quote import Quote
from tunery.rows import keys
from tunery.spec import Columns, Dpo, Plan, Supervised, TrainingSpec

_NO_REPORT = (
    "The rows are not counted, as the file has no report by these columns. Request it: `tunery files report {file} "
    "--columns {columns}`."
)
RateOf = Callable[[Model, File, Columns | None], float | None]


def no_rate(_base: Model, _file: File, _columns: Columns | None) -> float | None:
    """Returns None: there is no tokenizer to count with."""
    return None


@dataclass
class DryRun:
    """The result of a dry run: a job that is in no session, and the report of its training file.

    `memory`: the minimum by kind of device; `expected`: how the trainer would run a step on the largest GPU here;
    `cards`: the known ones; `quote`: the expected time and cost. Until the report is ready the rows are not counted:
    the job has no plan, and its quote is a guess.
    """

    job: Job
    report: FileReport | None
    memory: dict[str, Estimate] = field(default_factory=dict)
    expected: StepPlan | None = None
    cards: list[CardFit] = field(default_factory=list)
    quote: Quote | None = None
    warnings: list[str] = field(default_factory=list)


def judge(session: Session, job: Job, prices: Prices, rate_of: RateOf = no_rate) -> DryRun:
    """Returns the dry run of a job. A job that validation would fail is marked as failed, with the reason.

    `rate_of`: returns the learned tokens per byte of a file's answers, by a base's tokenizer.
    """
    job.created_at, job.state, job.step, job.progress = datetime.now(UTC), State.VALIDATING.value, 0, {}
    file = session.get_one(File, job.training_file)
    columns = TrainingSpec.model_validate(job.spec).columns
    found = DryRun(job, reports.find(session, file, columns=columns))
    if columns is not None and found.report is None:
        found.warnings.append(_NO_REPORT.format(file=file.id, columns=quote(columns.spelled)))
    try:
        _plan(session, found, rate_of)
        found.quote = quoting.first(session, job, prices)
    except JobFailure as error:
        job.state = State.FAILED.value
        job.error_code, job.error_message, job.error_param = error.code, error.message, error.param
    return found


def _plan(session: Session, found: DryRun, rate_of: RateOf) -> None:
    """Adds the job's plan and what follows from it. Raises DoesNotFit, InvalidNExamples, InvalidTrainingFile."""
    spec = TrainingSpec.model_validate(found.job.spec)
    base, devices = session.get_one(Model, found.job.base_model), leases.devices(session)
    model_info = base.model_info
    summary = found.report.summary if found.report and found.report.status == reports.READY else None
    examples = None if summary is None else summary["examples"]
    known: dict[str, Any] = {"examples": examples or 1, "longest_answer": None, "model": found.job.model_name}
    found.cards = fitting.of_plan(model_info, placing.make_plan(spec, model_info, (), **known))
    plan = placing.make_plan(spec, model_info, devices, **known)
    found.expected = placing.step_here(plan, model_info, devices)
    found.memory = {device: placing.need(plan, model_info, device) for device in ("cuda", "cpu")}
    gpu_bytes, cpu_bytes = (
        placing.need(plan, model_info, device, longest=placing.ANY_ROW).bytes for device in ("cuda", "cpu")
    )
    if summary is not None and (reason := _refusal(spec, summary)) is not None:
        raise InvalidTrainingFile(param="training_file", role="training", reason=reason)
    if summary is not None and examples is not None:
        if examples < LEAST_EXAMPLES:
            raise InvalidNExamples(param="training_file", role="Training", n=examples, least=LEAST_EXAMPLES)
        found.job.plan = plan.model_dump(mode="json")
        found.warnings += _of_rows(plan, model_info, summary, asked_length=spec.max_seq_length)
        rate = rate_of(base, session.get_one(File, found.job.training_file), spec.columns)
        tokens = advisor.rows_of(summary, rate).answer_tokens
        found.warnings += capacity.warnings(model_info, plan.technique, tokens)
    found.warnings += placing.border_warnings(plan, model_info, devices)
    found.warnings += placing.warnings(devices, gpus=plan.resources.gpus, gpu_bytes=gpu_bytes, cpu_bytes=cpu_bytes)


def _refusal(spec: TrainingSpec, summary: Mapping[str, Any]) -> str | None:
    """Returns why the job's method cannot learn from the rows that the report describes; None if it can."""
    if summary.get("reason") is not None:
        return str(summary["reason"])
    are_pairs = summary.get("are_pairs")
    if isinstance(spec.method, Dpo) and are_pairs is False:
        return keys.NO_PREFERENCE
    return keys.PREFERENCE if isinstance(spec.method, Supervised) and are_pairs else None


def _of_rows(plan: Plan, model_info: Mapping[str, Any], summary: Mapping[str, Any], *, asked_length: int) -> list[str]:
    of_file = [f"Training file: {warning}" for warning in summary["warnings"]]
    of_plan = advice.warnings(plan, examples=summary["examples"], model_info=model_info, asked_length=asked_length)
    return [*of_file, *of_plan]
