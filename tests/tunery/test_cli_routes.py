"""Messages for people name the command, not the route that it calls."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import rows
from cloned_databases import Database
from commands import Run

from tunery.cli.routes import as_commands
from tunery.failures import TrainingCrashed
from tunery.jobs import ledger
from tunery.jobs.states import State
from tunery.keys import projects

ROOT = Path(__file__).parents[2]
ROUTE = re.compile(r"`?(?:GET|POST|DELETE|PATCH)\s/v1/[^\s`]*`?")
NOT_IN_MESSAGES = {"`POST /v1/responses`", "`POST /v1/models`"}
"""Routes in texts that no command prints."""


def _strings(path: Path) -> Iterator[str]:
    """Yields a module's strings, docstrings too, which are errors' messages, with `x` in place of each field."""
    parts: set[ast.AST] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            parts |= set(node.values)
            yield "".join(part.value if isinstance(part, ast.Constant) else "x" for part in node.values)  # type: ignore[misc]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in parts:
            yield re.sub(r"{\w+}", "x", " ".join(node.value.split()))


def _routes_in_messages() -> set[str]:
    files = [path for room in ("tunery", "api") for path in (ROOT / room).rglob("*.py") if path.parent.name != "cli"]
    texts = [text for path in files for text in _strings(path) if "[^" not in text]  # not in regular expressions
    return {route for text in texts for route in ROUTE.findall(text)}


def test_every_route_in_a_message_has_a_command() -> None:
    found = _routes_in_messages()
    assert {"`GET /v1/models`", "`GET /v1/fine_tuning/jobs/x/logs`", "`POST /v1/uploads`"} <= found
    kept = {route for route in found if as_commands(route) == route}
    assert kept == NOT_IN_MESSAGES


@pytest.mark.parametrize(
    ("route", "command"),
    [
        ("GET /v1/models", "tunery models list"),
        ("GET /v1/models/meta-llama/Llama-3 8B", "tunery models show meta-llama/Llama-3 8B"),
        ("GET /v1/models/ft:tiny:tunery::a1/capture", "tunery captures show ft:tiny:tunery::a1"),
        ("POST /v1/models/ft:tiny:tunery::a1/scorecards", "tunery models score ft:tiny:tunery::a1 FILE"),
        ("GET /v1/fine_tuning/jobs/ftjob-1", "tunery jobs show ftjob-1"),
        ("POST /v1/fine_tuning/jobs/ftjob-1/publish", "tunery jobs publish ftjob-1 --reason ..."),
        ("GET /healthz", "GET /healthz"),
    ],
)
def test_route_becomes_its_command(route: str, command: str) -> None:
    assert as_commands(f"See `{route}` for more.") == f"See `{command}` for more."


def test_commands_say_commands(tunery: Run, api: str, database: Database) -> None:
    with database.sessions.begin() as session:
        row = rows.job(session, projects.find_project(session, "default"), State.VALIDATING)
        ledger.fail_job(session, row, TrainingCrashed(reason="it broke.", job=row.id))
        job = row.id
    log = f"`tunery jobs logs {job}`"
    assert log in " ".join(tunery("jobs", "show", job)[1].split())
    assert log in tunery("jobs", "events", job)[1]
    assert log in tunery("jobs", "watch", job)[2]
    assert "/v1/fine_tuning" in tunery("jobs", "show", job, "--json")[1].replace("\n", "")
    assert f"`tunery jobs rerun {job}` creates" in tunery("jobs", "reproduction", job)[2]
    assert "`tunery models list` lists the available models" in tunery("models", "show", "none")[2]
