"""The checks that a job has to pass before it may wait for a GPU, in order: of its files, its plan and the devices.

A check returns warnings, with which the job goes on, or raises JobFailure, whose text the job's owner reads. A new
check is a function and a line in CHECKS.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path

from tunery.datasets import rules
from tunery.datasets.model import File
from tunery.datasets.rules import Summary
from tunery.failures import InvalidTrainingFile
from tunery.jobs import placing
from tunery.jobs.model import HostDevice
from tunery.models.model import Model
from tunery.planning import advice, capacity
from tunery.planning.workload import Counts
from tunery.rows import fingerprint
from tunery.rows.bulk import Reading
from tunery.rows.encoding import find_encoder
from tunery.rows.messages import FileRole
from tunery.rows.template import ChatTemplate
from tunery.settings import Settings
from tunery.spec import Evaluation, Plan, TrainingSpec
from tunery.storage import Storage
from worker.io import verdicts
from worker.supervisor import staging


@dataclass(frozen=True)
class Case:
    """A job with everything that its validation reads, loaded from the database before the long work.

    `model` is the job's model as its owner named it; `rendered_by` the one whose chat template renders the rows.
    """

    job_id: str
    now: datetime
    spec: TrainingSpec
    files: Mapping[FileRole, File]
    base: Model
    rendered_by: Model
    model: str
    devices: Sequence[HostDevice]

    @property
    def max_length(self) -> int:
        return advice.max_length(self.spec, self.base.model_info)


@dataclass(frozen=True)
class Verdict:
    """The plan and its warnings. `gpu_bytes` and `cpu_bytes` are the memory that a claim reads: `ledger.enqueue`."""

    plan: Plan
    gpu_bytes: int
    cpu_bytes: int | None
    warnings: list[str]
    counts: Counts


@dataclass
class Findings:
    """What earlier checks find for later ones. `check_fit` sets `plan` and the memory that it needs."""

    storage: Storage
    template: ChatTemplate
    kept: Path
    """The folder with earlier jobs' findings."""
    summaries: dict[FileRole, Summary] = field(default_factory=dict)
    overlap: verdicts.Recorded = field(default_factory=verdicts.Recorded)
    plan: Plan = field(init=False)
    gpu_bytes: int = field(init=False)
    cpu_bytes: int = field(init=False)


def judge(case: Case, settings: Settings, storage: Storage) -> Verdict:
    """Returns the plan of a job that can succeed. Raises JobFailure if it cannot, and CannotRender, ObjectMissing,
    ChecksumMismatch if its base or files cannot be read.
    """
    texts = staging.text_folder(settings.models_dir, storage, case.rendered_by)
    template = ChatTemplate.load(texts, now=case.now)
    found = Findings(storage, template, settings.models_dir / verdicts.NAME)
    warnings = [warning for check in CHECKS for warning in check(case, found)]
    return Verdict(found.plan, found.gpu_bytes, _cpu_bytes(case, found), warnings, _counts(found.summaries))


def check_files(case: Case, found: Findings) -> list[str]:
    """Reads each file once and summarises all that later checks need to know of its rows."""
    for role, file in case.files.items():  # the training file first: the others are compared with it
        if file.status == "error":
            reason = file.status_details or "It could not be read."
            raise InvalidTrainingFile(param=f"{role}_file", role=role, reason=reason)
        found.summaries[role] = _summarise(case, found, role, file)
    if case.spec.cut_answers == "limit":
        found.summaries["training"].check_cut_answers(case.max_length)
    return [
        f"{role.capitalize()} file: {warning}"
        for role, summary in found.summaries.items()
        for warning in summary.warnings(case.max_length)
    ]


def _summarise(case: Case, found: Findings, role: FileRole, file: File) -> Summary:
    """Returns the file's summary: newly read, or kept on this host from an earlier job."""
    encoder = find_encoder(case.spec.method, role, case.spec.columns, case.spec.cut_answers)
    reading, answered = Reading(role, encoder, found.template, case.max_length), _answered(case.spec.evaluation, role)
    overlap = found.overlap if len(case.files) > 1 else None
    name = fingerprint.of_rows(file.sha256, reading, rules, answered, overlap is not None)
    found.overlap.rows.clear()
    path = found.kept / f"{file.sha256}-{name}" if name is not None else None
    read = partial(found.storage.read, file.key)
    if path is not None and (known := verdicts.find(path, reading, read, found.overlap)) is not None:
        return known
    summary = rules.check_examples(
        read(),
        role=role,
        template=found.template,
        max_length=case.max_length,
        encoder=encoder,
        answered=answered,
        overlap=overlap,
    )
    if path is not None:
        verdicts.save(path, summary, found.overlap)
    return summary


def _answered(evaluation: Evaluation, role: FileRole) -> int:
    """Returns how many of a file's rows, counted from its start, include all that a model will answer."""
    sampled = sys.maxsize if evaluation.task_rows else 0  # spread over the whole file
    return {"test": evaluation.max_rows, "validation": sampled}.get(role, 0)


def check_fit(case: Case, found: Findings) -> list[str]:
    """Makes the plan and estimates its memory. Raises DoesNotFit if the largest known device is too small."""
    found.plan = _plan(case, found.summaries)
    found.gpu_bytes, found.cpu_bytes = (
        placing.wanted_bytes(found.plan, _least(case, found, device), case.devices, on_gpu=device == "cuda")
        for device in ("cuda", "cpu")
    )
    return []


def _least(case: Case, found: Findings, device: str) -> int:
    return placing.need(found.plan, case.base.model_info, device, longest=found.summaries["training"].longest).bytes


def check_answers(_case: Case, found: Findings) -> list[str]:
    """Warns of rows whose wanted answer is longer than the token limit, so that no model can get them right."""
    return [
        f"{role.capitalize()} file: {warning}"
        for role, summary in found.summaries.items()
        for warning in summary.check_limit(advice.answer_limit(found.plan.evaluation, summary.longest_answer))
    ]


def check_plan(case: Case, found: Findings) -> list[str]:
    """Warns if the plan will hardly learn anything, and if its adapter is too small or too large."""
    training, model_info, asked = found.summaries["training"], case.base.model_info, case.spec.max_seq_length
    of_plan = advice.warnings(found.plan, examples=training.examples, model_info=model_info, asked_length=asked)
    return of_plan + capacity.warnings(model_info, found.plan.technique, training.trained_tokens)


def check_overlap(case: Case, found: Findings) -> list[str]:
    """Warns of held-out rows that are trained on. OpenAI accepts such files, and code written for it must keep working,
    so the job does not fail.
    """
    return [
        f"The {role} file's scores will be too good. {reason}"
        for role in case.files
        if role != "replay" and (reason := found.overlap.reason(role))
    ]


def check_hosts(case: Case, found: Findings) -> list[str]:
    """Warns of a job that may not fit, or that waits because no host can take it, which would surprise its owner."""
    gpus, longest = found.plan.resources.gpus, found.summaries["training"].longest
    border = placing.border_warnings(found.plan, case.base.model_info, case.devices, longest=longest)
    return border + placing.warnings(case.devices, gpus=gpus, gpu_bytes=found.gpu_bytes, cpu_bytes=found.cpu_bytes)


CHECKS: tuple[Callable[[Case, Findings], list[str]], ...] = (
    check_files,
    check_fit,
    check_answers,
    check_plan,
    check_overlap,
    check_hosts,
)
"""In order: `check_files` and `check_fit` find what the others read."""


def _plan(case: Case, summaries: Mapping[FileRole, Summary]) -> Plan:
    """Makes the plan. Raises DoesNotFit if the largest known device is too small; before a first worker, nothing is."""
    answers = [summary.longest_answer for summary in summaries.values() if summary.answer_tokens]
    return placing.make_plan(
        case.spec,
        case.base.model_info,
        case.devices,
        examples=summaries["training"].examples,
        longest_answer=max(answers, default=None),
        model=case.model,
        longest=summaries["training"].longest,
    )


def _counts(summaries: Mapping[FileRole, Summary]) -> Counts:
    """Returns the counts for a quote, added up row by row."""
    training, valid, test = (summaries.get(role) for role in ("training", "validation", "test"))
    assert training is not None, "a job has a training file"
    return Counts(
        examples=training.examples - len(training.left_out) - len(training.unlearnable),
        tokens=training.tokens,
        source="rows",
        valid_tokens=valid.tokens if valid else 0,
        test_rows=test.examples - len(test.unscorable) if test else 0,
        test_tokens=test.tokens if test else 0,
    )


def _cpu_bytes(case: Case, found: Findings) -> int | None:
    """Returns the bytes that the job needs on a host without a GPU; None if there is a GPU, for which it waits."""
    return None if placing.find_gpus(case.devices) else found.cpu_bytes
