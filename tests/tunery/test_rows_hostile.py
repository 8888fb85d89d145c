"""Hostile files cost bounded time and memory, and the refusal names the place."""

import json
import subprocess
import sys
from pathlib import Path

import hostile_files

ROOT = Path(__file__).parents[2]
CHILD = ROOT / "tests/fixtures/reading_child.py"


def test_hostile_files_are_refused_in_little_memory(tmp_path: Path) -> None:
    paths, files = [], hostile_files.FILES | hostile_files.ROWS
    for name, (make, _) in files.items():
        (tmp_path / name).write_bytes(make())
        paths.append(str(tmp_path / name))
    command = [sys.executable, str(CHILD), "3000", *paths]
    said = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=200, env={"PYTHONPATH": str(ROOT)}
    )
    found = json.loads(said.stdout)
    wrong = {name: said for name, (said, _) in found["files"].items() if files[name][1] not in said}
    assert wrong == {}
    assert found["mib"] < 450  # three texts of 20 MiB at a time, each as Arrow's value, Python's and JSON
    assert found["seconds"] < 60
