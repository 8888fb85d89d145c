"""Fetches from storage, and checks, the files that a run or a server needs on this host before it starts."""

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from sqlalchemy.orm import Session

from tunery import processes
from tunery.artifacts import manifest
from tunery.datasets.model import File
from tunery.jobs.model import Job
from tunery.models.model import Model
from tunery.spec import Plan, Run
from tunery.storage import Check, Storage
from worker.supervisor import snapshots

_LOCK_SECONDS = 0.2
EXPORTS = ("merged/", "fp8/", "gguf/")
"""The folders of an artifact that `tunery.spec.Export` adds."""
SCORES = "scores"
"""Subfolder of the models folder with the bases' scores on the general benchmark, which later runs reuse."""
PREPARED = "prepared"
"""Subfolder of the models folder with the tokens of files, which later runs with the same tokenizer reuse."""


@dataclass(frozen=True)
class StoredFile:
    """An object in storage and its sha256 from the database."""

    key: str
    sha256: str


@dataclass(frozen=True)
class StoredFolder:
    """A folder in storage and its manifest's sha256 from the database: others may write to storage."""

    prefix: str
    sha256: str

    def __str__(self) -> str:
        return f"{self.prefix}@{self.sha256}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads what str() returns, which is how `jobs.snapshot` names a snapshot."""
        prefix, _, sha256 = text.rpartition("@")
        return cls(prefix, sha256)


@dataclass(frozen=True)
class Tracked:
    """The trackers that a job asks for, as in its request, and what they show of it besides measurements."""

    integrations: Sequence[Mapping[str, Any]] = ()
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Needs:
    """What an attempt's run directory must hold. `files` by their names in data/: train, valid, test, replay."""

    run: Run
    files: Mapping[str, StoredFile]
    base: StoredFolder
    adapter: StoredFolder | None
    resume: StoredFolder | None
    tracked: Tracked = Tracked()


def base_folder(
    models_dir: Path, storage: Storage, prefix: str, manifest_sha256: str, check: Check = lambda: None
) -> Path:
    """Returns a model's folder on this host, filled once and used in place: models_dir/<manifest_sha256>.

    It is named by its content's hash, so a folder with a manifest is complete and never changes. If several processes
    ask at once, one fetches. Raises ObjectMissing, ChecksumMismatch, StorageFailed, and what `check` raises.
    """
    folder = models_dir / manifest_sha256
    if not (folder / manifest.NAME).exists():
        models_dir.mkdir(parents=True, exist_ok=True)
        with _locked(models_dir / f".{manifest_sha256}.lock", check):
            if not (folder / manifest.NAME).exists():
                manifest.fetch(storage, prefix, _without_exports(storage, prefix, manifest_sha256), folder, check)
    return folder


def _without_exports(storage: Storage, prefix: str, sha256: str) -> manifest.Manifest:
    """Returns the model's manifest without its exports, which other programs use and may be 1,000 times as large."""
    listed = manifest.load(storage, prefix, sha256)
    own = [file for file in listed.files if not file.path.startswith(EXPORTS)]
    return manifest.Manifest(files=tuple(own))


def text_folder(models_dir: Path, storage: Storage, model: Model) -> Path:
    """Returns a folder, filled once, with a model's tokenizer, chat template and configs: what judging rows needs."""
    return texts_folder(models_dir, storage, _stored_folder(model))


def texts_folder(models_dir: Path, storage: Storage, stored: StoredFolder) -> Path:
    """Does the same for a stored folder. Raises ObjectMissing, ChecksumMismatch, StorageFailed."""
    whole, folder = models_dir / stored.sha256, models_dir / f"{stored.sha256}.texts"
    if (whole / manifest.NAME).exists():
        return whole
    if not (folder / manifest.NAME).exists():
        listed = _without_exports(storage, stored.prefix, stored.sha256)
        models_dir.mkdir(parents=True, exist_ok=True)
        with _locked(models_dir / f".{stored.sha256}.lock"):
            manifest.fetch(storage, stored.prefix, listed.texts, folder)
    return folder


@contextmanager
def _locked(path: Path, check: Check = lambda: None) -> Iterator[None]:
    # The kernel releases the lock of a process that dies, so the next process takes up an interrupted fetch.
    with path.open("a") as file:
        while not processes.lock(file):
            check()  # a process that waits for another's fetch may have to stop too
            time.sleep(_LOCK_SECONDS)
        yield


def adopt(models_dir: Path, folder: Path, listed: manifest.Manifest) -> None:
    """Makes a folder published from this host its local copy, so that it need not be fetched again."""
    place = models_dir / listed.sha256
    models_dir.mkdir(parents=True, exist_ok=True)
    with _locked(models_dir / f".{listed.sha256}.lock"):
        if not place.exists():
            (folder / manifest.NAME).write_bytes(listed.encode())
            folder.rename(place)


def lay_out(needs: Needs, run_dir: Path, models_dir: Path, storage: Storage, check: Check) -> str | None:
    """Fills a new run directory as `tunery.spec.Run` describes it; `check` is called with every chunk and may raise.

    Returns a note about the snapshot for the job's owner, if there is one. Raises ObjectMissing, ChecksumMismatch,
    StorageFailed.
    """
    shutil.rmtree(run_dir, ignore_errors=True)
    (run_dir / "data").mkdir(parents=True)
    for name, file in needs.files.items():
        storage.fetch(file.key, run_dir / "data" / f"{name}.jsonl", file.sha256, check)
    check()
    base = base_folder(models_dir, storage, needs.base.prefix, needs.base.sha256, check)
    (run_dir / "base").symlink_to(base.absolute())
    for shared in (SCORES, PREPARED):
        (models_dir / shared).mkdir(exist_ok=True)
        (run_dir / shared).symlink_to((models_dir / shared).absolute())
    if needs.adapter is not None:
        listed = _without_exports(storage, needs.adapter.prefix, needs.adapter.sha256)
        manifest.fetch(storage, needs.adapter.prefix, listed, run_dir / "adapter", check)
    note = None
    if needs.resume is not None:
        resume = run_dir / "resume"
        note = snapshots.fetch(storage, needs.run.job, needs.resume.prefix, needs.resume.sha256, resume, check)
    # Last: a directory with a spec is complete.
    (run_dir / "spec.json").write_text(needs.run.model_dump_json(indent=2) + "\n")
    return note


def needs_of(session: Session, job: Job) -> Needs:
    """Returns what the run directory of the job's next attempt must hold."""
    plan = Plan.model_validate(job.plan)
    ids = {"train": job.training_file, "valid": job.validation_file, "test": job.test_file, "replay": job.replay_file}
    files = {name: session.get_one(File, id) for name, id in ids.items() if id is not None}
    base = session.get_one(Model, job.base_model)
    parent = session.get_one(Model, job.parent_model) if job.parent_model else None
    # A parent from full fine-tuning is a whole model and replaces the base; an adapter goes beside the base.
    whole = parent if parent is not None and parent.technique == "full" else None
    return Needs(
        run=Run(
            job=job.id,
            base_model=(whole or base).id,
            plan=plan,
            public_checkpoints=plan.keep_checkpoints,
            now=job.now,
            facts=_provenance(job, whole or base, parent, files),
        ),
        files={name: StoredFile(file.key, file.sha256) for name, file in files.items()},
        base=_stored_folder(whole or base),
        adapter=_stored_folder(parent) if parent is not None and whole is None else None,
        resume=StoredFolder.parse(job.snapshot) if job.snapshot else None,
        tracked=Tracked(job.integrations, {"model": job.model_name} | _flat(job.plan or {})),
    )


def _flat(options: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Returns a plan's options by dotted names, without those that have no value."""
    found: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{above}{name}.")
        elif value is not None:
            found[f"{above}{name}"] = value
    return found


def _stored_folder(model: Model) -> StoredFolder:
    assert model.manifest_sha256 is not None, "a model is used that is not ready"
    return StoredFolder(model.prefix, model.manifest_sha256)


def _provenance(job: Job, base: Model, parent: Model | None, files: Mapping[str, File]) -> dict[str, Any]:
    return {
        "base_source": base.source,
        "base_manifest_sha256": base.manifest_sha256,
        "parent_model": parent.id if parent else None,
        "parent_manifest_sha256": parent.manifest_sha256 if parent else None,
        "rerun_of": job.rerun_of,
        "files": {name: {"id": file.id, "sha256": file.sha256} for name, file in files.items()},
        "created_at": job.created_at.isoformat(),
    }
