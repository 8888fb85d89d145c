"""`Training` is a record that functions only read: what changes in a run belongs to the object that changes it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOMS = ("worker/trainer", "tests/trainer", "tests/fixtures", "bench")


@pytest.fixture(scope="module")
def sources(tree: list[Path], root: Path) -> dict[str, str]:
    """The trainer's modules and what builds on them, by path."""
    files = {str(path.relative_to(root)): path for path in tree if path.suffix == ".py"}
    return {name: path.read_text() for name, path in files.items() if name.startswith(ROOMS)}


@pytest.fixture(scope="module")
def functions(sources: dict[str, str]) -> list[tuple[str, ast.FunctionDef]]:
    """Every function in modules that mention `Training`, with the module's path."""
    modules = {name: ast.walk(ast.parse(text)) for name, text in sources.items() if "Training" in text}
    return [(name, node) for name, nodes in modules.items() for node in nodes if isinstance(node, ast.FunctionDef)]


def _records(function: ast.FunctionDef) -> set[str]:
    """Returns the names of a function's parameters of type `Training`."""
    parameters = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return {p.arg for p in parameters if isinstance(p.annotation, ast.Name) and p.annotation.id == "Training"}


def _assigned(function: ast.FunctionDef) -> Iterator[str]:
    """Yields the attributes of those parameters that the function assigns to or deletes."""
    records = _records(function)
    for node in ast.walk(function) if records else ():
        stored = isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load)
        if stored and isinstance(node.value, ast.Name) and node.value.id in records:
            yield ast.unparse(node)


def test_nothing_assigns_to_an_attribute_of_training(functions: list[tuple[str, ast.FunctionDef]]) -> None:
    assert any(_records(function) for _, function in functions)
    assert [f"{path}: {found}" for path, function in functions for found in _assigned(function)] == []


def test_training_is_frozen_and_nothing_goes_around_it(sources: dict[str, str]) -> None:
    module = ast.parse(sources["worker/trainer/training.py"])
    [training] = [node for node in module.body if isinstance(node, ast.ClassDef) and node.name == "Training"]
    assert [ast.unparse(decorator) for decorator in training.decorator_list] == ["dataclass(frozen=True)"]
    assert [name for name, text in sources.items() if "object.__setattr__" in text] == []
