"""Keeps the base's answers to replay's prompts with the run and on the host.

A resumed attempt must train on exactly the same rows, so the run's own folder and its snapshots have them; later runs
on that base read the host's.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from worker.trainer.general import stored

log = logging.getLogger(__name__)

NAME = "replay.json"
Answers = list[str | None]
"""Answers to the first prompts, in order; None for an answer that did not end."""


def path(folder: Path) -> Path:
    """Returns the path of the answers in a run directory."""
    return folder / "snapshots" / NAME


def find(folder: Path, key: Sequence[object], most: int) -> Answers:
    """Returns the answers of the run's earlier attempt or the host's; none if no file has this key."""
    digest = _digest(key)
    for place in (path(folder), folder / "resume" / NAME, _place(folder, digest)):
        found = _read(place, digest)
        if found and len(found) <= most:
            return found
    return []


def write(folder: Path, key: Sequence[object], answers: Answers) -> None:
    """Keeps the answers for the run's next attempt, and for the host's next run unless that has more."""
    digest = _digest(key)
    content = {"key": digest, "answers": answers}
    path(folder).parent.mkdir(exist_ok=True)
    stored.write(path(folder), content)
    place = _place(folder, digest)
    if len(_read(place, digest)) < len(answers):
        stored.write(place, content)


def _digest(key: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def _place(folder: Path, digest: str) -> Path | None:
    manifest = stored.base_digest(folder)
    if manifest is None:
        return None
    return folder / "scores" / f"replay-{hashlib.sha256((manifest + digest).encode()).hexdigest()}.json"


def _read(place: Path | None, digest: str) -> Answers:
    if place is None or not place.exists():
        return []
    try:
        found = json.loads(place.read_text())
    except ValueError:
        log.warning("%s is damaged: its answers are sampled again", place)
        return []
    return list(found["answers"]) if isinstance(found, dict) and found.get("key") == digest else []
