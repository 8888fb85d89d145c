"""Quotes of jobs, from their files and from earlier runs here, and their comparison with the actual runs.

Callers own the transaction.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from pydantic import ValidationError
from sqlalchemy import ColumnElement, Select, func, select
from sqlalchemy.orm import Session

from tunery import db
from tunery.datasets import reports
from tunery.datasets.model import File
from tunery.errors import Unsupported
from tunery.failures import JobFailure
from tunery.jobs import leases, ledger, placing
from tunery.jobs.leases import Lease
from tunery.jobs.model import Attempt, HostDevice, Job
from tunery.jobs.states import State
from tunery.models.model import Model
from tunery.planning import advice, cards, quote, serving_quote, workload
from tunery.planning.memory import GIB
from tunery.planning.prices import Prices
from tunery.planning.quote import Actual, Quote
from tunery.planning.serving_quote import ServingQuote
from tunery.planning.speed import Record
from tunery.planning.workload import Counts
from tunery.serving import Rates
from tunery.spec import Columns, Plan, Technique, TrainingSpec
from tunery.trainer_protocol import Finished, Spent, StepTimes

_SIZES = {"hidden_size", "num_hidden_layers", "vocab_size"}
_RECORDS = 20


# --- before the run -----------------------------------------------------------------------------------------------


def first(session: Session, job: Job, prices: Prices) -> Quote | None:
    """Returns the quote of a job before its files are read, with the tokens of a report, or a guess.

    None where no device here and no card of the table fits it, and for a base of unknown sizes.
    """
    spec = TrainingSpec.model_validate(job.spec)
    model_info, devices = session.get_one(Model, job.base_model).model_info, leases.devices(session)
    if not model_info.keys() >= _SIZES:
        return None
    counts = _counts(session, job, advice.max_length(spec, model_info))
    try:
        plan = placing.make_plan(
            spec, model_info, devices, examples=counts.examples, longest_answer=None, model=job.model_name
        )
    except JobFailure:
        return None
    return of_plan(session, job, plan, counts, prices, devices=devices)


def keep_first(session: Session, job: Job, prices: Prices) -> None:
    """Stores the first quote with a job that has just been created."""
    if job.state == State.VALIDATING and job.quote is None and (made := first(session, job, prices)) is not None:
        job.quote = made.model_dump(mode="json")
        session.flush()


def requote(session: Session, job: Job, counts: Counts, prices: Prices) -> None:
    """Replaces a job's quote by one from the counted rows; keeps the seconds quoted at creation beside it."""
    plan = Plan.model_validate(job.plan)
    made = of_plan(session, job, plan, counts, prices, devices=leases.devices(session))
    if made is not None:
        at_creation = None if job.quote is None else Quote.model_validate(job.quote).seconds
        job.quote = made.model_copy(update={"at_creation": at_creation}).model_dump(mode="json")
        session.flush()


def of_plan(
    session: Session, job: Job, plan: Plan, counts: Counts, prices: Prices, *, devices: Sequence[HostDevice]
) -> Quote | None:
    """Returns the quote of a planned job on the device that would be claimed for it."""
    model_info = session.get_one(Model, job.base_model).model_info
    device = _device(plan, model_info, devices)
    if device is None:
        return None
    work = workload.of_job(plan, model_info, counts, "cpu" if device == "CPU" else "cuda")
    return quote.make(work, device, records(session, job, device), prices)


def serving(
    model: Model, technique: Technique, devices: Sequence[HostDevice], prices: Prices, *, rates: Rates | None = None
) -> ServingQuote | None:
    """Returns the expected cost of answers, by the model server's measured `rates` if it has served the base.

    Else on the largest GPU here that is a known card, or on the smallest card that holds the base; None for a base of
    unknown sizes, and where no card holds it.
    """
    model_info = model.model_info
    if not model_info.keys() >= _SIZES:
        return None
    if (
        measured := serving_quote.of_rates(rates, model.base_id or model.id, model_info, technique, prices)
    ) is not None:
        return measured
    gpus = sorted(placing.find_gpus(devices), key=lambda gpu: -gpu.memory_bytes)
    table = sorted(cards.CARDS, key=lambda card: (card.gigabytes, card.price))
    named = [*(gpu.device for gpu in gpus), *(card.name for card in table)]
    quotes = (serving_quote.make(model_info, technique, device, prices) for device in named)
    return next((made for made in quotes if made is not None), None)


def _device(plan: Plan, model_info: Mapping[str, Any], devices: Sequence[HostDevice]) -> str | None:
    """Returns the smallest GPU that fits, as the queue would; without any worker, the smallest card of the table."""
    need = placing.need(plan, model_info, "cuda").bytes
    if gpus := placing.find_gpus(devices):
        fitting = [gpu for gpu in gpus if gpu.memory_bytes >= need]
        return min(fitting, key=lambda gpu: gpu.memory_bytes).device if fitting else None
    if devices:
        return "CPU"
    known = [card for card in cards.CARDS if card.usable * GIB >= need]
    return min(known, key=lambda card: (card.gigabytes, card.price)).name if known else None


def _counts(session: Session, job: Job, max_length: int) -> Counts:
    """Returns what is known of a job's files before they are read."""
    files = [job.training_file, job.validation_file, job.test_file]
    columns = TrainingSpec.model_validate(job.spec).columns
    training, valid, test = (_count(session, id, job.base_model, columns, max_length) for id in files)
    assert training is not None, "a job has a training file"
    none = Counts(0, 0, "rows")
    valid, test = valid or none, test or none
    return replace(training, valid_tokens=valid.tokens, test_rows=test.examples, test_tokens=test.tokens)


def _count(session: Session, file_id: str | None, base: str, columns: Columns | None, max_length: int) -> Counts | None:
    if file_id is None:
        return None
    file = session.get_one(File, file_id)
    summary = _summary(session, file, base, columns)
    counted = summary.get("tokens")
    if counted and counted["rows"]:
        examples = summary.get("examples") or counted["rows"]
        tokens = round(min(counted["total"] / counted["rows"], max_length) * examples)
        return Counts(examples, tokens, "report")
    examples = summary.get("examples") or _summary(session, file, "", columns).get("examples")
    return Counts.of_bytes(file.bytes, examples, max_length)


def _summary(session: Session, file: File, base: str, columns: Columns | None) -> dict[str, Any]:
    """Returns the summary of a file's report, with the tokens of `base` unless that is empty."""
    found = reports.of_base(session, file, base, columns)
    return (found.summary if found is not None else None) or {}


# --- in the run ---------------------------------------------------------------------------------------------------


def expected_finish(session: Session, job: Job) -> datetime | None:
    """Returns when a job that is claimed now should end, before its own speed is known; None without a quote."""
    if job.quote is None:
        return None
    done = (job.snapshot_step or 0) / job.total_steps if job.total_steps else 0.0
    ahead = quote.left(Quote.model_validate(job.quote), min(1.0, done))
    return db.now(session) + timedelta(seconds=ahead.seconds.expected)


# --- after the run ------------------------------------------------------------------------------------------------


def conclude(session: Session, job: Job, lease: Lease, finished: Finished | None, prices: Prices) -> Actual:
    """Records what a job's run took beside its quote, with an event, and the data for later quotes.

    `finished` None: the run failed; it has a cost, but is not compared with the quote.
    """
    attempts = _attempts(session, job)
    seconds = _seconds(session, attempts)
    quoted = None if job.quote is None or finished is None else Quote.model_validate(job.quote)
    actual = quote.compare(quoted, *_devices(job, lease.gpu_indexes), seconds, prices)
    kept = None if finished is None or len(attempts) > 1 else _kept(finished, seconds)
    job.actual = actual.model_dump(mode="json") | {"kept": kept}
    session.flush()
    data = {"actual": actual.model_dump(mode="json"), "quoted": job.quote and job.quote["seconds"]}
    ledger.note(session, job.id, quote.say(quoted, actual), data=data)
    return actual


def conclude_unfinished(session: Session, job: Job, prices: Prices) -> None:
    """Records what a cancelled job, or one whose workers were lost, took. All its attempts must have ended."""
    attempts = _attempts(session, job)
    if job.actual is not None or not attempts:
        return
    device, gpus = _devices(job, attempts[-1].gpu_indexes)
    actual = quote.compare(None, device, gpus, _seconds(session, attempts), prices)
    job.actual = actual.model_dump(mode="json") | {"kept": None}
    session.flush()


def _attempts(session: Session, job: Job) -> Sequence[Attempt]:
    return session.scalars(select(Attempt).where(Attempt.job_id == job.id).order_by(Attempt.number)).all()


def _seconds(session: Session, attempts: Sequence[Attempt]) -> float:
    """Returns the seconds of all attempts, counting a live one until now."""
    now = db.now(session)
    return sum(((attempt.ended_at or now) - attempt.started_at).total_seconds() for attempt in attempts)


def _devices(job: Job, gpu_indexes: Sequence[int]) -> tuple[str, int]:
    """Returns the name and the number of an attempt's devices."""
    if not gpu_indexes:
        return "CPU", 0
    return str(job.progress.get("device") or "GPU"), len(gpu_indexes)


def _kept(finished: Finished, seconds: float) -> dict[str, Any]:
    """Returns the measurements of an uninterrupted run that later quotes are based on."""
    said = finished.model_dump(mode="json", include={"spent", "step_times", "steps", "trained_tokens"})
    return said | {"trainer_seconds": finished.seconds, "around": max(0.0, seconds - finished.seconds)}


def records(session: Session, job: Job, device: str) -> list[Record]:
    """Returns past runs on this kind of device, newest first: those on the job's base, then those on others."""
    of_base = Job.base_model == job.base_model
    found = [*_ended(session, device, of_base), *_ended(session, device, ~of_base)]
    made = (_record(each, model_info, device, is_own=each.project_id == job.project_id) for each, model_info in found)
    return [record for record in made if record is not None]


def _ended(session: Session, device: str, condition: ColumnElement[bool]) -> list[tuple[Job, dict[str, Any]]]:
    return [(job, model_info) for job, model_info in session.execute(_measured(device, condition))]


def _measured(device: str, condition: ColumnElement[bool]) -> Select[Job, dict[str, Any]]:
    """Returns the query for the newest measured runs on a kind of device, served by the index `ix_jobs_measured`."""
    # op("->") because a subscript compiles to actual['kept'], which does not match the index's expression.
    kept = func.jsonb_typeof(Job.actual.op("->")("kept"))
    return (
        select(Job, Model.model_info)
        .join(Model, Model.id == Job.base_model)
        .where(Job.state == State.SUCCEEDED, condition)
        .where(Job.actual["device"].astext == device, kept == "object")
        .order_by(Job.finished_at.desc())
        .limit(_RECORDS)
    )


def _record(job: Job, model_info: Mapping[str, Any], device: str, *, is_own: bool) -> Record | None:
    """Returns a job's run as a record, anonymous if it is another project's. None for a method unknown here."""
    assert job.actual is not None, "the query asks for it"
    kept = job.actual["kept"]
    try:
        plan = Plan.model_validate(job.plan)
    except (ValidationError, Unsupported):  # from a removed plug-in or another release
        return None
    counts = Counts(1, 1, "rows", test_rows=1 if job.test_file else 0)
    work = workload.of_job(plan, model_info, counts, "cpu" if device == "CPU" else "cuda")
    mixed = {"validation"} if plan.evaluation.task_rows else ()  # its time includes the task's answers
    return Record(
        job=job.id if is_own else None,
        model=job.base_name if is_own else f"a base of {work.shape.params / 1e9:.2g}B parameters",
        device=device,
        work=replace(
            work, steps=kept["steps"], tokens=kept["trained_tokens"], gpus=max(1, job.actual["gpus"]), valid_tokens=0
        ),
        around=kept["around"],
        trainer_seconds=kept["trainer_seconds"],
        spent={name: Spent.model_validate(part) for name, part in kept["spent"].items() if name not in mixed},
        step_times=None if kept["step_times"] is None else StepTimes.model_validate(kept["step_times"]),
    )
