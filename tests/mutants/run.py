"""Breaks the code by one patch at a time, and fails if any test that the patch names still passes.

    python tests/mutants/run.py [--check] [-j PROCESSES] [NAME ...]

Each `tests/mutants/NAME.patch` is a git patch of one small change. The lines above it say what it breaks and name the
tests that have to fail, all of which pass on the unbroken tree:

    Breaks: the rate does not rise over the warmup
    Caught by: tests/trainer/test_nets.py::test_rate_rises_over_the_warmup

`--check` only checks that every patch applies and names tests that exist.
"""

import argparse
import ast
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = Path("tests/mutants")
PRELOADED = ("torch", "transformers.models.llama.modeling_llama", "peft", "accelerate", "bitsandbytes")
PRELOADED_TOO = ("-W", "ignore::pytest.PytestAssertRewriteWarning")
"""The preloaded modules import a package with a pytest plugin, which pytest then can no longer rewrite."""
PATIENCE = 900
"""Seconds to wait for one mutant; the wait for a process that has died would never end."""
TESTS_FAILED = 1
"""pytest's exit code. Others mean that the mutant cannot be imported or the tests cannot be found."""


@dataclass(frozen=True)
class Mutant:
    """A patch and the contents of its header."""

    name: str
    breaks: str
    tests: tuple[str, ...]
    patch: str


def read(folder: Path) -> list[Mutant]:
    """Reads the mutants of a folder, in the order of their names."""
    return [_parse(path) for path in sorted(folder.glob("*.patch"))]


def _parse(path: Path) -> Mutant:
    patch = path.read_text(encoding="utf-8")
    header = patch.partition("diff --git ")[0]
    breaks = re.findall(r"^Breaks: (.+)$", header, re.MULTILINE)
    tests = re.findall(r"^Caught by: (\S+)$", header, re.MULTILINE)
    return Mutant(path.stem, " ".join(breaks), tuple(tests), patch)


def faults(mutants: list[Mutant], root: Path) -> list[str]:
    """Returns the faults of the patches themselves: an incomplete header, a missing test, code that has moved."""
    found = []
    for mutant in mutants:
        if not (mutant.breaks and mutant.tests):
            found.append(f"{mutant.name}: its header needs one line 'Breaks: ...' and one or more 'Caught by: ...'")
        found += [f"{mutant.name}: there is no test {test}" for test in mutant.tests if not _exists(root, test)]
        if problem := _apply(mutant, root, "--check"):
            found.append(f"{mutant.name}: does not apply, move it with the code ({problem.splitlines()[0]})")
    return found


def _exists(root: Path, test: str) -> bool:
    file, _, name = test.partition("::")
    if not (root / file).is_file():
        return False
    tree = ast.parse((root / file).read_text(encoding="utf-8"))
    return any(isinstance(node, ast.FunctionDef) and node.name == name.partition("[")[0] for node in tree.body)


def _apply(mutant: Mutant, tree: Path, *options: str) -> str:
    """Applies the patch to a tree; returns git's error message, or nothing if it applies."""
    done = subprocess.run(
        ["git", "apply", *options, "-"],
        cwd=tree,
        input=mutant.patch,
        env={**os.environ, "GIT_CEILING_DIRECTORIES": str(tree.parent)},
        capture_output=True,
        text=True,
    )
    return done.stderr if done.returncode else ""


def _copy(target: Path) -> None:
    """Copies the working tree: the files that git tracks, or would add."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, check=True, text=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def _pytest(tree: Path, tests: tuple[str, ...]) -> tuple[int, str]:
    """Runs pytest in this process, which does nothing afterwards; returns its exit code and output."""
    sys.dont_write_bytecode = True  # a patch may change neither size nor mtime
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "1000"}
    os.chdir(tree)
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        code = pytest.main(["-q", "-rfE", "--tb=short", "-p", "no:cacheprovider", *PRELOADED_TOO, *tests])
        sys.stdout.flush()
        log.seek(0)
        return int(code), log.read().decode(errors="replace")


def verdict(mutant: Mutant, code: int, output: str) -> str:
    """Returns an empty string if every named test failed on the mutant; else the problem."""
    if code == 0:
        return "SURVIVED: its tests pass on the broken code"
    if code != TESTS_FAILED:
        return f"no verdict: pytest ended with {code}\n{output}"
    # A test also counts as failed if its fixture fails: some fixtures do the whole run that is tested.
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    failed += [test.partition("[")[0] for test in failed]
    spared = [test for test in mutant.tests if test not in failed]
    return f"SURVIVED {', '.join(spared)}\n{output}" if spared else ""


def attempt(mutant: Mutant, pristine: Path) -> tuple[str, float]:
    """Runs a mutant's tests; returns the problem, empty if the tests failed as they should, and the seconds taken."""
    began = time.monotonic()
    tree = pristine.with_name(mutant.name)
    shutil.copytree(pristine, tree)
    problem = _apply(mutant, tree) or verdict(mutant, *_pytest(tree, mutant.tests))
    return problem, time.monotonic() - began


def run(mutants: list[Mutant], processes: int) -> int:
    """Runs the mutants; returns the exit code, which is 0 if the tests pass on the tree and fail on every mutant."""
    # Each mutant has a process, forked from one that has already done the imports, which take seconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    with (
        tempfile.TemporaryDirectory(prefix="tunery-mutants-") as folder,
        # Not a ProcessPoolExecutor: with one task per process, that of Python 3.11 may never end.
        context.Pool(processes, maxtasksperchild=1) as pool,
    ):
        pristine = Path(folder) / "pristine tree"
        _copy(pristine)
        tests = tuple(sorted({test for mutant in mutants for test in mutant.tests}))
        code, output = pool.apply(_pytest, (pristine, tests))
        if code:
            print(f"the tests do not pass on the unbroken tree\n{output}")
            return 1
        found = pool.imap(partial(attempt, pristine=pristine), mutants)
        caught = [_report(mutant, *found.next(PATIENCE)) for mutant in mutants]
    print(f"{sum(caught)} of {len(caught)} mutants caught")
    return 0 if all(caught) else 1


def _report(mutant: Mutant, problem: str, seconds: float) -> bool:
    print(f"{'FAULT' if problem else 'caught'}  {mutant.name}: {mutant.breaks}  ({seconds:.1f} s)")
    print("\n".join(f"        {line}" for line in (problem.splitlines() or mutant.tests)), flush=True)
    return not problem


def main() -> int:
    parser = argparse.ArgumentParser(description="Break the code and see the tests fail.")
    parser.add_argument("names", nargs="*", help="mutants to try; all when none is named")
    parser.add_argument("--check", action="store_true", help="only ask whether the patches fit the tree")
    parser.add_argument("-j", dest="processes", type=int, default=2, help="mutants tried at once")
    parser.add_argument("--folder", type=Path, default=ROOT / FOLDER, help="where the patches are")
    asked = parser.parse_args()
    mutants = [mutant for mutant in read(asked.folder) if not asked.names or mutant.name in asked.names]
    if unknown := set(asked.names) - {mutant.name for mutant in mutants}:
        parser.error(f"no such mutant: {', '.join(sorted(unknown))}")
    if problems := faults(mutants, ROOT):
        print("\n".join(problems))
        return 1
    return 0 if asked.check else run(mutants, asked.processes)


if __name__ == "__main__":
    sys.exit(main())
