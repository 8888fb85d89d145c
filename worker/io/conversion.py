"""Makes registered bases usable: converts them in a separate process, publishes them and keeps a copy on this host."""

import json
import logging
import os
from pathlib import Path

from sqlalchemy import select

from tunery import db
from tunery.artifacts import manifest
from tunery.artifacts import model as artifacts
from tunery.models import registry
from tunery.models.model import Model
from tunery.settings import Settings
from tunery.storage import Storage
from tunery.storage.errors import KeyTaken
from worker.io import programs
from worker.io.claims import take_one
from worker.supervisor import staging
from worker.supervisor.drain import Drain
from worker.supervisor.process import environment

log = logging.getLogger(__name__)

_FOR_HUBS = {"HF_ENDPOINT", "HF_TOKEN", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"}
"""Variables with which a conversion reaches a model hub; a training run never does."""


def convert_next(settings: Settings, storage: Storage, drain: Drain) -> bool:
    """Converts one base; returns whether there was one."""
    return take_one("convert", _waiting, lambda model_id: _convert(model_id, settings, storage, drain))


def _waiting() -> list[str]:
    with db.transaction() as session:
        waiting = select(Model.id).where(Model.kind == "base", Model.status == "processing", Model.deleted_at.is_(None))
        return list(session.scalars(waiting.order_by(Model.created_at)))


def _convert(model_id: str, settings: Settings, storage: Storage, drain: Drain) -> None:
    with db.transaction() as session:
        model = session.get_one(Model, model_id)
        source, prefix, template = model.source or "", model.prefix, model.chat_template
    log.info("converting %s from %s", model_id, source)

    def fail(error: Exception) -> None:
        settle_error(model_id, f"It could not be published: {error}")

    # In models_dir, so that the result is renamed into place and not copied.
    with programs.workplace(settings.models_dir, "converting", model_id, fail) as folder:
        variables = _variables(folder / "out")
        arguments = ["worker.trainer.convert", *_arguments(source, folder, template)]
        reason = programs.run(arguments, folder, drain, what="conversion", variables=variables)
        if drain.begun:
            return  # the next worker starts over
        if reason is None:
            _publish(model_id, prefix, folder / "out", settings, storage)
        else:
            settle_error(model_id, reason)


def _arguments(source: str, folder: Path, template: str | None) -> list[str]:
    """Returns the converter's arguments. A template is passed as a file, as it may be too long for a command line."""
    arguments = [source, str(folder / "out")]
    if template is not None:
        (folder / "given.jinja").write_text(template, encoding="utf-8")
        arguments.append(str(folder / "given.jinja"))
    return arguments


def _variables(out: Path) -> dict[str, str]:
    """Returns the environment of a conversion, which may reach a model hub."""
    passed = {name: value for name, value in os.environ.items() if name.upper() in _FOR_HUBS}
    variables = {**environment((), str(out)), **passed}
    del variables["HF_HUB_OFFLINE"]
    return variables


def _publish(model_id: str, prefix: str, out: Path, settings: Settings, storage: Storage) -> None:
    try:
        listed, sha256 = manifest.publish(storage, prefix, out)
    except KeyTaken:
        # A predecessor died between its manifest and its row. Nobody has read it, as the row still said "processing".
        manifest.remove(storage, prefix)
        listed, sha256 = manifest.publish(storage, prefix, out)
    model_info = json.loads((out / "facts.json").read_text())
    staging.adopt(settings.models_dir, out, listed)
    with db.transaction() as session:
        model = session.get_one(Model, model_id, with_for_update=True)
        if model.status == "processing" and model.prefix == prefix and model.deleted_at is None:
            registry.set_ready(
                session, model, manifest=listed.model_dump(mode="json"), sha256=sha256, model_info=model_info
            )
            artifacts.record(session, model, listed)
    log.info("%s is ready", model_id)


def settle_error(model_id: str, reason: str) -> None:
    """Marks a model that is still being processed as unusable."""
    log.warning("%s cannot be used: %s", model_id, reason)
    with db.transaction() as session:
        model = session.get_one(Model, model_id, with_for_update=True)
        if model.status == "processing":
            registry.set_error(session, model, reason)
