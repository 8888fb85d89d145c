"""The trainer as its supervisor runs it: a process with a pipe, a log, signals, an exit code and sister ranks."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from run_folders import chat, lay_out, plan
from safetensors.torch import load_file

from tunery.spec import Evaluation, Lora, Resources
from tunery.wire import EXIT_PAUSED, EXIT_USER_ERROR, Spoken, parse
from worker.trainer.report import Voice
from worker.trainer.run import carry_out
from worker.trainer.wish import Wish

ROWS = [chat(i) for i in range(10)]


@contextmanager
def spawned(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The trainer on `folder` in a session of its own; its log in `folder/log`. Nothing of it is left afterwards."""
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen(
            [sys.executable, "-m", "worker.trainer", str(folder)],
            stdout=subprocess.PIPE,
            stderr=log,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        ) as process,
    ):
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def heard(process: subprocess.Popen[bytes]) -> Iterator[Spoken]:
    assert process.stdout is not None
    yield from (parse(line) for line in process.stdout)


@pytest.mark.slow
def test_stopped_process_saves_and_the_next_one_goes_on(tmp_path: Path, tiny: Path) -> None:
    settled = plan(technique=Lora(r=4, dropout=0.1), n_epochs=40, learning_rate=1e-3)
    folder, whole = (lay_out(tmp_path / name, tiny, settled, ROWS, public_checkpoints=0) for name in ("run", "whole"))
    said = []
    with spawned(folder) as first:
        for message in heard(first):
            said.append(message)
            if message.type == "step" and message.step == 5:
                first.send_signal(signal.SIGTERM)
        assert first.wait() == EXIT_PAUSED
    paused = said[-1]
    assert paused.type == "paused"
    assert 5 <= paused.step < 120

    with spawned(folder) as second:
        said = list(heard(second))
        assert second.wait() == 0
    [started] = [message for message in said if message.type == "started"]
    assert started.first_step == paused.step + 1
    assert said[-1].type == "finished"
    assert "trainable params: " in (folder / "log").read_text()

    carry_out(whole, Voice(None), Wish())
    found, wanted = (load_file(f / "out" / "adapter_model.safetensors") for f in (folder, whole))
    for name, tensor in wanted.items():  # not to the bit: this process has another number of threads
        assert (found[name] - tensor).abs().max() < 1e-4, name


@pytest.mark.slow
def test_rows_at_fault_are_told_with_their_line(tmp_path: Path, tiny: Path) -> None:
    folder = lay_out(tmp_path / "run", tiny, plan(), ROWS)
    with (folder / "data" / "train.jsonl").open("a") as file:
        file.write('{"messages": [{"role": "person", "content": "hi"}]}\n')

    with spawned(folder) as process:
        failed = list(heard(process))[-1]
        assert process.wait() == EXIT_USER_ERROR

    assert failed.type == "failed"
    assert (failed.kind, failed.code) == ("user_error", "invalid_training_file")
    assert "Example 11" in failed.message


def test_two_ranks_learn_what_one_does(tmp_path: Path, tiny: Path) -> None:
    """Rows of unlike length, and a last step that leaves the second rank without any."""
    rows = [chat(i, words=2 + i % 9) for i in range(9)]
    evaluation = Evaluation(test_file="file-test", max_new_tokens=6)
    alone, both = (
        lay_out(
            tmp_path / str(n), tiny, plan(resources=Resources(gpus=n), evaluation=evaluation), rows, rows[:3], rows[:3]
        )
        for n in (1, 2)
    )
    carry_out(alone, voice := Voice(None), Wish())

    with spawned(both) as process:
        messages = heard(process)
        said = [next(messages)]
        assert len(_children(process.pid)) == 1, "the second rank is not there"
        said += messages
        assert process.wait() == 0, (both / "log").read_text()[-3000:]

    for kind, field in (("step", "train_loss"), ("step", "grad_norm"), ("evaluated", "loss")):
        found = [getattr(message, field) for message in said if message.type == kind]
        wanted = [entry[field] for entry in voice.metrics if entry["type"] == kind]
        assert found == pytest.approx(wanted, rel=1e-3), field
    answers = [(folder / "out" / "answers.jsonl").read_text() for folder in (alone, both)]
    assert answers[0] == answers[1]
    exported, wanted = (load_file(f / "out" / "adapter_model.safetensors") for f in (both, alone))
    for name, tensor in wanted.items():
        assert (exported[name] - tensor).abs().max() < 1e-3, name


@pytest.mark.slow
def test_one_dead_rank_ends_them_all(tmp_path: Path, tiny: Path) -> None:
    """A rank that dies would leave the others waiting for it in a sum forever."""
    folder = lay_out(tmp_path / "run", tiny, plan(n_epochs=50, resources=Resources(gpus=2)), ROWS, public_checkpoints=0)
    said = []
    with spawned(folder) as process:
        for message in heard(process):
            said.append(message)
            if message.type == "step" and message.step == 3:
                [sister] = _children(process.pid)
                os.kill(sister, signal.SIGKILL)
        assert process.wait() == 1

    assert said[-1].type == "failed"
    assert "Rank 1" in said[-1].message


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
