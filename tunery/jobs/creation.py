"""From a create request to a stored job: names resolved, contradictions refused, the spec written down."""

import hashlib
import json
import secrets
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from tunery import ids
from tunery.datasets import files
from tunery.datasets.model import File
from tunery.errors import InvalidValue, NotFound, Unsupported
from tunery.failures import DoesNotFit
from tunery.jobs import leases, ledger, method, placing
from tunery.jobs.errors import ExceedsInventory
from tunery.jobs.model import Job
from tunery.jobs.request import JobRequest
from tunery.keys.auth import Caller
from tunery.models import imports, registry
from tunery.models.model import Model
from tunery.planning import advice, expected, servable
from tunery.planning.servable import Limits
from tunery.spec import (
    Full,
    Hyperparameters,
    MethodOptions,
    Plan,
    Qlora,
    Technique,
    TrainingOptions,
    TrainingSpec,
    check_one_rate,
)

TEST_IS_TRAINING = (
    "The test file {file} equals the training file: the scorecard would measure memorisation, not learning. Use rows "
    "that are not trained on, or set 'allow_test_on_training_file' to true."
)
_ADAPTER = ("r", "alpha", "target_modules", "use_rslora", "use_dora", "modules_to_save", "trainable_token_indices")
_FOUR_BITS = ("quant_type", "double_quant")


def create(
    session: Session,
    caller: Caller,
    request: JobRequest,
    *,
    rerun_of: Job | None = None,
    idempotency_key: str | None = None,
    is_retry: bool = False,
    limits: Limits | None = None,
) -> Job:
    """Creates the job of a request, or returns the one that the same request created before.

    The job of a dry run is in no session: see `dry_run.judge`. `limits`: those of the servers that must be able to
    serve its adapter. Raises Rejected, NotFound, QuotaExceeded.
    """
    digest = _digest(request, rerun_of)
    if not request.dry_run:
        earlier = ledger.earlier_request(
            session, caller.project_id, idempotency_key=idempotency_key, request_sha256=digest, is_retry=is_retry
        )
        if earlier is not None:
            return earlier
    job = _checked(session, caller, request, rerun_of, limits)
    if request.dry_run:
        return job
    _check_inventory(session, job, request.model)
    job.idempotency_key, job.request_sha256 = idempotency_key, digest
    return ledger.submit(session, job, messages=_remarks(rerun_of))


def _checked(session: Session, caller: Caller, request: JobRequest, rerun_of: Job | None, limits: Limits | None) -> Job:
    """Checks the request and returns its job, not yet stored. Raises Rejected, NotFound."""
    chosen, hyperparameters = check_fields(request)
    model = registry.find_ready(session, caller.project_id, request.model)
    advice.check_modules(request.technique, model.model_info)
    spec = _spec(session, request, model, method=chosen, hyperparameters=hyperparameters)
    advice.check_rate(spec, model.model_info, param=method.place(request, "learning_rate_multiplier"))
    advice.check_technique(spec.technique, model.model_info)
    servable.check(spec.technique, model.model_info, limits)
    files = {param: _check_file(session, caller.project_id, param, name) for param, name in _files(request).items()}
    _check_held_out(session, request)
    job = _job(request, caller, model, spec)
    job.base_alias = _base_alias(session, request, model)
    job.inputs = {param: file.sha256 for param, file in files.items()} | _weights(session, job)
    if rerun_of is not None:
        job.rerun_of, job.template_time = rerun_of.id, rerun_of.now
    return job


def _check_inventory(session: Session, job: Job, model: str) -> None:
    """Raises ExceedsInventory where no device here has the minimum memory of the run, even with the shortest rows."""
    model_info, spec = session.get_one(Model, job.base_model).model_info, TrainingSpec.model_validate(job.spec)
    try:
        placing.make_plan(spec, model_info, leases.devices(session), examples=1, longest_answer=None, model=model)
    except DoesNotFit as error:
        raise ExceedsInventory(param=error.param, reason=error.message) from error


def _digest(request: JobRequest, rerun_of: Job | None) -> str:
    """Returns a hash that is equal for equivalent requests: key order, whitespace and explicit nulls do not matter."""
    said = request.model_dump(mode="json", exclude_unset=True)
    if rerun_of is not None:
        said["rerun_of"] = rerun_of.id
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def check_fields(request: JobRequest) -> tuple[MethodOptions, Hyperparameters]:
    """Returns the request's method. Raises Unsupported, InvalidValue for fields that contradict each other."""
    chosen, hyperparameters = method.read(request)
    check_one_rate(request.learning_rate, hyperparameters)
    _check_export(request)
    _check_gate(request)
    _check_unquantised(request)
    _check_sharding(request)
    if request.optimizer == "paged_adamw_8bit" and isinstance(request.technique, Full):
        _check_paged(request.technique)
    asked = {"early_stopping": request.early_stopping is not None, "select": request.select == "best"}
    for param in (param for param, is_asked in asked.items() if is_asked and request.validation_file is None):
        raise InvalidValue(param=param, reason=f"'{param}' needs a validation loss. Send a validation_file too.")
    _check_task_rows(request)
    _check_replay(request, chosen)
    return chosen, hyperparameters


def _check_export(request: JobRequest) -> None:
    """Raises InvalidValue where a full fine-tune requests an export that only adapters have."""
    if isinstance(request.technique, Full):
        for name in (name for name in ("merged", "adapter_gguf") if getattr(request.export, name)):
            reason = f"A full fine-tune has no adapter. Leave export.{name} out, or choose lora or qlora."
            raise InvalidValue(param=f"export.{name}", reason=reason)


def _check_unquantised(request: JobRequest) -> None:
    """Raises InvalidValue where `unquantised` is set without a test file, or the base is not quantised."""
    if not request.evaluation.unquantised:
        return
    reason = None
    if request.evaluation.test_file is None:
        reason = "it is part of the scorecard, which needs a test file. Send evaluation.test_file too."
    elif request.technique is not None and not isinstance(request.technique, Qlora):
        kind = request.technique.type
        reason = (
            f"the base of {kind} is not quantised, so there is nothing else to score. Leave it out, or choose qlora."
        )
    if reason is not None:
        raise InvalidValue(param="evaluation.unquantised", reason=reason)


def _check_gate(request: JobRequest) -> None:
    """Raises InvalidValue for a gate whose figures will not be measured."""
    gate, general = request.gate, request.evaluation.general
    if gate is None:
        return
    if request.evaluation.test_file is None:
        reason = "a gate is checked against the scorecard, which needs a test file. Send evaluation.test_file too."
        raise InvalidValue(param="gate", reason=reason)
    if gate.max_general_drop is not None and not general.enabled:
        reason = "it needs the general benchmark. Leave evaluation.general.enabled true, or leave this limit out."
        raise InvalidValue(param="gate.max_general_drop", reason=reason)
    if gate.max_kl is not None and not (general.enabled and general.prompts):
        reason = "it needs general prompts. Leave evaluation.general at its defaults, or leave this limit out."
        raise InvalidValue(param="gate.max_kl", reason=reason)


def _check_task_rows(request: JobRequest) -> None:
    """Raises InvalidValue for `task_rows` without a validation file, or early stopping by the task without them."""
    param = "evaluation.task_rows"
    if request.evaluation.task_rows and request.validation_file is None:
        raise InvalidValue(param=param, reason=f"'{param}' are rows of a validation file. Send a validation_file too.")
    stopping = request.early_stopping
    if stopping is not None and stopping.metric == "task" and not request.evaluation.task_rows:
        reason = "'early_stopping.metric' 'task' needs the task's score. Send evaluation.task_rows too, such as 64."
        raise InvalidValue(param="early_stopping.metric", reason=reason)


def _check_replay(request: JobRequest, chosen: MethodOptions) -> None:
    """Raises InvalidValue for replay, whose rows are chats, with a method that does not learn from chats."""
    if request.replay is not None and chosen.type != "supervised":
        reason = f"replay adds chat rows, but method '{chosen.type}' learns from other rows. Leave replay out."
        raise InvalidValue(param="replay", reason=reason)


def _check_sharding(request: JobRequest) -> None:
    """Raises InvalidValue for a model that is to be sharded and cannot be."""
    resources, technique = request.resources, request.technique
    if resources.sharding == "full_shard" and technique is not None and not expected.can_shard(technique):
        reason = "a four-bit model with DoRA cannot be sharded. Use 'replicate' or 'auto', or set use_dora to false."
        raise InvalidValue(param="resources.sharding", reason=reason)


def _check_paged(technique: Full) -> None:
    """Raises InvalidValue for bf16 weights: their optimizer has its own 8-bit moments and cannot page them."""
    if technique.weights_dtype == "bfloat16":
        reason = "A full fine-tune in bfloat16 cannot page its moments, which already have 8 bits. Use 'adamw'."
        raise InvalidValue(param="optimizer", reason=reason)


def _files(request: JobRequest) -> dict[str, str]:
    named = {
        "training_file": request.training_file,
        "validation_file": request.validation_file,
        "evaluation.test_file": request.evaluation.test_file,
        "replay.source": None if request.replay is None or request.replay.source == "self" else request.replay.source,
    }
    return {param: name for param, name in named.items() if name is not None}


def _check_file(session: Session, project_id: str, param: str, name: str) -> File:
    file = files.find(session, project_id, name, param=param)
    # Locked against a delete that has already seen that no job uses the file.
    session.refresh(file, with_for_update={"read": True})
    if file.deleted_at is not None:
        raise NotFound(param=param, kind="file", id=name)
    files.check_trainable(file, param=param)
    return file


def _check_held_out(session: Session, request: JobRequest) -> None:
    """Raises InvalidValue for a test file with the same bytes as the training file.

    Single shared rows cause only a warning. Here an error is safe: such a scorecard is useless, and OpenAI's clients
    are not affected, as their API has no test file.
    """
    test_file = request.evaluation.test_file
    if test_file is None or request.allow_test_on_training_file:
        return
    named = (request.training_file, test_file)
    if len(set(session.scalars(select(File.sha256).where(File.id.in_(named))))) == 1:
        raise InvalidValue(param="evaluation.test_file", reason=TEST_IS_TRAINING.format(file=test_file))


def _spec(session: Session, request: JobRequest, model: Model, **decided: Any) -> TrainingSpec:
    options = {name: getattr(request, name) for name in TrainingOptions.model_fields}
    if model.kind != "base":
        options["technique"] = _continued(session, request, model)
    seed = secrets.randbelow(2**31) if request.seed is None else request.seed
    return TrainingSpec(**options, seed=seed, **decided)


def _continued(session: Session, request: JobRequest, parent: Model) -> Technique:
    """Returns the technique for training on from `parent`: the parent's own, whose shape a request cannot change.

    Raises Unsupported, InvalidValue.
    """
    own, asked = _technique_of(session, parent), request.technique
    if asked is None:
        return own
    if isinstance(own, Full) or isinstance(asked, Full):
        return _of_all_weights(parent, own, asked)
    # A 4-bit base differs from the bf16 base that the adapter was trained on: training would start with that error.
    if isinstance(asked, Qlora) and not isinstance(own, Qlora):
        what = f"Continuing from a LoRA adapter with technique '{asked.type}'"
        raise Unsupported(param="technique.type", what=what, instead="Use 'lora', or leave technique out.")
    for name in (*_ADAPTER, *(_FOUR_BITS if isinstance(asked, Qlora) else ())):
        if getattr(asked, name) != getattr(own, name):
            reason = f"'{parent.id}' has {name} {getattr(own, name)!r}. Use that value, or leave technique out."
            raise InvalidValue(param=f"technique.{name}", reason=reason)
    return asked


def _technique_of(session: Session, parent: Model) -> Technique:
    """Returns the technique of an imported adapter, or of the job that made the model. Raises Unsupported."""
    if (imported := imports.technique_of(parent)) is not None:
        return imported
    made_by = session.get(Job, parent.job_id) if parent.job_id else None
    if made_by is None or made_by.plan is None:
        what = f"Continuing from '{parent.id}', which no job of this server trained,"
        raise Unsupported(param="model", what=what, instead=f"Start from its base, '{parent.base_id}'.")
    return Plan.model_validate(made_by.plan).technique


def _of_all_weights(parent: Model, own: Technique, asked: Technique) -> Technique:
    """Returns the requested technique if the parent is a full fine-tune: all its weights, or a new adapter on them.

    Raises Unsupported for a full fine-tune of an adapter: the base's weights alone are not the parent model.
    """
    if isinstance(own, Full):
        return asked
    what = f"Continuing from '{parent.id}', which technique '{own.type}' made, with technique '{asked.type}'"
    raise Unsupported(param="technique.type", what=what, instead=f"Use '{own.type}', or leave technique out.")


def _job(request: JobRequest, caller: Caller, model: Model, spec: TrainingSpec) -> Job:
    job = Job(
        id=ids.new(ids.JOB),
        project_id=caller.project_id,
        key_id=caller.key_id,
        base_model=_base_of(model, spec.technique),
        parent_model=None if model.base_id is None else model.id,
        training_file=request.training_file,
        validation_file=request.validation_file,
        test_file=request.evaluation.test_file,
        spec=spec.model_dump(mode="json"),
        suffix=request.suffix,
        gpus=spec.resources.gpus,
        priority=request.priority,
    )
    job.integrations = [_echo(integration.model_dump(), job.id) for integration in request.integrations or ()]
    if request.metadata is not None:
        job.user_metadata = dict(request.metadata)
    return job


def _base_of(model: Model, technique: Technique | None) -> str:
    """Returns the id of the model whose weights the job starts from; adapters on a full fine-tune have it as base."""
    is_adapted_whole = model.technique == "full" and not isinstance(technique, Full)
    return model.id if model.base_id is None or is_adapted_whole else model.base_id


def _weights(session: Session, job: Job) -> dict[str, str | None]:
    """Returns the sha256 of the manifests of the base and of the parent model."""
    named = {"base": job.base_model, "parent": job.parent_model}
    return {part: session.get_one(Model, id).manifest_sha256 for part, id in named.items() if id is not None}


def _base_alias(session: Session, request: JobRequest, model: Model) -> str | None:
    """Returns the alias by which the base was named, also for models tuned from tuned models.

    Clients read the provider from the base's part of a tuned model's name, so it must stay the same.
    """
    if model.kind == "base":
        return registry.alias_of(session, model, request.model)
    made_by = session.get(Job, model.job_id) if model.job_id else None
    return made_by.base_name if made_by else None


def _echo(integration: dict[str, Any], job_id: str) -> dict[str, Any]:
    """Returns an integration with the run's id in its tracker."""
    kind = integration["type"]
    return {"type": kind, kind: {**integration[kind], "run_id": job_id}}


def _remarks(rerun_of: Job | None) -> list[tuple[str, str]]:
    return [] if rerun_of is None else [("info", f"This job is a rerun of {rerun_of.id}")]
