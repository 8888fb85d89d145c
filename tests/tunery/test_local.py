"""The embedded servers: they start, keep their data, and end with their parent, however it ends."""

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import redis
from cloned_databases import Database
from redis.backoff import NoBackoff
from redis.retry import Retry
from sqlalchemy import text

from tunery import processes
from tunery.local import postgres as postgres_module
from tunery.local.postgres import Postgres, PostgresNotStarted
from tunery.local.valkey import Valkey


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Postgres]:
    server = Postgres(tmp_path / "postgres", durable=False)
    yield server
    server.remove()


def _write_and_count(server: Postgres) -> int:
    with psycopg.connect(server.dsn()) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS seen (n int)")
        connection.execute("INSERT INTO seen VALUES (1)")
        row = connection.execute("SELECT count(*) FROM seen").fetchone()
    assert row is not None
    return int(row[0])


def test_data_survive_a_restart(server: Postgres) -> None:
    with server:
        assert _write_and_count(server) == 1
    with server:
        assert _write_and_count(server) == 2


def test_only_the_owner_reaches_the_socket_and_the_data(server: Postgres) -> None:
    with server:
        for folder in (server._sockets, server._data):
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert "unix" in _listening(server)


def _listening(server: Postgres) -> str:
    with psycopg.connect(server.dsn()) as connection:
        row = connection.execute("SHOW listen_addresses").fetchone()
    return f"tcp on {row[0]}" if row and row[0] else "unix socket only"


def test_stop_leaves_no_process_and_no_socket(server: Postgres) -> None:
    server.start()
    pid, sockets = server.pid, server._sockets
    assert pid is not None
    assert processes.is_alive(pid)
    server.stop()
    assert not processes.is_alive(pid)
    assert not sockets.exists()


@pytest.mark.slow
def test_a_start_that_was_cut_off_is_begun_again(server: Postgres) -> None:
    with server:
        data = server._data
    data.rename(data.with_suffix(".part"))  # what a killed initdb leaves: it never has the final name
    with server:
        assert _write_and_count(server) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs PostgreSQL as another user")
@pytest.mark.slow
def test_root_brings_the_programs_along_where_nobody_cannot_reach_them(
    server: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_module, "_reachable", lambda folder: False)
    with server:
        assert (server._data.parent / "programs").is_dir()
        assert _write_and_count(server) == 1


def test_a_broken_cluster_says_where_and_why(server: Postgres) -> None:
    with server:
        pass
    (server._data / "PG_VERSION").write_text("9.1\n")
    with pytest.raises(PostgresNotStarted) as caught:
        server.start()
    assert "incompatible" in str(caught.value)
    assert str(server.folder) in str(caught.value)


def test_two_brokers_do_not_collide_and_ask_for_their_password(tmp_path: Path) -> None:
    with Valkey(tmp_path / "one") as one, Valkey(tmp_path / "two") as two:
        with redis.Redis.from_url(one.url) as client, redis.Redis.from_url(two.url) as other:
            client.set("key", "1")
            assert other.get("key") is None
        with (
            redis.Redis(port=one.port, retry=Retry(NoBackoff(), 0)) as without_password,
            pytest.raises(redis.AuthenticationError),
        ):
            without_password.ping()
        pids = [one.pid, two.pid]
    assert not any(processes.is_alive(pid) for pid in pids if pid)


def test_a_killed_parent_takes_its_servers_along(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib; from tunery.local.postgres import Postgres; from tunery.local.valkey import Valkey\n"
        "home = pathlib.Path(sys.argv[1])\n"
        "server, broker = Postgres(home / 'pg', durable=False).start(), Valkey(home / 'vk').start()\n"
        "print(server.pid, broker.pid, server._data.parent, server._sockets, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        server_pid, broker_pid, *folders = parent.stdout.readline().split()
        parent.send_signal(signal.SIGKILL)
    pids = [int(server_pid), int(broker_pid)]
    assert processes.wait_until(
        lambda: not any(processes.is_alive(pid) for pid in pids), seconds=20, alive=lambda: True
    ), "they outlived their parent"
    for folder in folders:
        subprocess.run(["rm", "-rf", folder], check=True)


def test_each_test_has_a_database_of_its_own(database: Database) -> None:
    with database.engine.begin() as connection:
        connection.execute(text("INSERT INTO projects (id, name) VALUES ('proj_1', 'one')"))
        assert connection.scalar(text("SELECT count(*) FROM projects")) == 1


def test_each_test_has_a_database_of_its_own_again(database: Database) -> None:
    with database.engine.begin() as connection:
        assert connection.scalar(text("SELECT count(*) FROM projects")) == 0
