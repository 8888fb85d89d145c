"""Makes scorecards of models without training, in a separate process, and stores them beside the model's files."""

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
from tunery.errors import NotFound
from tunery.jobs.model import Job
from tunery.models import imports, scores
from tunery.models.model import Model
from tunery.settings import Settings
from tunery.spec import Columns, Evaluation, Lora, Plan, Run
from tunery.storage import Storage
from worker.io import programs
from worker.io.claims import take_one
from worker.supervisor import staging
from worker.supervisor.drain import Drain
from worker.supervisor.staging import Needs, StoredFile, StoredFolder

log = logging.getLogger(__name__)


def score_next(settings: Settings, storage: Storage, drain: Drain) -> bool:
    """Scores one model; returns whether there was one."""
    return take_one("score", _waiting, lambda model_id: _score(model_id, settings, storage, drain))


def _waiting() -> list[str]:
    with db.transaction() as session:
        return scores.waiting(session)


def _score(model_id: str, settings: Settings, storage: Storage, drain: Drain) -> None:
    log.info("scoring %s", model_id)

    def fail(error: Exception) -> None:
        _finish(model_id, error=f"It could not be scored: {error}")

    with programs.workplace(settings.models_dir, "scoring", model_id, fail) as folder:
        run_dir = folder / "run"
        _lay_out(model_id, run_dir, settings, storage)
        reason = programs.run(["worker.trainer.scoring", str(run_dir)], folder, drain, what="scoring")
        if drain.begun:
            return  # the next worker starts over
        if reason is None:
            _publish(model_id, run_dir / "out", storage)
        else:
            _finish(model_id, error=reason)


def _lay_out(model_id: str, run_dir: Path, settings: Settings, storage: Storage) -> None:
    """Fills a run directory for the model, with its test rows in place of training rows."""
    with db.transaction() as session:
        model = session.get_one(Model, model_id)
        asked = model.scoring or {}
        columns = None if asked.get("columns") is None else Columns.model_validate(asked["columns"])
        needs = needs_of(session, model, Evaluation.model_validate(asked["evaluation"]), columns)
    staging.lay_out(needs, run_dir, settings.models_dir, storage, lambda: None)


def needs_of(session: Session, model: Model, evaluation: Evaluation, columns: Columns | None) -> Needs:
    """Returns what a run directory must hold for a model to answer an evaluation's test file, which is read by
    `columns`. Raises NotFound.
    """
    file = session.get(File, evaluation.test_file)
    if file is None or file.deleted_at is not None:
        raise NotFound(kind="file", id=evaluation.test_file)
    is_whole = model.kind == "base" or model.technique == "full"
    base = model if is_whole else session.get_one(Model, model.base_id)
    rows = StoredFile(file.key, file.sha256)
    return Needs(
        run=Run(
            job=model.id, base_model=base.id, plan=_plan(session, model, evaluation, columns), now=model.created_at
        ),
        files={"train": rows, "test": rows},
        base=StoredFolder(base.prefix, base.manifest_sha256 or ""),
        adapter=None if is_whole else StoredFolder(model.prefix, model.manifest_sha256 or ""),
        resume=None,
    )


def _plan(session: Session, model: Model, evaluation: Evaluation, columns: Columns | None) -> Plan:
    """Returns the plan that the model was trained by, with the evaluation asked for; a whole model gets an adapter that
    is switched off.
    """
    job = session.get(Job, model.job_id) if model.job_id else None
    if model.kind == "base" or model.technique == "full":
        known: dict[str, Any] = {"technique": Lora()}
    elif job is not None:
        made = Plan.model_validate(job.plan)
        known = {"technique": made.technique, "method": made.method}
        known["max_seq_length"] = made.max_seq_length
    else:
        known = {"technique": imports.technique_of(model)}
    # Values that a plan must have, though nothing reads them without training.
    unread = {"learning_rate": 1e-4, "learning_rate_multiplier": 1.0, "n_epochs": 1, "batch_size": 1, "seed": 0}
    return Plan(**known, **unread, evaluation=evaluation, columns=columns)


def _publish(model_id: str, out: Path, storage: Storage) -> None:
    """Stores the scorecard and the answers under the model's own prefix, apart from those of its job."""
    with db.transaction() as session:
        model = session.get_one(Model, model_id)
        prefix, test_file = model.prefix, (model.scoring or {})["evaluation"]["test_file"]
    listed = [
        file.model_copy(update={"path": f"scores/{test_file}/{file.path}"}) for file in manifest.describe(out).files
    ]
    for file in listed:
        storage.put_file(f"{prefix}/{file.path}", out / Path(file.path).name)
    _finish(model_id, scorecard=json.loads((out / "scorecard.json").read_text()), listed=listed)


def _finish(
    model_id: str,
    *,
    scorecard: dict[str, Any] | None = None,
    error: str | None = None,
    listed: list[ManifestFile] | None = None,
) -> None:
    with db.transaction() as session:
        model = scores.finish(session, model_id, scorecard=scorecard, error=error)
        if model is not None:
            artifacts.add(session, model, listed or [])
