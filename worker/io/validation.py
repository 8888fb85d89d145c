"""From `validating_files` to the queue: rows judged, every "auto" decided, memory estimated, before a GPU is held."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy.orm import Session

from tunery import db
from tunery.datasets import rules
from tunery.datasets.model import File
from tunery.datasets.rules import Summary
from tunery.db import UNREACHABLE
from tunery.errors import TuneryError, Unavailable
from tunery.failures import InvalidTrainingFile, JobFailure, ValidationBroke, ValidationLost
from tunery.jobs import leases, ledger
from tunery.jobs.model import Job, Slot
from tunery.jobs.states import State
from tunery.models.model import Model
from tunery.planning import advice, memory
from tunery.rows.errors import CannotRender
from tunery.rows.messages import FileRole
from tunery.rows.template import ChatTemplate
from tunery.settings import Settings
from tunery.spec import Plan, TrainingSpec
from tunery.storage import Storage
from tunery.storage.errors import ChecksumMismatch, ObjectMissing
from worker.io.claims import only_here
from worker.supervisor import staging

log = logging.getLogger(__name__)

MAX_VALIDATIONS = 3
"""Workers that may end over one job's files before the job fails: every other job waits behind it."""
_INTERRUPTED: set[str] = set()
"""Jobs whose validation broke off in this process through an outage."""


@dataclass(frozen=True)
class Case:
    """A job with all that its validation reads, taken out of the database before the long work."""

    job_id: str
    created_at: datetime
    spec: TrainingSpec
    files: Mapping[FileRole, File]
    base: Model
    slots: Sequence[Slot]

    @property
    def max_length(self) -> int:
        return advice.max_length(self.spec, self.base.facts)


@dataclass(frozen=True)
class Verdict:
    """`gpu_bytes` and `cpu_bytes` are what a claim needs to know of the memory; see `ledger.enqueue`."""

    plan: Plan
    gpu_bytes: int
    cpu_bytes: int | None
    warnings: list[str]


def validate_next(settings: Settings, storage: Storage) -> bool:
    """One job; whether there was one."""
    skip: list[str] = []
    while True:
        with db.transaction() as session:
            job = ledger.next_to_validate(session, skip=skip)
            if job is None:
                return False
            skip.append(job.id)
        with only_here(f"validate {job.id}") as mine:
            if mine:
                _settle(job.id, settings, storage)
                return True


def _open(session: Session, job: Job) -> Case:
    ids: dict[FileRole, str | None] = {
        "training": job.training_file,
        "validation": job.validation_file,
        "test": job.test_file,
    }
    return Case(
        job_id=job.id,
        created_at=job.created_at,
        spec=TrainingSpec.model_validate(job.spec),
        files={role: session.get_one(File, id) for role, id in ids.items() if id is not None},
        base=session.get_one(Model, job.base_model),
        slots=leases.slots(session),
    )


def _settle(job_id: str, settings: Settings, storage: Storage) -> None:
    if not _announce(job_id):
        return
    try:
        _record(job_id, _verdict(job_id, settings, storage))
    except Exception:
        _INTERRUPTED.add(job_id)
        raise


def _record(job_id: str, verdict: Verdict | TuneryError) -> None:
    with db.transaction() as session:
        job = session.get_one(Job, job_id, with_for_update=True)
        if job.state != State.VALIDATING:  # cancelled meanwhile
            return
        if isinstance(verdict, TuneryError):
            ledger.fail_job(session, job, verdict)
        else:
            ledger.enqueue(
                session,
                job,
                verdict.plan,
                gpu_bytes=verdict.gpu_bytes,
                cpu_bytes=verdict.cpu_bytes,
                warnings=verdict.warnings,
            )


def _announce(job_id: str) -> bool:
    """Notes that it is the job's turn; False when the job has gone on without us, or has ended too many workers."""
    with db.transaction() as session:
        job = session.get_one(Job, job_id, with_for_update=True)
        if job.state != State.VALIDATING:
            return False
        if job_id in _INTERRUPTED:  # by an outage of ours, after which this process lived on
            job.validations -= 1
        if job.validations >= MAX_VALIDATIONS:
            ledger.fail_job(session, job, ValidationLost(times=job.validations))
            return False
        job.validations += 1
        message = f"Validating training file: {job.training_file}"
        if job.validation_file is not None:
            message += f" and validation file: {job.validation_file}"
        ledger.note(session, job.id, message)
    _INTERRUPTED.discard(job_id)
    return True


def _verdict(job_id: str, settings: Settings, storage: Storage) -> Verdict | TuneryError:
    """Raises only what another time may mend."""
    try:
        with db.transaction() as session:
            case = _open(session, session.get_one(Job, job_id))
        return judge(case, settings, storage)
    except JobFailure as error:
        return error
    except (Unavailable, *UNREACHABLE):
        raise
    except (CannotRender, ObjectMissing, ChecksumMismatch) as error:
        return InvalidTrainingFile(param="training_file", role="training", reason=error.message)
    except Exception as error:  # a fault of ours, which must not keep every later job from its turn
        log.exception("%s could not be validated", job_id)
        return ValidationBroke(reason=type(error).__name__)


def judge(case: Case, settings: Settings, storage: Storage) -> Verdict:
    """Raises JobFailure, whose text is the owner's to read, where the job cannot succeed."""
    template = ChatTemplate.load(staging.text_folder(settings.models_dir, storage, case.base), now=case.created_at)
    summaries = {role: _read(case, role, storage, template) for role in case.files}
    plan = _plan(case, summaries["training"])
    examples, facts = summaries["training"].examples, case.base.facts
    warnings = [
        f"{role.capitalize()} file: {warning}"
        for role, summary in summaries.items()
        for warning in summary.warnings(case.max_length)
    ]
    warnings += advice.warnings(plan, examples=examples, facts=facts, asked_length=case.spec.max_seq_length)
    gpu_bytes, cpu_bytes = (_need(case, plan, device) for device in ("cuda", "cpu"))
    return Verdict(
        plan,
        gpu_bytes,
        None if _gpus(case.slots) else cpu_bytes,
        [*warnings, *_of_overlap(case, storage), *_of_hosts(plan, case.slots, gpu_bytes, cpu_bytes)],
    )


def _read(case: Case, role: FileRole, storage: Storage, template: ChatTemplate) -> Summary:
    file = case.files[role]
    if file.status == "error":
        reason = file.status_details or "It could not be read."
        raise InvalidTrainingFile(param=f"{role}_file", role=role, reason=reason)
    return rules.check_examples(storage.read(file.key), role=role, template=template, max_length=case.max_length)


def _of_overlap(case: Case, storage: Storage) -> list[str]:
    """A warning, no failure: OpenAI takes such files, and code written for it must go on working."""
    train, found = case.files["training"], []
    for role, file in case.files.items():
        try:
            if role != "training":
                rules.check_disjoint(storage.read(train.key), storage.read(file.key), role=role)
        except InvalidTrainingFile as error:
            found.append(f"The {role} file's figures will flatter the model. {error.fields['reason']}")
    return found


def _plan(case: Case, summary: Summary) -> Plan:
    """Raises DoesNotFit where the largest device known is too small; without any worker yet nothing is too large."""
    facts, length = case.base.facts, case.max_length
    # A host's memory is no measure for a job that a GPU is there for: it would wait for weeks on a CPU.
    largest = max(_gpus(case.slots) or case.slots, key=lambda slot: slot.memory_bytes, default=None)
    if largest is None:
        return advice.resolve(case.spec, examples=summary.examples, facts=facts, bf16_fits=True)
    limits: dict[str, Any] = {
        "max_seq_length": length,
        "capacity": largest.memory_bytes,
        "device": "cpu" if largest.gpu_index is None else "cuda",
    }
    fits = memory.bf16_fits(facts, **limits)
    plan = advice.resolve(case.spec, examples=summary.examples, facts=facts, bf16_fits=fits)
    memory.check(facts, plan.technique, **limits, model=case.base.id)
    return plan


def _gpus(slots: Sequence[Slot]) -> list[Slot]:
    return [slot for slot in slots if slot.gpu_index is not None]


def _need(case: Case, plan: Plan, device: str) -> int:
    return memory.estimate(case.base.facts, plan.technique, max_seq_length=case.max_length, device=device).bytes


def _of_hosts(plan: Plan, slots: Sequence[Slot], gpu_bytes: int, cpu_bytes: int) -> list[str]:
    """A job that no host here can take waits, which should not surprise its owner."""
    if not slots:
        needs = f"a GPU with {memory.gib(gpu_bytes)} of memory, or a host with {memory.gib(cpu_bytes)}"
        return [f"No worker for training has come yet: the job waits for one that has {needs}."]
    large = [slot for slot in _gpus(slots) if slot.memory_bytes >= gpu_bytes] or slots
    hosts = [slot.host for slot in large]
    most = max(hosts.count(host) for host in hosts)
    if plan.resources.gpus <= most:
        return []
    return [
        f"The job asks for {plan.resources.gpus} GPUs and no host here has more than {most} with the memory that it "
        "needs: it waits for one."
    ]
