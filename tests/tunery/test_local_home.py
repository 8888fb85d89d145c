"""One stack per home: who holds it, who is refused, and which processes `tunery down` leaves alone."""

import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tunery import processes
from tunery.cli import stack as stack_commands
from tunery.local import demo, lock, state
from tunery.local.stack import HomeInUse, PortTaken, Stack


@pytest.fixture
def unrelated() -> Iterator[subprocess.Popen[bytes]]:
    """Yields an unrelated process that waits."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        yield child
        child.kill()


def test_a_refused_stack_leaves_the_first_ones_word_alone(tmp_path: Path) -> None:
    held = lock.take(tmp_path)
    assert held is not None
    with held:
        state.write(tmp_path, {"pid": os.getpid(), "mark": "of-the-first"})
        with pytest.raises(HomeInUse, match=rf"process {os.getpid()}\)"):
            Stack(tmp_path, port=0).start()
        assert state.running(tmp_path) == {"pid": os.getpid(), "mark": "of-the-first"}
    assert state.running(tmp_path) is None


def test_down_leaves_an_unrelated_process_with_a_killed_owners_pid_alone(
    tmp_path: Path, unrelated: subprocess.Popen[bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    state.write(tmp_path, {"pid": unrelated.pid, "mark": "of-the-killed"})
    (tmp_path / "lock").write_text(str(unrelated.pid))
    stack_commands.down(tmp_path)
    assert "No stack runs in" in capsys.readouterr().out
    assert processes.is_alive(unrelated.pid)
    assert state.running(tmp_path) is None


def test_down_ends_who_has_the_home(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = (
        "import pathlib, signal, sys; from tunery.local import lock\n"
        "held = lock.take(pathlib.Path(sys.argv[1])); print('taken', flush=True); signal.pause()"
    )
    with subprocess.Popen([sys.executable, "-c", program, tmp_path], stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"taken\n"
        stack_commands.down(tmp_path)
        assert owner.wait(10) == -signal.SIGTERM
    assert "Everything is stopped." in capsys.readouterr().out


def test_looking_at_a_home_does_not_keep_a_stack_from_it(tmp_path: Path) -> None:
    looking = (tmp_path / "lock").open("a")
    fcntl.flock(looking, fcntl.LOCK_SH)
    threading.Timer(0.1, looking.close).start()
    held = lock.take(tmp_path)
    assert held is not None
    assert lock.owner(tmp_path) == os.getpid()
    held.close()
    assert not lock.is_held(tmp_path)


def test_old_demos_are_removed_but_for_the_newest_and_those_that_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    homes = [demo.HOMES / f"demo-{number}" for number in range(4)]
    for home in homes:
        home.mkdir(parents=True)
    held = lock.take(homes[0])
    assert held is not None
    with held:
        demo._remove_old_homes(keep=1)
    assert [home.exists() for home in homes] == [True, False, False, True]


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    port = processes.free_port()
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        with pytest.raises(PortTaken, match=f"Port {port}"):
            Stack(tmp_path, port=port).start()
    assert not lock.is_held(tmp_path)


def test_an_empty_variable_is_no_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNERY_STOP_GRACE_SECONDS", "")
    monkeypatch.setenv("TUNERY_POLL_SECONDS", "3")
    settings = Stack(tmp_path).settings()
    assert (settings["TUNERY_STOP_GRACE_SECONDS"], settings["TUNERY_POLL_SECONDS"]) == ("60", "3")
