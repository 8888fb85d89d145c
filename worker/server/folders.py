"""Finds models' published folders on this host."""

import logging
from pathlib import Path

from tunery import digests
from tunery.artifacts import manifest
from tunery.artifacts.manifest import Manifest
from tunery.serving import Files
from tunery.storage import Storage
from worker.supervisor.staging import StoredFolder, base_folder, texts_folder

WEIGHTS = "adapter_model.safetensors"

log = logging.getLogger(__name__)


def fetch(models_dir: Path, storage: Storage, files: Files) -> Path:
    """Returns the model's folder, fetched unless it is here. Raises StorageFailed, ObjectMissing, ChecksumMismatch."""
    return base_folder(models_dir, storage, files.prefix, files.manifest_sha256)


def fetch_texts(models_dir: Path, storage: Storage, files: Files) -> Path:
    """Returns the model's folder, or one without its weights. Raises as `fetch` does."""
    return texts_folder(models_dir, storage, StoredFolder(files.prefix, files.manifest_sha256))


def check(models_dir: Path, storage: Storage, files: Files) -> Path:
    """Returns an adapter's folder, fetched again if its weights on this host have changed."""
    was_here = is_here(models_dir, files)
    folder = fetch(models_dir, storage, files)
    return fetch_again(models_dir, storage, files) if was_here and not is_intact(folder) else folder


def is_here(models_dir: Path, files: Files) -> bool:
    """Whether the model's folder is on this host; `fetch` checks what it has to download."""
    return (models_dir / files.manifest_sha256 / manifest.NAME).exists()


def is_intact(folder: Path) -> bool:
    """Whether an adapter's weights are those of its manifest."""
    listed = Manifest.model_validate_json((folder / manifest.NAME).read_bytes())
    wanted = {file.path: file.sha256 for file in listed.files}.get(WEIGHTS)
    return (folder / WEIGHTS).is_file() and digests.sha256(folder / WEIGHTS) == wanted


def fetch_again(models_dir: Path, storage: Storage, files: Files) -> Path:
    """Returns the model's folder, of which the files that have changed on this host are fetched."""
    log.warning("%s has changed on this host and is downloaded again", files.id)
    (models_dir / files.manifest_sha256 / manifest.NAME).unlink(missing_ok=True)
    return fetch(models_dir, storage, files)
