"""The packages stay separate: nothing installs `api` or `worker`, and the import rules cover every part."""

import ast
import configparser
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

HEAVY = {"torch", "transformers", "peft", "bitsandbytes", "accelerate"}


def _children(package: Path) -> set[str]:
    return {
        path.stem
        for path in package.iterdir()
        if (path.suffix == ".py" or (path / "__init__.py").is_file()) and path.stem != "__init__"
    }


@pytest.fixture(scope="module")
def walls(root: Path) -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(root / ".importlinter")
    return parser


def _names(walls: configparser.ConfigParser, contract: str, field: str) -> set[str]:
    return set(walls[f"importlinter:contract:{contract}"][field].split())


def test_no_installed_distribution_owns_a_rooms_name() -> None:
    owners = metadata.packages_distributions()
    # An editable install may have the tree itself on its path; the fault is a wheel with these names.
    assert not owners.get("api"), f"'api' is installed by {owners.get('api')}"
    assert not owners.get("worker"), f"'worker' is installed by {owners.get('worker')}"


def test_no_test_folder_is_a_package(tree: list[Path], root: Path) -> None:
    packages = [
        str(path.relative_to(root)) for path in tree if path.name == "__init__.py" and root / "tests" in path.parents
    ]
    assert packages == []


def test_the_faces_of_the_floor_that_are_not_storage_are_empty(root: Path) -> None:
    """`from tunery.jobs import x` would hide the module that x comes from."""
    full = {
        path.parent.name
        for path in (root / "tunery").rglob("__init__.py")
        if path.read_text().strip() and "import" in path.read_text()
    }
    assert full <= {"storage"}


def test_every_part_of_the_workers_stands_behind_the_web_wall(root: Path, walls: configparser.ConfigParser) -> None:
    parts = {f"worker.{name}" for name in _children(root / "worker")}
    assert parts - {"worker.server"} == _names(walls, "no-web", "source_modules") - {"tunery"}


def test_trainer_knows_ten_parts_of_the_floor(root: Path, walls: configparser.ConfigParser) -> None:
    parts = {f"tunery.{name}" for name in _children(root / "tunery")}
    known = [
        "digests",
        "errors",
        "failures",
        "field_reasons",
        "planning",
        "plugins",
        "processes",
        "rows",
        "spec",
        "trainer_protocol",
    ]
    allowed = {f"tunery.{name}" for name in known}
    forbidden = {name for name in _names(walls, "trainer", "forbidden_modules") if name.startswith("tunery.")}
    assert parts - allowed == forbidden


def test_the_api_writes_no_queries(root: Path) -> None:
    """Queries are in the modules of their rows: the API imports only sessions and errors of SQLAlchemy."""
    found = {
        f"{path.relative_to(root)}: from {node.module} import {', '.join(name.name for name in node.names)}"
        for path in (root / "api").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sqlalchemy")
        if node.module not in {"sqlalchemy.orm", "sqlalchemy.exc"}
    }
    assert found == set()


def test_the_api_starts_without_torch(root: Path) -> None:
    """import-linter sees only our own imports; this test also sees those of other packages."""
    found = subprocess.run(
        [sys.executable, "-c", "import json, sys, api.main; print(json.dumps(sorted(sys.modules)))"],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert HEAVY.isdisjoint(json.loads(found.stdout))


@pytest.mark.parametrize("module", ["worker.app", "worker.supervisor.attempt"])
def test_the_supervisors_start_without_torch(root: Path, module: str) -> None:
    script = f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))"
    found = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True, timeout=120
    )
    assert HEAVY.isdisjoint(json.loads(found.stdout))
