"""Keeps the base's benchmark scores on the host: they are the same for every run on that base.

The run directory's `scores/`, if there is one, is shared by the host's runs. A file there is named by a digest of all
that its scores depend on, and is complete or absent.
"""

import hashlib
import json
import logging
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tunery.planning.precision import Precision
from worker.trainer.general.choices import Likelihoods
from worker.trainer.training import Training

log = logging.getLogger(__name__)

_VERSION = 1
"""Version of how likelihoods are computed. With a new one, older files are ignored."""


def find_place(t: Training, benchmark: str) -> Path | None:
    """Returns the path of these scores, written or not; None if scores are not kept or the base has no content hash."""
    base = base_digest(t.folder)
    if base is None:
        return None
    return t.folder / "scores" / f"{_key(base, benchmark, t.precision, t.device.type)}.json"


def base_digest(folder: Path) -> str | None:
    """Returns the content hash of a run directory's base; None if it has none, or the host keeps no scores."""
    scores, manifest = folder / "scores", folder / "base" / "manifest.json"
    if not scores.is_dir() or not manifest.exists():
        return None
    return hashlib.sha256(manifest.read_bytes()).hexdigest()


def _key(base: str, benchmark: str, precision: Precision, device: str) -> str:
    all_of_it = json.dumps([_VERSION, base, benchmark, asdict(precision), device], sort_keys=True)
    return hashlib.sha256(all_of_it.encode()).hexdigest()


def read(place: Path | None, items: int) -> list[Likelihoods] | None:
    """Returns the stored scores, one entry per item; None if they cannot be read."""
    if place is None or not place.exists():
        return None
    try:
        found: list[Likelihoods] = json.loads(place.read_text())
    except ValueError:
        return None
    return found if isinstance(found, list) and len(found) == items else None


def write(place: Path | None, scores: Any) -> None:
    """Keeps the scores, or other data that is the same for every run on a base, as JSON.

    On a full disk nothing is kept, which costs later runs a minute and this one nothing.
    """
    if place is None:
        return
    try:
        with tempfile.NamedTemporaryFile("w", dir=place.parent, prefix=".", delete=False) as file:
            file.write(json.dumps(scores))
        Path(file.name).replace(place)
    except OSError as error:
        log.warning("what the base gave is not kept: %s", error)
