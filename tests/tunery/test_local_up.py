"""`tunery up` as users run it: in a process of its own, stopped in every way, and what it leaves behind."""

import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import psutil
import pytest
from sqlalchemy import text

from tunery import db, processes
from tunery.local import lock, state
from tunery.local.postgres import Postgres
from tunery.local.restarts import MOST, WITHIN_SECONDS, Restarts

TRACE = "STARTED_BY_TEST"
"""A variable that every process started by `tunery up` inherits, the servers and the watchdog too."""


@dataclass
class Up:
    """A running `tunery up`."""

    home: Path
    log: Path
    environment: dict[str, str]
    trace: str = field(default_factory=lambda: uuid.uuid4().hex)

    def start(self) -> None:
        environment = {**os.environ, "TUNERY_PRELOAD_TRAINER": "false", **self.environment, TRACE: self.trace}
        with self.log.open("wb") as log:
            self.child = subprocess.Popen(
                [*TUNERY, "up", "--home", self.home, "--port", "0", "--model", self.home / "none.gguf"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                process_group=0,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's `&` ignores it
            )

    def wait_for(self, ready: Callable[[], bool]) -> None:
        assert processes.wait_until(ready, seconds=60, alive=lambda: self.child.poll() is None), self.said()

    def said(self) -> str:
        return self.log.read_text()

    def ctrl_c(self) -> int:
        """Sends SIGINT to the whole process group, as a terminal does, and returns the exit status."""
        os.killpg(self.child.pid, signal.SIGINT)
        return self.child.wait(60)

    def left(self) -> list[psutil.Process]:
        return [other for other in psutil.process_iter() if _trace(other) == self.trace]


TUNERY = [sys.executable, "-m", "tunery.cli.main"]


def _trace(other: psutil.Process) -> str | None:
    try:
        return None if other.status() == psutil.STATUS_ZOMBIE else other.environ().get(TRACE)
    except psutil.Error:
        return None


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("home")
    (folder / "runs").mkdir(mode=0o755)  # as an earlier version left it
    yield folder
    Postgres(folder / "postgres").remove()


@contextmanager
def running(home: Path, **environment: str) -> Iterator[Up]:
    up = Up(home, home.with_suffix(".log"), environment)
    up.start()
    try:
        yield up
    finally:
        if up.child.poll() is None:
            up.child.kill()
        for other in up.left():
            other.kill()
        up.child.wait()


def _execute(url: str, statement: str) -> int:
    """Executes a statement and returns the number of its rows."""
    engine = db.make_engine(url)
    try:
        with engine.begin() as connection:
            return int(connection.execute(text(statement)).rowcount)
    finally:
        engine.dispose()


def _unpacks(home: Path) -> bool:
    """Whether the base's row exists, so that a worker is converting the base."""
    found = state.running(home)
    return found is not None and _execute(found["database_url"], "SELECT id FROM models") == 1


def _fail_base(home: Path) -> None:
    """Ends the conversion with an error, as the killed worker would have done: the other tests need no model."""
    with Postgres(home / "postgres") as server:
        assert _execute(server.url(), "UPDATE models SET status = 'error'") == 1


@pytest.mark.slow
def test_a_killed_up_takes_everything_along_and_has_shown_the_first_key(home: Path) -> None:
    with running(home) as up:
        up.wait_for(lambda: _unpacks(home))
        assert "export TUNERY_API_KEY=tnr_" in up.said()
        assert {stat.S_IMODE((home / name).stat().st_mode) for name in ("logs", "objects", "runs")} == {0o700}
        up.child.kill()
        assert processes.wait_until(lambda: not up.left(), seconds=60, alive=lambda: True), up.left()
    assert not lock.is_held(home)
    _fail_base(home)


@pytest.mark.slow
def test_a_second_up_is_refused_and_ctrl_c_of_the_first_leaves_nothing(home: Path) -> None:
    shutil.rmtree(home / "logs")
    with running(home, TUNERY_LOG_LEVEL="warning") as up:
        up.wait_for(lambda: "Tunery is up" in up.said())
        second = subprocess.run([*TUNERY, "up", "--home", home, "--port", "0"], capture_output=True, text=True)
        assert second.returncode == 1
        assert f"process {up.child.pid}" in second.stderr
        found = state.running(home)
        assert found is not None
        assert found["pid"] == up.child.pid
        assert up.ctrl_c() == 0, up.said()
        assert "Everything is stopped." in up.said()
        assert up.left() == []
    assert [log.name for log in (home / "logs").iterdir() if "INFO" in log.read_text()] == []


def _health(home: Path) -> int | None:
    found = state.running(home)
    try:
        return httpx2.get(f"{found['api_url']}/healthz", timeout=5, trust_env=False).status_code if found else None
    except httpx2.HTTPError:
        return None


PARTS = ("-D", "valkey", "api.main:create_app", "worker.server", "train@%h", "io@%h", "tunery.local.watchdog")
"""For each child of `tunery up`, a word of its command."""


def _child(up: Up, part: str) -> psutil.Process | None:
    children = psutil.Process(up.child.pid).children()
    found = [child for child in children if any(part in word for word in _command(child))]
    return found[0] if found else None


def _command(child: psutil.Process) -> list[str]:
    try:
        return [] if child.status() == psutil.STATUS_ZOMBIE else child.cmdline()
    except psutil.Error:
        return []


@pytest.mark.slow
def test_up_starts_again_what_was_killed_and_down_is_quick_without_a_server(home: Path) -> None:
    with running(home) as up:
        up.wait_for(lambda: "Tunery is up" in up.said())
        killed = {part: _child(up, part) for part in PARTS}
        for part, child in killed.items():
            assert child is not None, part
            child.kill()
        up.wait_for(lambda: all((new := _child(up, part)) and new != killed[part] for part in PARTS))
        up.wait_for(lambda: _health(home) == 200)
        for name in ("Postgres", "Valkey", "api", "server", "worker-train", "worker-io"):
            assert re.search(
                rf"{name} .*was killed by signal 9 \(the host may have run out of memory\) and was started again$",
                up.said(),
                re.MULTILINE,
            ), up.said()
        for part in ("-D", "valkey"):
            child = _child(up, part)
            assert child is not None
            child.kill()
        began = time.monotonic()
        down = subprocess.run([*TUNERY, "down", "--home", home], capture_output=True, text=True)
        assert down.returncode == 0, down.stderr
        assert time.monotonic() - began < 15
        assert up.child.wait(5) == 0
        assert up.left() == []


def test_a_part_that_ends_again_and_again_is_not_restarted_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    restarts = Restarts()
    assert [restarts.allow("api") for _ in range(MOST + 1)] == [True] * MOST + [False]
    assert restarts.allow("server")
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + WITHIN_SECONDS + 60)
    assert restarts.allow("api")
