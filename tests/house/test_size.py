"""Rule 6 of CONTRIBUTING.md holds: functions and files are short."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOMS = ("tunery", "api", "worker")


def _functions(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{path}:{node.lineno} {node.name}", (node.end_lineno or node.lineno) - node.lineno + 1


@pytest.fixture(scope="module")
def code(tree: list[Path], root: Path) -> list[Path]:
    """The Python files, without migrations, which a tool generates."""
    return [path for path in tree if path.suffix == ".py" and root / "migrations" not in path.parents]


@pytest.fixture(scope="module")
def shipped(code: list[Path], root: Path) -> list[Path]:
    return [path for path in code if path.relative_to(root).parts[0] in ROOMS]


def _quantile(values: list[int], fraction: float) -> int:
    return sorted(values)[int(fraction * (len(values) - 1))]


def test_no_function_is_longer_than_a_hundred_lines(code: list[Path]) -> None:
    long = [f"{name}: {lines} lines" for path in code for name, lines in _functions(path) if lines > 100]
    assert long == []


def test_most_functions_are_short(shipped: list[Path]) -> None:
    lengths = [lines for path in shipped for _, lines in _functions(path)]
    assert _quantile(lengths, 0.5) <= 10
    assert _quantile(lengths, 0.9) <= 40


def test_nine_files_in_ten_have_at_most_four_hundred_lines(shipped: list[Path]) -> None:
    lengths = [len(path.read_text().splitlines()) for path in shipped]
    assert _quantile(lengths, 0.9) <= 400


def test_no_drawer_for_odds_and_ends(code: list[Path]) -> None:
    drawers = {"utils", "util", "common", "helper", "helpers", "manager", "managers", "misc"}
    assert [str(path) for path in code if drawers & {part.removesuffix(".py") for part in path.parts}] == []
