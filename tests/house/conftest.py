"""Provides the project's files to the tests of its rules."""

import subprocess
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def root() -> Path:
    return Path(__file__).parents[2]


@pytest.fixture(scope="session")
def tree(root: Path) -> list[Path]:
    """The absolute paths of all files of the project: those that git tracks, or would add."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        capture_output=True,
        check=True,
        text=True,
    )
    paths = (root / name for name in listed.stdout.split("\0") if name)
    return [path for path in paths if path.is_file()]


@pytest.fixture(scope="session")
def texts(tree: list[Path]) -> dict[Path, str]:
    """The contents of the project's text files, without data and pictures."""
    found = {}
    for path in tree:
        if path.suffix in {".gz", ".jsonl", ".parquet", ".png", ".svg", ".ico", ".safetensors", ".sql"}:
            continue
        found[path] = path.read_text(encoding="utf-8")
    return found
