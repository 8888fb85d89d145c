"""Makes adapters that were trained elsewhere usable: checks them in a separate process and publishes them."""

import logging
from pathlib import Path

from tunery import db
from tunery.artifacts import manifest
from tunery.artifacts import model as artifacts
from tunery.models import imports
from tunery.models.model import Model
from tunery.settings import Settings
from tunery.spec import ImportOrder, Lora, Qlora
from tunery.storage import Storage
from worker.io import conversion, programs
from worker.io.claims import take_one
from worker.supervisor.drain import Drain
from worker.supervisor.staging import base_folder

log = logging.getLogger(__name__)


def import_next(settings: Settings, storage: Storage, drain: Drain) -> bool:
    """Imports one adapter; returns whether there was one."""
    return take_one("import", _waiting, lambda model_id: _import(model_id, settings, storage, drain))


def _waiting() -> list[str]:
    with db.transaction() as session:
        return imports.waiting(session)


def _import(model_id: str, settings: Settings, storage: Storage, drain: Drain) -> None:
    log.info("importing %s", model_id)

    def fail(error: Exception) -> None:
        conversion.settle_error(model_id, f"It could not be imported: {error}")

    with programs.workplace(settings.models_dir, "importing", model_id, fail) as folder:
        prefix = _lay_out(model_id, folder, settings, storage)
        reason = programs.run(["worker.trainer.adapter_import", str(folder)], folder, drain, what="import")
        if drain.begun:
            return  # the next worker starts over
        if reason is None:
            _publish(model_id, prefix, folder, storage)
        else:
            conversion.settle_error(model_id, reason)
        storage.delete(imports.archive_key(prefix))


def _lay_out(model_id: str, folder: Path, settings: Settings, storage: Storage) -> str:
    """Fills the importer's folder; returns the model's prefix in storage."""
    with db.transaction() as session:
        model = session.get_one(Model, model_id)
        base = session.get_one(Model, model.base_id)
    there = base_folder(settings.models_dir, storage, base.prefix, base.manifest_sha256 or "")
    (folder / "base").symlink_to(there.absolute())
    with (folder / "adapter.zip").open("wb") as file:
        file.writelines(storage.read(imports.archive_key(model.prefix)))
    provenance = {"base_source": base.source, "base_manifest_sha256": base.manifest_sha256}
    order = ImportOrder(source=model.source or "", base_model=base.id, trained_with=model.technique, facts=provenance)
    (folder / "import.json").write_text(order.model_dump_json())
    return model.prefix


def _publish(model_id: str, prefix: str, folder: Path, storage: Storage) -> None:
    text = (folder / "technique.json").read_text()
    # A predecessor may have died between its manifest and its row. Nobody has read it, as the row says "processing".
    storage.delete(f"{prefix}/{manifest.NAME}")
    listed, sha256 = manifest.publish(storage, prefix, folder / "out")
    with db.transaction() as session:
        model = session.get_one(Model, model_id, with_for_update=True)
        if model.status == "processing" and model.deleted_at is None:
            technique = (Qlora if model.technique == "qlora" else Lora).model_validate_json(text)
            described = listed.model_dump(mode="json")
            imports.set_ready(session, model, manifest=described, sha256=sha256, technique=technique)
            artifacts.record(session, model, listed)
    log.info("%s is ready", model_id)
