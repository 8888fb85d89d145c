"""Fetches the stored snapshot that an attempt resumes from, or the newest intact one if it is damaged."""

import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from tunery.artifacts import manifest
from tunery.storage import Check, Storage
from tunery.storage.errors import ChecksumMismatch, ObjectMissing

log = logging.getLogger(__name__)

_MANIFEST = re.compile(r"(jobs/[^/]+/(\d+)/snapshots/step-(\d+))/" + re.escape(manifest.NAME))


def fetch(storage: Storage, job_id: str, prefix: str, sha256: str, folder: Path, check: Check) -> str | None:
    """Fetches the named snapshot into `folder`, or, if it is damaged, the job's newest intact one.

    Returns None, or a note for the job's owner about the damage. If no snapshot is intact, `folder` is removed.
    `check` is called between reads and may raise. Raises StorageFailed too.
    """
    try:
        manifest.fetch(storage, prefix, manifest.load(storage, prefix, sha256), folder, check)
        return None
    except (ChecksumMismatch, ObjectMissing) as error:
        log.warning("the snapshot %s is damaged: %s", prefix, error)
    damaged = f"The state saved at step {prefix.rpartition('-')[2]} is damaged in storage"
    for step, other in _others(storage, job_id, prefix):
        if _fetch_without_checksum(storage, other, folder, check):
            return f"{damaged}. The run resumes from the state of step {step}."
    shutil.rmtree(folder, ignore_errors=True)
    return f"{damaged}, and no other saved state is intact. The run starts again from the first step."


def _others(storage: Storage, job_id: str, prefix: str) -> Iterator[tuple[int, str]]:
    """Yields step and prefix of the job's other snapshots, the newest first."""
    found = (_MANIFEST.fullmatch(key) for key in storage.list(f"jobs/{job_id}/"))
    steps = [(int(match[3]), int(match[2]), match[1]) for match in found if match and match[1] != prefix]
    for step, _, other in sorted(steps, reverse=True):
        yield step, other


def _fetch_without_checksum(storage: Storage, prefix: str, folder: Path, check: Check) -> bool:
    """Fetches a snapshot whose manifest's checksum is not in the database any more; returns whether it is intact."""
    try:
        listed = manifest.Manifest.model_validate_json(b"".join(storage.read(f"{prefix}/{manifest.NAME}")))
        shutil.rmtree(folder, ignore_errors=True)  # else files of the damaged one would mix with these
        manifest.fetch(storage, prefix, listed, folder, check)
    except (ChecksumMismatch, ObjectMissing, ValueError) as error:
        log.warning("the snapshot %s is damaged: %s", prefix, error)
        return False
    return True
