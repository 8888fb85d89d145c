"""Reruns a job with everything that was decided for it, except for requested changes."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from sqlalchemy.orm import Session

from tunery import field_errors
from tunery.datasets.model import File
from tunery.jobs import creation, ledger
from tunery.jobs.errors import InputChanged, InputGone
from tunery.jobs.model import Job
from tunery.jobs.request import JobRequest
from tunery.keys.auth import Caller
from tunery.models import registry
from tunery.models.model import Model
from tunery.planning.servable import Limits
from tunery.spec import Hyperparameters, TrainingOptions

Body = dict[str, Any]

_COPIED = ("training_file", "validation_file", "suffix", "priority")


def rerun(
    session: Session,
    caller: Caller,
    job_id: str,
    changes: Body,
    *,
    idempotency_key: str | None = None,
    is_retry: bool = False,
    limits: Limits | None = None,
) -> Job:
    """Creates a job like an earlier one, with `changes` as fields of a create request; objects are merged with the
    original's, field by field.

    Raises NotFound, InputGone, InputChanged, and what `creation.create` raises.
    """
    original = ledger.find(session, caller.project_id, job_id)
    body = _changed(original, _body(session, original), changes)
    _check_inputs(session, original, body)
    try:
        request = JobRequest.model_validate(body)
    except ValidationError as error:
        faults = [{**fault, "loc": ("body", *fault["loc"])} for fault in error.errors(include_url=False)]
        raise field_errors.explain(faults, body, JobRequest) from None
    return creation.create(
        session, caller, request, rerun_of=original, idempotency_key=idempotency_key, is_retry=is_retry, limits=limits
    )


def _body(session: Session, job: Job) -> Body:
    """Returns a request that leads to the job's plan again, whatever today's defaults; for a job without a plan, its
    own request."""
    decided = job.plan or job.spec
    body = {name: decided[name] for name in TrainingOptions.model_fields if decided.get(name) is not None}
    body |= {name: value for name in _COPIED if (value := getattr(job, name)) is not None}
    own = dict(decided.get("method") or {"type": "supervised"})
    kind = own.pop("type")
    body["method"] = {"type": kind, kind: {"hyperparameters": _hyperparameters(job) | own}}
    body |= {"model": _model(session, job), "seed": decided["seed"]}
    if job.user_metadata is not None:
        body["metadata"] = job.user_metadata
    if job.integrations:
        body["integrations"] = [_asked(integration) for integration in job.integrations]
    if job.test_file is not None:
        body["allow_test_on_training_file"] = _sha256(session, job.test_file) == _sha256(session, job.training_file)
    return body


def _hyperparameters(job: Job) -> Body:
    """Returns the job's hyperparameters; a plan's without the multiplier, which its learning rate includes."""
    if job.plan is None:
        return dict(job.spec["hyperparameters"])
    return {name: job.plan[name] for name in Hyperparameters.model_fields if name != "learning_rate_multiplier"}


def _model(session: Session, job: Job) -> str:
    """Returns the model as the request named it; its id if the alias names another base now."""
    if job.parent_model or job.base_alias is None:
        return job.model_name
    base = session.get_one(Model, job.base_model)
    return registry.alias_of(session, base, job.base_alias) or job.base_model


def _asked(integration: Mapping[str, Any]) -> Body:
    """Returns an integration without the id of the old job's run."""
    kind = integration["type"]
    return {"type": kind, kind: {name: value for name, value in integration[kind].items() if name != "run_id"}}


def _sha256(session: Session, file_id: str) -> str:
    return session.get_one(File, file_id).sha256


def _changed(job: Job, body: Body, changes: Body) -> Body:
    changes = _in_the_method(body["method"]["type"], changes)
    whole = _merged(body, changes)
    knobs = (changes.get("method") or {}).get(whole["method"]["type"], {}).get("hyperparameters", {})
    if "learning_rate" in changes:
        return whole
    if "learning_rate_multiplier" in knobs:
        whole.pop("learning_rate", None)
    elif _decides_another_rate(body, whole):
        _ask_rate_again(job, whole)
    return whole


def _decides_another_rate(body: Body, whole: Body) -> bool:
    """Whether model, technique or method changed, from which the default learning rate follows."""
    changed = {name for name in ("model", "technique") if whole.get(name) != body.get(name)}
    return bool(changed) or whole["method"]["type"] != body["method"]["type"]


def _in_the_method(kind: str, changes: Body) -> Body:
    """Returns the changes with top-level hyperparameters, as old clients send them, moved into the method."""
    if "hyperparameters" not in changes:
        return changes
    changes = dict(changes)
    kind = changes.get("method", {}).get("type", kind)
    moved = {"type": kind, kind: {"hyperparameters": changes.pop("hyperparameters")}}
    return _merged({"method": moved}, changes)


def _ask_rate_again(job: Job, body: Body) -> None:
    """Replaces the decided learning rate by what the job's request asked for."""
    asked, kind = job.spec["hyperparameters"]["learning_rate_multiplier"], body["method"]["type"]
    body.pop("learning_rate", None)
    if job.spec.get("learning_rate") is not None:
        body["learning_rate"] = job.spec["learning_rate"]
    elif asked != "auto":
        own = body["method"].setdefault(kind, {}).setdefault("hyperparameters", {})
        own["learning_rate_multiplier"] = asked


def _merged(old: Body, new: Body) -> Body:
    """Merges `new` over `old`, field by field; an object of another `type` replaces the old one."""
    whole = dict(old)
    for name, value in new.items():
        here = old.get(name)
        are_objects = isinstance(here, dict) and isinstance(value, dict) and name != "metadata"
        whole[name] = _merged_objects(here, value) if are_objects else value
    return whole


def _merged_objects(old: Any, new: Any) -> Body:
    is_same = new.get("type", old.get("type")) == old.get("type")
    return _merged(old, new) if is_same else dict(new)


def _check_inputs(session: Session, job: Job, body: Body) -> None:
    """Raises InputGone, InputChanged for an input of the job that the rerun reads too and that has changed."""
    named = {"training_file": job.training_file, "validation_file": job.validation_file}
    named |= {"evaluation.test_file": job.test_file, "replay.source": job.replay_file}
    again = {**body, "evaluation.test_file": (body.get("evaluation") or {}).get("test_file")}
    again["replay.source"] = (body.get("replay") or {}).get("source")
    for param, name in named.items():
        if name is not None and again.get(param) == name:
            file = session.get_one(File, name)
            found = None if file.deleted_at is not None else file.sha256
            _check_input(job, param, "file", name, found)
    if body["model"] in (job.model_name, job.base_model):
        _check_model(session, job)


def _check_model(session: Session, job: Job) -> None:
    """Checks the base and the parent model. Raises InputGone, InputChanged."""
    for kind, name in (("base", job.base_model), ("parent", job.parent_model)):
        if name is not None:
            model = session.get_one(Model, name)
            found = None if model.deleted_at is not None else model.manifest_sha256
            _check_input(job, "model", "model", name, found, place=kind)


def _check_input(job: Job, param: str, kind: str, name: str, found: str | None, place: str | None = None) -> None:
    if found is None:
        raise InputGone(param=param, kind=kind, id=name, job=job.id, field=param)
    then = (job.inputs or {}).get(place or param, found)
    if then != found:
        raise InputChanged(param=param, kind=kind, id=name, job=job.id, field=param, then=then, now=found)
