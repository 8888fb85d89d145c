"""Finds and registers models by their ids, aliases and sources."""

import difflib
import re
from collections.abc import Iterable
from typing import Any

import sqlalchemy as sql
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from tunery import dispatch, ids
from tunery.errors import InvalidValue, WrongState
from tunery.models.errors import ModelNotFound, ModelWithheld
from tunery.models.model import Alias, Model

SLUG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
"""A base's id: it is part of URLs and of `ft:` names with colons, so it has neither `/` nor `:`."""


def check_slug(name: str, param: str) -> str:
    """Returns the name itself. Raises InvalidValue."""
    if not SLUG.fullmatch(name) or ".." in name:
        raise InvalidValue(
            param=param,
            reason=f"'{name}' cannot be a model id: use up to 96 letters, digits, '.', '_', '-'.",
        )
    return name


def slug_of(source: str) -> str:
    """Returns a base's id made from its source: `meta-llama/Llama-3.1-8B` -> `Llama-3.1-8B`."""
    last = source.rstrip("/").rpartition("/")[2].removesuffix(".gguf")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-._") or "model"


def find(session: Session, project_id: str, name: str, *, with_withheld: bool = False, param: str = "model") -> Model:
    """Returns a model that the project may see, in any status: its own, or a base by id, alias or source.

    Raises ModelNotFound, for another project's model too, and ModelWithheld.
    """
    visible = Model.deleted_at.is_(None) & (Model.project_id.is_(None) | (Model.project_id == project_id))
    model = session.scalar(select(Model).where(Model.id == name, visible))
    model = model or session.scalar(
        select(Model).join(Alias, Alias.model_id == Model.id).where(Alias.alias == name, visible)
    )
    model = model or session.scalar(
        select(Model)
        .where(Model.source == name, Model.kind == "base", visible)
        .order_by((Model.status == "ready").desc(), Model.created_at)
        .limit(1)
    )
    if model is None:
        raise ModelNotFound(param=param, id=name, suggestion=_suggestion(session, visible, name))
    if model.withheld and not with_withheld:
        raise ModelWithheld(param=param, id=name, job=model.job_id)
    return model


def _suggestion(session: Session, visible: sql.ColumnElement[bool], name: str) -> str:
    """Returns a sentence that suggests the visible base or alias with the most similar name, or ""."""
    bases = session.scalars(select(Model.id).where(Model.kind == "base", visible))
    aliases = session.scalars(select(Alias.alias).join(Model, Alias.model_id == Model.id).where(visible))
    by_lower = {known.lower(): known for known in (*bases, *aliases)}
    close = difflib.get_close_matches(name[:200].lower(), by_lower, n=1, cutoff=0.75)
    return f" Did you mean '{by_lower[close[0]]}'?" if close else ""


def find_ready(session: Session, project_id: str, name: str, *, param: str = "model") -> Model:
    """Returns a model that can be used now. Raises ModelNotFound, WrongState."""
    model = find(session, project_id, name, param=param)
    if model.status != "ready":
        raise WrongState(
            param=param,
            kind="Model",
            id=name,
            state="still being prepared" if model.status == "processing" else f"unusable ({model.status_details})",
            action="used",
            instead=f"`GET /v1/models/{name}` shows its status.",
        )
    return model


def list_visible(session: Session, project_id: str, *, only_ready: bool = True) -> list[Model]:
    """Returns every model of the project and every base, newest first."""
    query = (
        select(Model)
        .where(Model.deleted_at.is_(None), ~Model.withheld)
        .where(Model.project_id.is_(None) | (Model.project_id == project_id))
        .order_by(Model.created_at.desc(), Model.id)
    )
    return list(session.scalars(query.where(Model.status == "ready") if only_ready else query))


def aliases(session: Session, model_ids: Iterable[str]) -> dict[str, list[str]]:
    """Returns the aliases of each model, sorted. Models without one are left out."""
    found: dict[str, list[str]] = {}
    for alias in session.scalars(select(Alias).where(Alias.model_id.in_(model_ids)).order_by(Alias.alias)):
        found.setdefault(alias.model_id, []).append(alias.alias)
    return found


def alias_of(session: Session, model: Model, name: str) -> str | None:
    """Returns the name if it is an alias of the model; None for its id and for a base's source."""
    return session.scalar(select(Alias.alias).where(Alias.alias == name, Alias.model_id == model.id))


def register_base(session: Session, *, name: str, source: str, chat_template: str | None = None) -> Model:
    """Registers a base, which a worker then converts and stores. Raises InvalidValue when the name is taken.

    `chat_template`: Jinja text that replaces the source's own.

    A base that never became ready may be registered again under its name, once it has failed or been deleted.
    """
    check_slug(name, "id")
    _take_turns(session, name)
    taken = session.get(Model, name)
    if session.get(Alias, name) or (taken and taken.status != "error" and taken.deleted_at is None):
        raise InvalidValue(param="id", reason=f"A model named '{name}' already exists. Choose another id.")
    if taken and taken.manifest_sha256 is not None:
        # Jobs and tuned models refer to their base by its id, so the id must never get other weights.
        reason = f"'{name}' was the id of a deleted base and is not reused. Choose another id."
        raise InvalidValue(param="id", reason=reason)
    model = taken or Model(id=name, kind="base", prefix="")
    model.source, model.chat_template = source, chat_template
    model.status, model.status_details, model.deleted_at = "processing", None, None
    model.prefix = f"models/{ids.token(16)}"
    session.add(model)
    session.flush()
    dispatch.nudge_after_commit(session, dispatch.IO)
    return model


def _take_turns(session: Session, name: str) -> None:
    """Serialises registrations of a name: two tables share the names, so no unique key prevents duplicates."""
    session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(f"model {name}", 0))))


def set_ready(
    session: Session, model: Model, *, manifest: dict[str, Any], sha256: str, model_info: dict[str, Any]
) -> None:
    """Marks a base as ready: its files are stored and listed."""
    model.manifest, model.manifest_sha256, model.model_info = manifest, sha256, model_info
    model.status, model.status_details = "ready", None
    session.flush()


def set_error(session: Session, model: Model, reason: str) -> None:
    model.status, model.status_details = "error", reason
    session.flush()


def add_alias(session: Session, alias: str, model: Model) -> Alias:
    """Points an alias at a base, also if it exists already. Raises InvalidValue."""
    check_slug(alias, "alias")
    _take_turns(session, alias)
    if session.get(Model, alias):
        raise InvalidValue(param="alias", reason=f"'{alias}' is the id of a model. Choose another alias.")
    if model.kind != "base":
        raise InvalidValue(
            param="model", reason=f"'{model.id}' is not a base model, and only bases have aliases. Name a base."
        )
    row = session.get(Alias, alias) or Alias(alias=alias)
    row.model_id = model.id
    session.add(row)
    session.flush()
    return row


def add_tuned(
    session: Session,
    *,
    name: str,
    project_id: str,
    kind: str,
    base: Model,
    job_id: str,
    technique: str,
    prefix: str,
    manifest: dict[str, Any],
    sha256: str,
    withheld: bool = False,
) -> Model:
    """Adds the row of a job's result (`tuned`) or of one of its epochs (`checkpoint`); its objects are stored."""
    model = Model(
        id=name,
        project_id=project_id,
        kind=kind,
        base_id=base.id,
        job_id=job_id,
        technique=technique,
        status="ready",
        prefix=prefix,
        manifest=manifest,
        manifest_sha256=sha256,
        model_info=base.model_info,
        withheld=withheld,
    )
    session.add(model)
    session.flush()
    return model


def tuned_name(*, base: str, organization: str, suffix: str | None, step: int | None = None) -> str:
    """Returns `ft:{base}:{organization}:{suffix}:{8 characters}`, with `:ckpt-step-{n}` for a checkpoint.

    Characters of the suffix that are not allowed in a name or a URL become hyphens.
    """
    suffix = re.sub(r"[^A-Za-z0-9._-]+", "-", suffix or "").strip("-")
    name = f"ft:{base}:{organization}:{suffix}:{ids.token(8)}"
    return name if step is None else f"{name}:ckpt-step-{step}"


def publish(session: Session, job_id: str) -> None:
    """Makes the model of a job and its checkpoints usable."""
    session.execute(sql.update(Model).where(Model.job_id == job_id, Model.withheld).values(withheld=False))


def delete(session: Session, model: Model) -> None:
    """Hides the model and removes its aliases; its job stays. Its objects are removed once nothing needs them.

    Jobs and models that are based on it keep working.
    """
    model.deleted_at = func.now()
    session.execute(sql.delete(Alias).where(Alias.model_id == model.id))
    session.flush()


def remove_alias(session: Session, model: Model, alias: str) -> None:
    """Removes an alias of a base. Raises InvalidValue for its hub id, which is not an alias."""
    row = session.get(Alias, alias)
    if row is None:
        reason = f"'{alias}' is the source of the base '{model.id}'. To delete that base, use its id '{model.id}'."
        raise InvalidValue(param="model", reason=reason)
    session.delete(row)
    session.flush()
