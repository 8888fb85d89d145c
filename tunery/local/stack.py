"""The embedded stack: everything Tunery needs on one machine, started in order and stopped completely.

    PostgreSQL, Valkey -> migrations -> API, I/O worker, training worker, model server

Each service is a child process in its own session, with its output in `<home>/logs/<name>.log`. While the stack runs,
`<home>/stack.json` has its addresses, by which other commands on this machine find it.
"""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx2
from sqlalchemy import func, select

from tunery import db, processes
from tunery.errors import TuneryError
from tunery.keys import auth, projects
from tunery.keys.model import Project
from tunery.local import lock, paths, schema, state, watchdog
from tunery.local.postgres import Postgres
from tunery.local.restarts import Restarts
from tunery.local.valkey import Valkey
from tunery.settings import Settings, read_settings

WITHOUT_SERVER_SECONDS = 6.0


class HomeInUse(TuneryError):
    """Another stack runs in {home} (process {pid}). Stop it (`tunery down --home {home}`) or choose another --home."""

    code = "home_in_use"


class ServiceDied(TuneryError):
    """{name} {ending}. Its log, {log}, ends with:
    {tail}"""

    code = "service_died"


class PortTaken(TuneryError):
    """Port {port} of 127.0.0.1 is in use. Stop the program that uses it, or choose another port with --port."""

    code = "port_taken"


@dataclass
class Service:
    """A child process. `seconds`: how long it may take to stop by itself, as a worker saves its run first."""

    name: str
    arguments: list[str]
    seconds: float
    log: Path
    process: subprocess.Popen[bytes] | None = None


@dataclass
class Stack:
    """A stack in `home`. `port` 0 takes free ports, so that any number of stacks run side by side.

    `environment` is added for the services; the caller's own TUNERY_* variables apply, except for addresses and paths.
    `report` is called with every completed step.
    """

    home: Path
    port: int = 8000
    environment: Mapping[str, str] = field(default_factory=dict)
    report: Callable[[str, str], None] = lambda _name, _where: None
    first_key: str | None = field(default=None, init=False)
    api_url: str = field(default="", init=False)
    _mark: str = field(default_factory=lambda: uuid.uuid4().hex, init=False)
    _services: list[Service] = field(default_factory=list, init=False)
    _open: ExitStack = field(default_factory=ExitStack, init=False)
    _server_port: int = field(default=0, init=False)
    _watcher: subprocess.Popen[bytes] | None = field(default=None, init=False)
    _restarts: Restarts = field(default_factory=Restarts, init=False)

    def __post_init__(self) -> None:
        self.home = self.home.absolute()
        self.postgres = Postgres(self.home / "postgres")
        self.valkey = Valkey(self.home / "valkey")

    def start(self) -> Self:
        """Starts everything and waits until the API is ready. Raises TuneryError; then nothing is left running."""
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def _start(self) -> None:
        root = paths.root()
        read_settings(database_url=Settings.model_fields["database_url"].default)  # the stack has its own database
        self.home.mkdir(parents=True, exist_ok=True, mode=0o711)
        self._take_home()
        self._make_private_folders()
        self._refuse_taken_port()
        self._watch_over()
        self._open.callback(self.postgres.stop)
        self.postgres.start()
        self.report("PostgreSQL", self.postgres.dsn())
        self._open.callback(self.valkey.stop)
        self.valkey.start()
        self.report("Valkey", f"127.0.0.1:{self.valkey.port}")
        schema.upgrade(self.postgres.url())
        self._choose_ports()
        self._write_state()
        self._start_services(root)
        self._wait_for_api()
        self.report("API", self.api_url)
        self.first_key = self._make_first_key()  # last, so that a failing start leaves no key that was never shown

    def stop(self) -> None:
        """Stops services, then servers, then processes that services left behind. Safe to call twice."""
        self._stop_services()
        processes.kill_marked(watchdog.MARK, self._mark)
        self._open.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def check(self) -> None:
        """Raises ServiceDied if a service or a server has ended."""
        for part in self._dead():
            raise self._death_of(part)

    def restart_dead(self) -> None:
        """Restarts what has ended, and reports it. Raises ServiceDied if it ends repeatedly.

        Call it from the thread that called `start`, as children end with the thread that spawned them.
        """
        for part in self._dead():
            if not self._restarts.allow(_name_of(part)):
                raise self._death_of(part)
            ending = _ending_of(part)
            self._restart(part)
            self.report(_name_of(part), f"{ending} and was started again")
        if self._watcher is not None and self._watcher.poll() is not None:
            self._watch_over()

    def _dead(self) -> list["Service | Postgres | Valkey"]:
        """Returns the ended parts, servers first, as services need them."""
        servers: list[Postgres | Valkey] = [self.postgres, self.valkey]
        ended = [service for service in self._services if service.process and service.process.poll() is not None]
        return [*(server for server in servers if server.pid and not server.is_running()), *ended]

    def _restart(self, part: "Service | Postgres | Valkey") -> None:
        if isinstance(part, Service):
            if part.process is not None:
                processes.stop(part.process)  # its children would keep running
            self._spawn(part, paths.root())
        else:
            part.restart()

    def _death_of(self, part: "Service | Postgres | Valkey") -> ServiceDied:
        log = part.log if isinstance(part, Service) else part.log()
        return ServiceDied(
            name=_name_of(part), ending=_ending_of(part), log=log, tail=processes.tail(log) or "(nothing)"
        )

    def settings(self) -> dict[str, str]:
        """Returns the TUNERY_* variables that make a process part of this stack."""
        return {
            "TUNERY_STOP_GRACE_SECONDS": "60",
            **{name: value for name, value in os.environ.items() if name.startswith("TUNERY_") and value},
            "TUNERY_DATABASE_URL": self.postgres.url(),
            "TUNERY_BROKER_URL": self.valkey.url,
            "TUNERY_STORAGE_URL": f"file://{self.home}/objects",
            "TUNERY_MODELS_DIR": f"{self.home}/models",
            "TUNERY_RUNS_DIR": f"{self.home}/runs",
            "TUNERY_SERVER_URL": f"http://127.0.0.1:{self._server_port}",
            **self.environment,
        }

    def _take_home(self) -> None:
        """Locks the home for this stack. The kernel releases the lock of a killed owner."""
        held = lock.take(self.home)
        if held is None:
            raise HomeInUse(home=self.home, pid=lock.owner(self.home) or "unknown")
        self._open.enter_context(held)
        self._end_predecessor()

    def _make_private_folders(self) -> None:
        """Makes folders that only the owner can read. The home is not: PostgreSQL may run there as another user."""
        for name in ("logs", "objects", "runs"):
            folder = self.home / name
            folder.mkdir(exist_ok=True)
            folder.chmod(0o700)  # also a folder made by an earlier version

    def _end_predecessor(self) -> None:
        """Ends the services of a killed owner, which hold ports and data while its watchdog stops them."""
        if left := state.read(self.home):
            processes.kill_marked(watchdog.MARK, left["mark"])

    def _refuse_taken_port(self) -> None:
        if self.port and not _is_free(self.port):
            raise PortTaken(port=self.port)

    def _choose_ports(self) -> None:
        """Chooses free ports as late as possible: they are not reserved until the service binds them."""
        self.port = self.port or processes.free_port()
        self._server_port = processes.free_port()
        self.api_url = f"http://127.0.0.1:{self.port}"

    def _watch_over(self) -> None:
        """Starts the watchdog, whose pipe closes when this process ends, however it ends."""
        self._watcher = watcher = subprocess.Popen(
            [sys.executable, "-m", "tunery.local.watchdog", self._mark],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd=paths.root(),
        )
        self._open.callback(processes.stop, watcher, (signal.SIGKILL, 5))
        if watcher.stdin is not None:
            self._open.callback(watcher.stdin.close)

    def _make_first_key(self) -> str | None:
        """Creates the first project and returns its administrator's key; None if there is a project already."""
        engine = db.make_engine(self.postgres.url())
        try:
            with db.make_sessions(engine).begin() as session:
                if session.scalar(select(func.count()).select_from(Project)):
                    return None
                project = projects.create_project(session, "default")
                return auth.create_key(session, project, "first key", admin=True)[1]
        finally:
            engine.dispose()

    def _write_state(self) -> None:
        """Writes the state file. Only its writer removes it, while it still holds the home's lock."""
        self._open.callback(state.remove, self.home)
        state.write(
            self.home,
            {
                "pid": os.getpid(),
                "mark": self._mark,
                "api_url": self.api_url,
                "database_url": self.postgres.url(),
                "storage_url": self.settings()["TUNERY_STORAGE_URL"],
                "started_at": int(time.time()),
            },
        )

    def _start_services(self, root: Path) -> None:
        logs = self.home / "logs"
        grace = float(self.settings()["TUNERY_STOP_GRACE_SECONDS"]) + 15
        level = self.settings().get("TUNERY_LOG_LEVEL", "INFO")
        for name, arguments, seconds in (
            ("api", self._api(level), 10.0),
            ("server", ["worker.server"], 10.0),
            ("worker-train", _celery("train", level), grace),
            ("worker-io", _celery("io", level), 15.0),
        ):
            service = Service(name, arguments, seconds, logs / f"{name}.log")
            self._services.append(service)
            self._spawn(service, root)

    def _spawn(self, service: Service, root: Path) -> None:
        environment = {**os.environ, **self.settings(), watchdog.MARK: self._mark, "PYTHONUNBUFFERED": "1"}
        with service.log.open("ab") as log:
            service.process = processes.spawn(
                [sys.executable, "-m", *service.arguments], output=log, cwd=root, env=environment
            )

    def _api(self, level: str) -> list[str]:
        options = ["--host", "127.0.0.1", "--port", str(self.port), "--timeout-graceful-shutdown", "3"]
        options += ["--log-level", level.lower(), "--no-access-log"]
        return ["uvicorn", "api.main:create_app", "--factory", "--http", "api.connections:Protocol", *options]

    def _wait_for_api(self) -> None:
        deadline = time.monotonic() + 120
        while not _is_healthy(self.api_url):
            self.check()
            if time.monotonic() > deadline:
                log = self.home / "logs/api.log"
                raise ServiceDied(name="api", ending="did not answer in 120 s", log=log, tail=processes.tail(log))
            time.sleep(0.1)

    def _stop_services(self) -> None:
        """Stops all services concurrently; the servers run until then.

        Without a server, services would wait for it to save the state of their work.
        """
        patience = self._patience()
        running = [service for service in self._services if service.process is not None]
        for service in running:
            if service.process is not None and service.process.poll() is None:
                service.process.terminate()
        deadline = time.monotonic()
        for service in running:
            if service.process is not None:
                with suppress(subprocess.TimeoutExpired):
                    service.process.wait(max(0.1, deadline + min(service.seconds, patience) - time.monotonic()))
                processes.stop(service.process)
        self._services.clear()

    def _patience(self) -> float:
        """Returns the maximum seconds to wait for services: few if a server has ended and is not restarted."""
        try:
            for server in (self.postgres, self.valkey):
                if self._services and server.pid and not server.is_running():
                    server.restart()
        except TuneryError:
            return WITHOUT_SERVER_SECONDS
        return float("inf")


def _name_of(part: Service | Postgres | Valkey) -> str:
    return part.name if isinstance(part, Service) else type(part).__name__


def _ending_of(part: Service | Postgres | Valkey) -> str:
    status = part.process.returncode if isinstance(part, Service) and part.process else getattr(part, "status", None)
    return "has ended" if status is None else processes.ending(status)


def _celery(queue: str, level: str) -> list[str]:
    # Prefork even for one: a busy `solo` worker cannot answer, and a slot's polling thread needs its own process.
    options = ["-Q", queue, "-P", "prefork", "-c", "1", "-n", f"{queue}@%h", "--loglevel", level.upper()]
    return ["celery", "-A", "worker.app", "worker", *options, "--without-gossip", "--without-mingle"]


def _is_free(port: int) -> bool:
    import socket

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _is_healthy(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/healthz", timeout=5, trust_env=False).status_code == httpx2.codes.OK
    except httpx2.HTTPError:
        return False
