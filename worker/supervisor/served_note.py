"""Writes what came of the check of a served model into its artifact, for the check and for its worker."""

from pathlib import Path

from tunery.trainer_protocol import Served


def write(found: Served, artifact: Path) -> None:
    """Writes `served.json`, and a section of the artifact's README. Raises OSError."""
    (artifact / "served.json").write_text(found.model_dump_json(indent=2) + "\n")
    with (artifact / "README.md").open("a", encoding="utf-8") as readme:
        readme.write(f"\n## Served\n\n{found.summary}\n")
