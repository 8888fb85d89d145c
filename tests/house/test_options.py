"""A training option is declared in one place, from which every class that has it inherits it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from api.schemas.jobs import CreateJob, Job
from tunery.spec import Plan, TrainingOptions, TrainingSpec

ROOMS = ("tunery", "api", "worker")
HOME = "tunery/spec.py TrainingOptions"
MEASURED = {"tunery/trainer_protocol.py Step"}
"""Classes with fields of the same names that are measurements, not options."""


def _declarations(path: Path, root: Path) -> Iterator[tuple[str, str]]:
    """Yields each field that a class of the file declares: its name, and the file and class."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef):
            for line in node.body:
                if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                    yield line.target.id, f"{path.relative_to(root)} {node.name}"


@pytest.mark.parametrize("option", ["learning_rate", "packing", "max_seq_length"])
def test_option_is_declared_in_one_place(option: str, tree: list[Path], root: Path) -> None:
    shipped = [path for path in tree if path.suffix == ".py" and path.relative_to(root).parts[0] in ROOMS]
    places = {place for path in shipped for name, place in _declarations(path, root) if name == option}
    assert places - MEASURED == {HOME}


def test_every_class_has_all_options() -> None:
    for kind in (CreateJob, TrainingSpec, Plan, Job):
        assert set(TrainingOptions.model_fields) <= set(kind.model_fields), kind


@pytest.mark.parametrize("decided", ["technique", "learning_rate"])
def test_plan_leaves_nothing_open(decided: str) -> None:
    complete = {
        "seed": 1,
        "technique": {"type": "lora"},
        "learning_rate": 1.5,  # in older releases a multiplier could raise the rate above a request's bound
        "n_epochs": 1,
        "batch_size": 1,
        "learning_rate_multiplier": 1000,
    }
    assert Plan.model_validate(complete).learning_rate == 1.5
    with pytest.raises(ValidationError, match=decided):
        Plan.model_validate({name: value for name, value in complete.items() if name != decided})


def _functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def _uses(function: ast.AST, expression: str) -> int:
    """Returns how often the function's code contains the expression: a name, or a module's function."""
    return sum(ast.unparse(node) == expression for node in ast.walk(function) if isinstance(node, ast.expr))


def test_requests_body_enters_job_creation_once(tree: list[Path], root: Path) -> None:
    """The route passes the whole body on and reads none of its fields, so that a new option needs no change there."""
    shipped = [path for path in tree if path.suffix == ".py" and path.relative_to(root).parts[0] in ROOMS]
    creating = [function for path in shipped for function in _functions(path) if _uses(function, "creation.create")]
    creating.sort(key=lambda function: function.name)
    assert [function.name for function in creating] == ["create_job", "rerun"]
    assert _uses(creating[0], "creation.create") == 1
    assert _uses(creating[0], "body") == 1
