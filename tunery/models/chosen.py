"""Describes models to the model server: where their files are, and which of them became usable last."""

import sqlalchemy as sql
from sqlalchemy.orm import Session

from tunery.models.model import Model
from tunery.serving import Chosen, Files, TunedFiles


def describe(session: Session, model: Model, project_id: str | None = None) -> Chosen:
    """Returns what the model server needs to load a model that is ready. `project_id`: whose request it answers."""
    base = model if model.base_id is None else session.get_one(Model, model.base_id)
    tuned = None if base is model else TunedFiles.model_validate({**_place(model), "technique": model.technique})
    return Chosen(base=Files.model_validate(_place(base)), tuned=tuned, project_id=project_id)


def newest_adapters(session: Session, most: int) -> list[Chosen]:
    """Returns the adapters of the latest jobs and imports that can be used, the newest first. Checkpoints are left out,
    as few of them are ever used.
    """
    usable = (Model.status == "ready", ~Model.withheld, Model.deleted_at.is_(None))
    found = session.scalars(
        sql.select(Model)
        .where(Model.kind == "tuned", Model.technique.in_(("lora", "qlora")), *usable)
        .order_by(Model.created_at.desc(), Model.id)
        .limit(most)
    )
    return [describe(session, model) for model in found]


def _place(model: Model) -> dict[str, str | None]:
    return {"id": model.id, "prefix": model.prefix, "manifest_sha256": model.manifest_sha256}
