"""What a run or a server needs on this host before it starts: files out of storage, checked."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tunery.artifacts import manifest
from tunery.storage import Storage


def base_folder(models_dir: Path, storage: Storage, prefix: str, manifest_sha256: str) -> Path:
    """A model's folder on this host, filled once and used in place: models_dir/<manifest_sha256>.

    Its name is its content, so a folder with a manifest is complete and never changes. Several processes may ask at
    once; one fetches. Raises ObjectMissing, ChecksumMismatch, StorageFailed.
    """
    folder = models_dir / manifest_sha256
    if not (folder / manifest.NAME).exists():
        models_dir.mkdir(parents=True, exist_ok=True)
        with _locked(models_dir / f".{manifest_sha256}.lock"):
            if not (folder / manifest.NAME).exists():
                manifest.fetch(storage, prefix, manifest.load(storage, prefix, manifest_sha256), folder)
    return folder


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    # The kernel drops the lock of a process that dies, so a fetch that was cut off is taken up by the next one.
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
