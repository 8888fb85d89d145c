"""The `tunery` command, run in this process, and an API for it to talk to."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from asgi import serving
from cloned_databases import Database
from commands import Run

from api.main import create_app
from tunery.cli import main, output
from tunery.keys import auth, projects


@pytest.fixture
def tunery(
    database: Database, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Run:
    """Runs a command in an empty folder, without a key: `tunery("files", "list")` -> exit status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "1000")  # where lines of errors break would depend on the length of tmp_path

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["tunery", *map(str, arguments)])
        # Created again, because a console keeps the stream that it was created with.
        monkeypatch.setattr(output, "console", output.literal_console(width=80))
        monkeypatch.setattr(output, "errors", output.literal_console(stderr=True, width=80))
        with pytest.raises(SystemExit) as end:
            main.run()
        said = capsys.readouterr()
        return int(end.value.code or 0), said.out, said.err

    return run


@pytest.fixture
def key(database: Database) -> str:
    with database.sessions.begin() as session:
        return auth.create_key(session, projects.create_project(session, "default"), "test", admin=True)[1]


@pytest.fixture
def api(database: Database, key: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of an API on a port of its own, which the environment points to."""
    with serving(create_app(database.settings)) as url:
        monkeypatch.setenv("TUNERY_API_URL", url)
        monkeypatch.setenv("TUNERY_API_KEY", key)
        yield url
