"""The patches of tests/mutants apply to the tree, and their runner tells caught mutants from surviving ones."""

import difflib
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

TEST = "tests/trainer/test_preflight.py::test_a_full_fine_tune_of_8b_fits_on_80_gib"


@pytest.fixture(scope="module")
def mutants(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutants", root / "tests" / "mutants" / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module there
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow  # `make check` checks the same
def test_every_patch_applies_and_names_tests_that_exist(mutants: ModuleType, root: Path) -> None:
    assert mutants.faults(mutants.read(root / "tests" / "mutants"), root) == []


def _harmless(root: Path) -> str:
    """Returns a patch that breaks nothing: it adds a blank line at the end of a file."""
    lines = (root / "tunery" / "errors.py").read_text().splitlines(keepends=True)
    changed = difflib.unified_diff(lines, [*lines, "\n"], "a/tunery/errors.py", "b/tunery/errors.py")
    return "diff --git a/tunery/errors.py b/tunery/errors.py\n" + "".join(changed)


@pytest.mark.parametrize(
    ("header", "moved", "problem"),
    [
        (f"Breaks: nothing\nCaught by: {TEST}\n", True, "does not apply"),
        (f"Breaks: nothing\nCaught by: {TEST}_any_more\n", False, "there is no test"),
        (f"Caught by: {TEST}\n", False, "its header needs"),
        ("Breaks: nothing\n", False, "its header needs"),
    ],
)
def test_patch_that_does_not_fit_is_a_fault(
    mutants: ModuleType, root: Path, tmp_path: Path, header: str, moved: bool, problem: str
) -> None:
    patch = _harmless(root).replace("@@\n ", "@@\n another line ", 1 if moved else 0)
    (tmp_path / "harmless.patch").write_text(header + patch)

    [found] = mutants.faults(mutants.read(tmp_path), root)

    assert problem in found


def test_every_named_test_has_to_fail(mutants: ModuleType) -> None:
    mutant = mutants.Mutant("some", "something", ("tests/a.py::test_one", "tests/a.py::test_two"), "")
    both = "FAILED tests/a.py::test_one[x] - assert\nFAILED tests/a.py::test_two - assert"

    assert mutants.verdict(mutant, 1, both) == ""
    assert mutants.verdict(mutant, 1, both.replace("FAILED tests/a.py::test_two", "ERROR tests/a.py::test_two")) == ""
    assert "SURVIVED" in mutants.verdict(mutant, 0, "2 passed")
    assert "SURVIVED tests/a.py::test_two" in mutants.verdict(mutant, 1, "FAILED tests/a.py::test_one - assert")
    assert "pytest ended with 2" in mutants.verdict(mutant, 2, "ImportError")


@pytest.mark.slow
def test_mutant_that_survives_fails_the_run(root: Path, tmp_path: Path) -> None:
    (tmp_path / "harmless.patch").write_text(f"Breaks: nothing\nCaught by: {TEST}\n{_harmless(root)}")

    done = subprocess.run(
        [sys.executable, str(root / "tests/mutants/run.py"), "-j", "1", "--folder", str(tmp_path)],
        capture_output=True,
        text=True,
    )

    assert done.returncode == 1, done.stdout + done.stderr
    assert "SURVIVED" in done.stdout
    assert "0 of 1 mutants caught" in done.stdout
