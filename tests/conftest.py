"""What every test may ask for: a database of its own, a broker, settings.

PostgreSQL is the real one, started once a run and shared by all of pytest-xdist's processes; `database` clones a
template, made by the migrations, in some 30 ms.
"""

import fcntl
import os
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest
from databases import Database
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from tunery import db, dispatch
from tunery.local import process, schema
from tunery.local.valkey import Valkey
from tunery.settings import Settings, get_settings

pytest_plugins = ("receiver", "scheduling", "seaweed")

ROOT = Path(__file__).parents[1]
DEAD_BROKER = "redis://127.0.0.1:1/0"
"""Port 1 refuses at once: for tests that must go on without a broker."""
_ADMIN = "postgres"
_TEMPLATE = "template_tunery"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _forget_process_wide_state() -> None:
    """Settings, sessions and the publisher are made once a process; a test brings an environment of its own."""
    if db.sessions.cache_info().currsize:
        db.sessions().kw["bind"].dispose()
    db.sessions.cache_clear()
    get_settings.cache_clear()
    dispatch._publisher.cache_clear()


def _run_folder(config: pytest.Config) -> Path:
    """One folder for all processes of a run, short enough for a socket's path."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID") or config.stash.setdefault(_RUN, uuid.uuid4().hex)
    folder = Path(tempfile.gettempdir()) / f"tunery-tests-{os.getuid()}-{run[:12]}"
    folder.mkdir(mode=0o711, exist_ok=True)
    return folder


_RUN = pytest.StashKey[str]()


def _address(folder: Path) -> str:
    """The running server's URL with `{database}` in it; starts the server if this process is the first to ask."""
    if (folder / "address").exists():
        return (folder / "address").read_text()
    with (folder / "keeper.log").open("wb") as log:
        keeper = subprocess.Popen(
            [sys.executable, str(ROOT / "tests/fixtures/keeper.py"), str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
    _KEEPERS.append(keeper)
    started = process.wait_until(
        (folder / "address").exists, seconds=60, alive=lambda: keeper.poll() is None, every=0.02
    )
    assert started, process.tail(folder / "keeper.log")
    return (folder / "address").read_text()


_KEEPERS: list[subprocess.Popen[bytes]] = []


@pytest.fixture(scope="session")
def postgres(pytestconfig: pytest.Config) -> Iterator[Callable[[str], str]]:
    """The run's PostgreSQL: a function from a database's name to its SQLAlchemy URL."""
    folder = _run_folder(pytestconfig)
    holders: IO[str]
    with (folder / "holders").open("a") as holders:
        fcntl.flock(holders, fcntl.LOCK_SH)
        with _locked(folder / "start"):
            address = _address(folder)
        yield lambda database: address.replace("{database}", database)
    for keeper in _KEEPERS:
        # It waits for the other test processes too; ours is the exit status only when we are the last.
        try:
            keeper.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            keeper.returncode = 0


def _execute(url: str, statement: str) -> None:
    engine = db.make_engine(url).execution_options(isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(statement))
    engine.dispose()


@pytest.fixture(scope="session")
def template(postgres: Callable[[str], str], pytestconfig: pytest.Config) -> str:
    """The name of a migrated, empty database to clone."""
    folder = _run_folder(pytestconfig)
    with _locked(folder / "migrate"):
        if not (folder / "migrated").exists():
            _execute(postgres(_ADMIN), f"DROP DATABASE IF EXISTS {_TEMPLATE}")
            _execute(postgres(_ADMIN), f"CREATE DATABASE {_TEMPLATE}")
            schema.upgrade(postgres(_TEMPLATE))
            (folder / "migrated").touch()
    return _TEMPLATE


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    """Settings under the test's own folder, in the environment too, so that child processes see the same."""
    for name in [name for name in os.environ if name.startswith("TUNERY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TUNERY_BROKER_URL", DEAD_BROKER)
    monkeypatch.setenv("TUNERY_STORAGE_URL", f"file://{tmp_path}/objects")
    monkeypatch.setenv("TUNERY_MODELS_DIR", str(tmp_path / "models"))
    monkeypatch.setenv("TUNERY_RUNS_DIR", str(tmp_path / "runs"))
    _forget_process_wide_state()
    yield get_settings()
    _forget_process_wide_state()


@pytest.fixture
def database(
    postgres: Callable[[str], str], template: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Database]:
    """A clone of the template for this test alone; `db.transaction()` and `get_settings()` use it."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    _execute(postgres(_ADMIN), f"CREATE DATABASE {name} TEMPLATE {template}")
    monkeypatch.setenv("TUNERY_DATABASE_URL", postgres(name))
    _forget_process_wide_state()
    sessions = db.sessions()
    engine: Engine = sessions.kw["bind"]
    yield Database(postgres(name), engine, sessions)
    engine.dispose()
    _forget_process_wide_state()
    _execute(postgres(_ADMIN), f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def session(database: Database) -> Iterator[Session]:
    """A session on `database` that nobody commits but the test."""
    with database.sessions() as session:
        yield session


@pytest.fixture(scope="session")
def valkey_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    """One a process: it starts in 0.1 s."""
    with Valkey(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture
def valkey(valkey_server: Valkey, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> str:
    """A broker's URL, emptied and set as TUNERY_BROKER_URL."""
    import redis

    with redis.Redis.from_url(valkey_server.url) as client:
        client.flushall()
    monkeypatch.setenv("TUNERY_BROKER_URL", valkey_server.url)
    _forget_process_wide_state()
    return valkey_server.url
