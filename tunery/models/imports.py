"""Imports adapters that were trained elsewhere: sent as an archive, checked against their base by an I/O worker."""

from typing import Any, Literal

from sqlalchemy import select
from sqlalchemy.orm import Session

from tunery import dispatch, ids
from tunery.errors import Unsupported
from tunery.models import registry
from tunery.models.model import Model
from tunery.spec import Lora, Qlora

TECHNIQUE = "imported_technique"
"""The entry of `model_info` with the technique of an adapter that no job made."""


def new_prefix() -> str:
    """Returns a new storage prefix for an adapter's files."""
    return f"models/{ids.token(16)}"


def archive_key(prefix: str) -> str:
    """Returns the key of an adapter's archive: below its prefix, so that it is removed with the model."""
    return f"{prefix}/import/adapter.zip"


def add(
    session: Session,
    *,
    project_id: str,
    base: Model,
    name: str,
    prefix: str,
    source: str,
    technique: Literal["lora", "qlora"],
) -> Model:
    """Adds the row of an adapter whose archive is stored. Raises Unsupported if `base` is not a base."""
    if base.kind != "base":
        raise Unsupported(param="base", what=f"An adapter on '{base.id}'", instead=f"Name its base, '{base.base_id}'.")
    model = Model(
        id=name,
        project_id=project_id,
        kind="tuned",
        base_id=base.id,
        technique=technique,
        status="processing",
        source=source,
        prefix=prefix,
        model_info=base.model_info,
    )
    session.add(model)
    session.flush()
    dispatch.nudge_after_commit(session, dispatch.IO)
    return model


def waiting(session: Session) -> list[str]:
    """Returns the ids of the adapters to check, oldest first."""
    query = select(Model.id).where(Model.kind == "tuned", Model.status == "processing", Model.deleted_at.is_(None))
    return list(session.scalars(query.order_by(Model.created_at)))


def set_ready(session: Session, model: Model, *, manifest: dict[str, Any], sha256: str, technique: Lora) -> None:
    """Marks a stored adapter as ready."""
    model_info = {**model.model_info, TECHNIQUE: technique.model_dump(mode="json")}
    registry.set_ready(session, model, manifest=manifest, sha256=sha256, model_info=model_info)


def technique_of(model: Model) -> Lora | None:
    """Returns the technique of an imported adapter; None for any other model."""
    found = model.model_info.get(TECHNIQUE)
    return None if found is None else (Qlora if found["type"] == "qlora" else Lora).model_validate(found)
