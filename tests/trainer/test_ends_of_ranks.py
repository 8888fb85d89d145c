"""Once one rank of a run ends, for any reason, all of them end within 30 seconds and leave no process behind.

Two ranks on a CPU over gloo, with a replicated and a sharded model.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
from run_folders import chat, lay_out, plan
from trainer_processes import ROOT, heard, left_of, other_ranks, spawned

from tunery.spec import Full, Resources
from tunery.trainer_protocol import EXIT_PAUSED, Spoken

Sharding = Literal["replicate", "full_shard"]
ROWS = [chat(i) for i in range(10)]
LIMIT = 30.0
"""Longest time, in seconds, from a run's last step, in which one rank ends, to the end of the last process."""
both = pytest.mark.parametrize("sharding", ["replicate", "full_shard"])


def _lay_out(folder: Path, base: Path, sharding: Sharding) -> Path:
    settled = plan(technique=Full(), n_epochs=500, resources=Resources(gpus=2, sharding=sharding))
    return lay_out(folder / "run", base, settled, ROWS, public_checkpoints=0)


def _listen(process: subprocess.Popen[bytes], then: Callable[[list[int]], None]) -> tuple[list[Spoken], float]:
    """Returns the run's messages and the time of its last step. After step 3, calls `then` with the ranks' pids."""
    said, at = [], 0.0
    for message in heard(process):
        said.append(message)
        if message.type == "step":
            at = time.monotonic()
            if message.step == 3:
                then([process.pid, *other_ranks(process.pid)])
    return said, at


def _check_ended(process: subprocess.Popen[bytes], at: float) -> None:
    """Asserts that all processes of a run have ended within 30 seconds after `at`."""
    assert left_of(process.pid, at + LIMIT - time.monotonic()) == []
    assert time.monotonic() - at < LIMIT


@pytest.mark.slow
@both
@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_stop_together(tmp_path: Path, tiny: Path, sharding: Sharding, rank: int) -> None:
    """A pause and a stopped worker send SIGTERM to rank 0; on any other rank the signal also stops all."""
    folder = _lay_out(tmp_path, tiny, sharding)

    with spawned(folder) as process:
        said, at = _listen(process, lambda ranks: os.kill(ranks[rank], signal.SIGTERM))

        _check_ended(process, at)
        assert process.wait() == EXIT_PAUSED, (folder / "log").read_text()[-3000:]
    assert said[-1].type == "paused"
    assert said[-1].path is not None
    assert (folder / said[-1].path / "state.json").exists()


@pytest.mark.slow
@both
def test_one_dead_rank_ends_them_all(tmp_path: Path, tiny: Path, sharding: Sharding) -> None:
    """Otherwise the others would wait forever for the dead rank, in an all-reduce or a forward pass."""
    folder = _lay_out(tmp_path, tiny, sharding)

    with spawned(folder) as process:
        said, at = _listen(process, lambda ranks: os.kill(ranks[1], signal.SIGKILL))

        _check_ended(process, at)
        assert process.wait() == 1
    assert said[-1].type == "failed"
    assert "Rank 1" in said[-1].message


@pytest.mark.slow
@both
def test_death_of_the_first_rank_ends_them_all(tmp_path: Path, tiny: Path, sharding: Sharding) -> None:
    folder = _lay_out(tmp_path, tiny, sharding)

    with spawned(folder) as process:
        _, at = _listen(process, lambda ranks: os.kill(ranks[0], signal.SIGKILL))

        _check_ended(process, at)
        assert process.wait() == -signal.SIGKILL


@pytest.mark.slow
@both
@pytest.mark.parametrize("rank", [0, 1])
def test_error_of_one_rank_ends_them_all(tmp_path: Path, tiny: Path, sharding: Sharding, rank: int) -> None:
    folder = _lay_out(tmp_path, tiny, sharding)

    with spawned(folder, **_faults(f"{rank}:fail")) as process:
        said, at = _listen(process, lambda _: None)

        _check_ended(process, at)
        assert process.wait() == 1
    assert said[-1].type == "failed"
    assert "the device of this rank is gone" in said[-1].message, "whose error it was"


@pytest.mark.slow
def test_rank_that_notices_nothing_is_ended_with_a_dead_one(tmp_path: Path, tiny: Path) -> None:
    """A rank that exports or waits for a GPU gets no error when another rank dies."""
    folder = _lay_out(tmp_path, tiny, "replicate")

    with spawned(folder, **_faults("0:wait,1:die")) as process:
        said, at = _listen(process, lambda _: None)

        _check_ended(process, at)
        assert process.wait() == 1
    assert said[-1].type == "failed"
    assert "Rank 1 exited with code -9" in said[-1].message


@pytest.mark.slow
@pytest.mark.parametrize("when", ["it imports", "it has its run"])
def test_rank_that_is_still_starting_ends_with_the_first(tmp_path: Path, tiny: Path, when: str) -> None:
    """Otherwise it would wait for the first rank until the timeout of the process group, which is hours."""
    folder = _lay_out(tmp_path, tiny, "replicate")

    with spawned(folder) as process:
        while not other_ranks(process.pid):
            time.sleep(0.05)
        if when == "it has its run":
            next(heard(process))
        os.kill(process.pid, signal.SIGKILL)

        assert left_of(process.pid, LIMIT) == []


def _faults(named: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT / "tests" / "fixtures"), os.environ.get("PYTHONPATH", "")])
    return {"TUNERY_PLUGINS": "rank_faults", "RANK_FAULTS": named, "PYTHONPATH": path}


@pytest.mark.slow
@pytest.mark.parametrize(("gpus", "dies"), [(2, False), (1, False), (2, True)], ids=["two", "one", "one has died"])
def test_ranks_that_wait_take_the_run_or_end(tmp_path: Path, tiny: Path, gpus: Literal[1, 2], dies: bool) -> None:
    """A process that waits for a run on two devices has a second rank that waits too."""
    settled = plan(n_epochs=1, resources=Resources(gpus=gpus))
    folder = lay_out(tmp_path / "run", tiny, settled, ROWS, public_checkpoints=0)

    with spawned(folder, waits=True, CUDA_VISIBLE_DEVICES="0,1") as process:
        while not (waiting := other_ranks(process.pid)):
            time.sleep(0.05)
        if dies:
            os.kill(waiting[0], signal.SIGKILL)
        assert process.stdin is not None
        with process.stdin as pipe:
            pipe.write(os.fsencode(folder) + b"\n")
        said, ranks = [], []
        for message in heard(process):
            said.append(message)
            ranks.append(other_ranks(process.pid))

    assert said[-1].type == "finished"
    assert process.returncode == 0
    assert len(waiting) == 1
    assert len(ranks[0]) == gpus - 1
    assert (ranks[0] == waiting) == (gpus == 2 and not dies)
    assert left_of(process.pid, LIMIT) == []
