"""Makes exports of existing models in a separate process, and stores them beside the model's files."""

import json
import logging
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from tunery import db
from tunery.artifacts import manifest
from tunery.artifacts import model as artifacts
from tunery.artifacts.manifest import ManifestFile
from tunery.datasets.model import File
from tunery.jobs.model import Job
from tunery.models import exports, imports
from tunery.models.model import Model
from tunery.settings import Settings
from tunery.spec import Export, ExportOrder, Plan
from tunery.storage import Storage
from worker.io import programs
from worker.io.claims import take_one
from worker.supervisor.drain import Drain
from worker.supervisor.staging import base_folder

log = logging.getLogger(__name__)


def export_next(settings: Settings, storage: Storage, drain: Drain) -> bool:
    """Makes one model's exports; returns whether there was a model to export."""
    return take_one("export", _waiting, lambda model_id: _export(model_id, settings, storage, drain))


def _waiting() -> list[str]:
    with db.transaction() as session:
        return exports.waiting(session)


def _export(model_id: str, settings: Settings, storage: Storage, drain: Drain) -> None:
    log.info("exporting %s", model_id)

    def fail(error: Exception) -> None:
        _finish(model_id, [], f"It could not be exported: {error}")

    with programs.workplace(settings.models_dir, "exporting", model_id, fail) as folder:
        _lay_out(model_id, folder, settings, storage)
        reason = programs.run(["worker.trainer.export", str(folder)], folder, drain, what="export")
        if drain.begun:
            return  # the next worker starts over
        if reason is None:
            _publish(model_id, folder, storage)
        else:
            _finish(model_id, [], reason)


def _lay_out(model_id: str, folder: Path, settings: Settings, storage: Storage) -> None:
    """Fills the exporter's folder; deleted files of rows are left out."""
    with db.transaction() as session:
        model = session.get_one(Model, model_id)
        base = session.get_one(Model, model.base_id)
        job = session.get(Job, model.job_id) if model.job_id else None
        rows = _rows(session, model, job)
    (folder / "data").mkdir()
    for name, file in rows.items():
        storage.fetch(file.key, folder / "data" / f"{name}.jsonl", file.sha256)
    for name, each in (("base", base), ("artifact", model)):
        there = base_folder(settings.models_dir, storage, each.prefix, each.manifest_sha256 or "")
        (folder / name).symlink_to(there.absolute())
    (folder / "export.json").write_text(_order(model, job).model_dump_json())


def _rows(session: Session, model: Model, job: Job | None) -> dict[str, File]:
    """Returns the files of rows that prove a merge, by name: the one named with the export, or the job's."""
    if (named := (model.export or {}).get("rows_file")) is not None:
        names: dict[str, str | None] = {"test": named}
    elif job is not None:
        names = {"test": job.test_file, "valid": job.validation_file, "train": job.training_file}
    else:
        names = {}
    found = {name: session.get(File, id) for name, id in names.items() if id is not None}
    return {name: file for name, file in found.items() if file is not None and file.deleted_at is None}


def _order(model: Model, job: Job | None) -> ExportOrder:
    stored = model.export or {}
    asked, columns = Export.model_validate(stored["asked"]), stored.get("columns")
    if job is not None:
        plan = Plan.model_validate(job.plan)
        known = {"method": plan.method, "row_tokens": plan.max_seq_length, "columns": columns or plan.columns}
        return ExportOrder(export=asked, model=model.id, trained_with=plan.technique, **known)
    return ExportOrder(export=asked, model=model.id, trained_with=imports.technique_of(model), columns=columns)


def _publish(model_id: str, folder: Path, storage: Storage) -> None:
    """Stores the exports under the model's own prefix, so that they are deleted with the model."""
    with db.transaction() as session:
        prefix = session.get_one(Model, model_id).prefix
    listed = manifest.describe(folder / "out").files
    for file in listed:
        storage.put_file(f"{prefix}/{file.path}", folder / "out" / file.path)
    _finish(model_id, json.loads((folder / "results.json").read_text()), None, listed)


def _finish(
    model_id: str, results: list[dict[str, Any]], error: str | None, listed: tuple[ManifestFile, ...] = ()
) -> None:
    with db.transaction() as session:
        model = exports.finish(session, model_id, results=results, error=error)
        if model is not None:
            artifacts.add(session, model, listed)
