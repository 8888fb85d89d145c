"""The base's scores on the benchmark, kept on the host: they are the same for every run on that base.

The run directory's `scores/`, if it has one, is shared by the host's runs. A file there is named by the digest of all
that its scores depend on, and written whole or not at all.
"""

import hashlib
import json
import logging
import tempfile
from dataclasses import asdict
from pathlib import Path

from tunery.planning.precision import Precision
from worker.trainer.general.choices import Likelihoods
from worker.trainer.training import Training

log = logging.getLogger(__name__)

_VERSION = 1
"""Of how likelihoods are computed. Another one makes older files unknown."""


def find_place(t: Training, benchmark: str) -> Path | None:
    """The file of these scores, written or not; None where scores are not kept, or the base has no content hash."""
    scores, manifest = t.folder / "scores", t.folder / "base" / "manifest.json"
    if not scores.is_dir() or not manifest.exists():
        return None
    return scores / f"{_key(manifest, benchmark, t.precision, t.device.type)}.json"


def _key(manifest: Path, benchmark: str, precision: Precision, device: str) -> str:
    base = hashlib.sha256(manifest.read_bytes()).hexdigest()
    all_of_it = json.dumps([_VERSION, base, benchmark, asdict(precision), device], sort_keys=True)
    return hashlib.sha256(all_of_it.encode()).hexdigest()


def read(place: Path | None, items: int) -> list[Likelihoods] | None:
    """The stored scores, one entry an item; None where there are none that can be read."""
    if place is None or not place.exists():
        return None
    try:
        found: list[Likelihoods] = json.loads(place.read_text())
    except ValueError:
        return None
    return found if isinstance(found, list) and len(found) == items else None


def write(place: Path | None, scores: list[Likelihoods]) -> None:
    """Keeps the scores. A disk that is full keeps none, which costs later runs a minute and this one nothing."""
    if place is None:
        return
    try:
        with tempfile.NamedTemporaryFile("w", dir=place.parent, prefix=".", delete=False) as file:
            file.write(json.dumps(scores))
        Path(file.name).replace(place)
    except OSError as error:
        log.warning("the base's scores are not kept: %s", error)
