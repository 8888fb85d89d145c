"""The trainer's tests run where only the packages of training are installed: no database, broker or web framework."""

import os
import re
import subprocess
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

TRAINING = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "pydantic", "pytest")


def _closure(names: tuple[str, ...]) -> dict[str, Distribution]:
    """Returns the named distributions and everything that they require, by name."""
    found: dict[str, Distribution] = {}
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            continue  # a requirement that the installed build does not need
        for line in found[name].requires or []:
            required = Requirement(line)
            if required.marker is None or required.marker.evaluate({"extra": ""}):
                waiting.append(required.name)
    return found


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder of installed packages that has only those of training."""
    folder = tmp_path / "site"
    folder.mkdir()
    for package in _closure(TRAINING).values():
        for part in {file.parts[0] for file in package.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            if not (folder / part).exists():
                (folder / part).symlink_to(Path(str(package.locate_file(part))))
    return folder


@pytest.mark.slow
def test_the_trainers_tests_need_the_packages_of_training_alone(root: Path, site: Path) -> None:
    assert not (site / "sqlalchemy").exists()
    assert not (site / "pytest_timeout.py").exists()

    # -S: without the site-packages of this interpreter.
    done = subprocess.run(
        [sys.executable, "-S", "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "tests/trainer"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    files = {line.split("::")[0] for line in done.stdout.splitlines() if "::" in line}
    every = {str(path.relative_to(root)) for path in (root / "tests" / "trainer").glob("test_*.py")}
    assert every - files == {name for name in every if "/test_gguf" in name}, "which need what writes GGUF"
