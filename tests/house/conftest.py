"""The tree as the house's own rules see it."""

import subprocess
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def root() -> Path:
    return Path(__file__).parents[2]


@pytest.fixture(scope="session")
def tree(root: Path) -> list[Path]:
    """Every file of the project, absolute: what git tracks, and what it would if asked."""
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
    """The text files among them; data and pictures are none."""
    found = {}
    for path in tree:
        if path.suffix in {".gz", ".jsonl", ".parquet", ".png", ".svg", ".ico", ".safetensors", ".sql"}:
            continue
        found[path] = path.read_text(encoding="utf-8")
    return found
