"""Compares a rerun with its original job: inputs, environment and results."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from sqlalchemy import select
from sqlalchemy.orm import Session

from tunery.artifacts import model as artifacts
from tunery.artifacts.model import Artifact
from tunery.datasets.model import File
from tunery.errors import WrongState
from tunery.jobs import ledger
from tunery.jobs.errors import NoReproduction
from tunery.jobs.model import Job, Metric
from tunery.jobs.states import FINAL, State
from tunery.models.model import Model
from tunery.spec import Plan
from tunery.storage import Storage

TOLERANCE = 0.005
"""Tolerated relative difference of a loss. Other hardware rounds sums in another order, which training amplifies."""
_RECORD = "training_config.json"
_LOSSES = ("train_loss", "full_valid_loss")
_SAME_AS_RATE = "learning_rate_multiplier"
"""Not compared, as the plan's learning rate includes it."""
_BY_ITS_BYTES = {"evaluation": {"test_file"}}
_TINY = 1e-12


@dataclass(frozen=True)
class Pair:
    """A value of both jobs. `equal` is None if one of them is unknown."""

    name: str
    original: Any
    rerun: Any
    equal: bool | None


@dataclass(frozen=True)
class Curve:
    """The losses of one name by step. `max_relative_difference` is None if no step has both."""

    name: str
    steps: tuple[int, int]
    compared: int
    max_relative_difference: float | None
    at_step: int | None


@dataclass(frozen=True)
class Reproduction:
    """The comparison. `status` is pending until both have succeeded; `bitwise` says that all weights are equal."""

    job: str
    rerun_of: str
    tolerance: float
    status: Literal["pending", "reproduced", "differs"] = "pending"
    bitwise: bool | None = None
    inputs: list[Pair] = field(default_factory=list)
    environment: list[Pair] = field(default_factory=list)
    losses: list[Curve] = field(default_factory=list)
    weights: list[Pair] = field(default_factory=list)
    scores: list[Pair] = field(default_factory=list)


def compare(
    session: Session, storage: Storage, project_id: str, job_id: str, *, tolerance: float = TOLERANCE
) -> Reproduction:
    """Compares a rerun with its original. Raises NotFound, NoReproduction, WrongState where one of them ended without
    a model, ObjectMissing."""
    job = ledger.find(session, project_id, job_id)
    if job.rerun_of is None:
        raise NoReproduction(id=job.id)
    original = ledger.find(session, project_id, job.rerun_of)
    for each in (original, job):
        if each.state in FINAL - {State.SUCCEEDED}:
            instead = "Only succeeded jobs can be."
            raise WrongState(kind="Fine-tuning job", id=each.id, state=each.state, action="compared", instead=instead)
    if {original.state, job.state} != {State.SUCCEEDED}:
        return Reproduction(job.id, original.id, tolerance)
    return _compared(session, storage, original, job, tolerance)


def _compared(session: Session, storage: Storage, original: Job, job: Job, tolerance: float) -> Reproduction:
    files = [_files(session, each) for each in (original, job)]
    records = [_record(storage, listed) for listed in files]
    inputs = _pairs(*(_inputs(session, each) for each in (original, job))) + _known_pairs(*map(_rows, records))
    weights = _pairs(*map(_weights, files)) if all(files) else []
    losses = [_curve(name, _losses(session, original, name), _losses(session, job, name)) for name in _LOSSES]
    bitwise = all(pair.equal for pair in weights) if weights else None
    is_same_run = not any(pair.equal is False for pair in inputs)
    is_close = any(curve.compared for curve in losses) and all(_is_close(curve, tolerance) for curve in losses)
    return Reproduction(
        job=job.id,
        rerun_of=original.id,
        tolerance=tolerance,
        status="reproduced" if is_same_run and (bitwise or is_close) else "differs",
        bitwise=bitwise,
        inputs=inputs,
        environment=_known_pairs(*map(_environment, records)),
        losses=[curve for curve in losses if any(curve.steps)],
        weights=weights,
        scores=_pairs(*(_scores(each.scorecard) for each in (original, job))),
    )


def _files(session: Session, job: Job) -> list[Artifact]:
    return list(artifacts.list_for(session, job.tuned_model)) if job.tuned_model else []


def _record(storage: Storage, files: Iterable[Artifact]) -> dict[str, Any]:
    """Returns the trainer's record of a run; empty if its model's files are gone."""
    file = next((file for file in files if file.path == _RECORD), None)
    return {} if file is None else dict(json.loads(b"".join(storage.read(file.key))))


def _inputs(session: Session, job: Job) -> dict[str, Any]:
    """Returns what must be equal for the jobs to be the same run."""
    named = {"training_file": job.training_file, "validation_file": job.validation_file, "test_file": job.test_file}
    named["replay_file"] = job.replay_file
    data = {name: session.get_one(File, id).sha256 for name, id in named.items() if id is not None}
    models = {"base": job.base_model, "parent": job.parent_model}
    weights = {name: session.get_one(Model, id).manifest_sha256 for name, id in models.items() if id is not None}
    plan = Plan.model_validate(job.plan).model_dump(mode="json", exclude={_SAME_AS_RATE: True, **_BY_ITS_BYTES})
    return {"seed": plan.pop("seed")} | data | weights | plan


def _rows(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the record of the encoded files."""
    template = {"chat_template": record["chat_template_sha256"]} if "chat_template_sha256" in record else {}
    return template | {f"{role} rows": sha256 for role, sha256 in record.get("rows_sha256", {}).items()}


def _environment(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what may differ, and is the likely cause if the results do."""
    parts = {name: record.get(name) or {} for name in ("versions", "hardware", "precision", "memory")}
    return {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}


def _weights(files: Iterable[Artifact]) -> dict[str, str]:
    """Returns the sha256 of the model's own weights. Exports, in folders, follow from them."""
    return {file.path: file.sha256 for file in files if file.path.endswith(".safetensors") and "/" not in file.path}


def _scores(card: Mapping[str, Any] | None) -> dict[str, float]:
    """Returns the tuned model's figures on the test rows and on general questions."""
    if card is None:
        return {}
    found = {"exact": card["tuned_exact"]} | {name: each["tuned"] for name, each in card.get("metrics", {}).items()}
    general = card.get("general")
    return found | ({} if general is None else {"general": general["tuned_accuracy"]})


def _pairs(original: Mapping[str, Any], rerun: Mapping[str, Any]) -> list[Pair]:
    named = {name: (original.get(name), rerun.get(name)) for name in {**original, **rerun}}
    return [Pair(name, *both, equal=both[0] == both[1]) for name, both in named.items()]


def _known_pairs(original: Mapping[str, Any], rerun: Mapping[str, Any]) -> list[Pair]:
    """Returns the pairs without values that an earlier release did not record or that are gone with a model."""
    known = original.keys() & rerun.keys()
    return [pair if pair.name in known else replace(pair, equal=None) for pair in _pairs(original, rerun)]


def _losses(session: Session, job: Job, name: str) -> dict[int, float]:
    found = session.execute(select(Metric.step, Metric.values[name].as_float()).where(Metric.job_id == job.id))
    return {step: value for step, value in found if value is not None}


def _curve(name: str, original: Mapping[int, float], rerun: Mapping[int, float]) -> Curve:
    shared = {step: _relative(original[step], rerun[step]) for step in sorted(original.keys() & rerun.keys())}
    worst = max(shared, key=lambda step: shared[step], default=None)
    most = None if worst is None else shared[worst]
    return Curve(name, (len(original), len(rerun)), len(shared), most, worst)


def _relative(one: float, other: float) -> float:
    return abs(one - other) / max(abs(one), abs(other), _TINY)


def _is_close(curve: Curve, tolerance: float) -> bool:
    """Whether both runs have the same steps, with all losses within the tolerance."""
    if len({*curve.steps, curve.compared}) > 1:
        return False
    return curve.max_relative_difference is None or curve.max_relative_difference <= tolerance
