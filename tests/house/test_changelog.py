"""Rule 12 of CONTRIBUTING.md holds: changes are files in `changelog.d`, and a release collects all of them."""

import subprocess
import sys
from pathlib import Path


def test_a_release_collects_every_file_of_the_folder(root: Path) -> None:
    """towncrier silently ignores a file whose name is misspelt."""
    command = [sys.executable, "-m", "towncrier", "build", "--draft", "--version", "9.9.9"]
    found = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True, timeout=60).stdout
    lines = {line.strip() for line in found.splitlines()}
    left_out = [
        path.name
        for path in (root / "changelog.d").iterdir()
        if path.name != ".gitkeep" and f"- {path.read_text().splitlines()[0]}" not in lines
    ]
    assert left_out == []


def test_no_unreleased_change_is_written_into_the_changelog_itself(root: Path) -> None:
    """Branches that all write to the same place conflict."""
    text = (root / "CHANGELOG.md").read_text()
    unreleased = text.partition("## [Unreleased]")[2].partition("\n## [")[0]
    assert [line for line in unreleased.splitlines() if line.startswith(("-", "###"))] == []
