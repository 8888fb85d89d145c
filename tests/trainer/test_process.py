"""Runs the trainer as its supervisor does: as a process with a pipe, a log, signals, an exit code and other ranks."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from run_folders import chat, lay_out, plan, steps_of
from safetensors.torch import load_file
from trainer_processes import ROOT, heard, other_ranks, spawned

from tunery.errors import Unavailable
from tunery.failures import NotFinite
from tunery.spec import Dpo, Lora, Resources
from tunery.trainer_protocol import EXIT_PAUSED, EXIT_USER_ERROR, Failed, parse
from worker.trainer.process import describe
from worker.trainer.report import MessageWriter
from worker.trainer.run import carry_out
from worker.trainer.stop_signal import StopSignal

ROWS = [chat(i) for i in range(10)]


@pytest.mark.slow
def test_preference_run_that_is_killed_goes_on_with_the_same_reference(tmp_path: Path, tiny: Path) -> None:
    """The run is killed after its first snapshots; the next process has only one of them, in a new directory."""
    pairs = [
        {"prompt": row["messages"][:1], "chosen": row["messages"][1:], "rejected": f"no {number}"}
        for number, row in enumerate(ROWS)
    ]
    settled = plan(method=Dpo(), technique=Lora(r=4, dropout=0.1), n_epochs=20, learning_rate=1e-3)
    changes: dict[str, Any] = {"public_checkpoints": 0, "snapshot_seconds": 1e-3}
    folder, again, whole = (
        lay_out(tmp_path / name, tiny, settled, pairs, pairs[:3], **changes) for name in ("run", "again", "whole")
    )
    with spawned(folder) as first:
        for message in heard(first):
            if message.type == "checkpoint_saved" and message.step > 10:
                os.killpg(first.pid, signal.SIGKILL)
                break
        assert first.wait() == -signal.SIGKILL
    newest = max((folder / "snapshots").glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    newest.rename(again / "resume")
    for rest in (again, whole):
        with spawned(rest) as process:
            said = list(heard(process))
            assert process.wait() == 0, (rest / "log").read_text()[-2000:]
        if rest == again:
            assert next(message.first_step for message in said if message.type == "started") > 10

    assert steps_of(again) == steps_of(whole)
    found, wanted = ((run / "out" / "adapter_model.safetensors").read_bytes() for run in (again, whole))
    assert found == wanted


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

    carry_out(whole, MessageWriter(None), StopSignal())
    found, wanted = (load_file(f / "out" / "adapter_model.safetensors") for f in (folder, whole))
    for name, tensor in wanted.items():  # not bit for bit: this process has another number of threads
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


@pytest.mark.slow
def test_two_ranks_killed_go_on_to_the_bit(tmp_path: Path, tiny: Path) -> None:
    """The random state of both ranks is restored, so each draws the same dropout as without the interruption."""
    technique = Lora(r=4, dropout=0.3)
    settled = plan(technique=technique, n_epochs=20, resources=Resources(gpus=2), learning_rate=1e-3)
    whole, broken = (
        lay_out(tmp_path / name, tiny, settled, ROWS, public_checkpoints=0, snapshot_seconds=1e-9)
        for name in ("whole", "broken")
    )
    with spawned(whole) as process:
        messages = heard(process)
        next(messages)
        assert len(other_ranks(process.pid)) == 1, "the second rank is not there"
        assert list(messages)[-1].type == "finished"
        assert process.wait() == 0, (whole / "log").read_text()[-3000:]
    with spawned(broken) as process:
        for message in heard(process):
            if message.type == "step" and message.step == 7:
                os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL

    with spawned(broken) as process:
        said = list(heard(process))
        assert process.wait() == 0, (broken / "log").read_text()[-3000:]

    [started] = [message for message in said if message.type == "started"]
    assert 6 <= started.first_step < started.total_steps
    exported = [(folder / "out" / "adapter_model.safetensors").read_bytes() for folder in (whole, broken)]
    assert exported[0] == exported[1]


@pytest.mark.parametrize(
    ("program", "code", "said"),
    [
        ("", 1, "Rank 1 exited with code 0"),
        ("sys.exit(75)", 1, "Rank 1 exited with code 75"),
        ("os.kill(os.getpid(), 9)", 1, "Rank 1 exited with code -9"),
        ("print(REASON); sys.exit(65)", EXIT_USER_ERROR, "Its own reason."),
    ],
    ids=["ended", "paused", "killed", "failed"],
)
def test_a_rank_that_ends_alone_ends_the_run(program: str, code: int, said: str) -> None:
    """Any exit code ends the run, because the other ranks would wait forever."""
    reason = Failed(kind="user_error", code="invalid_spec", message="Its own reason.").model_dump_json()
    child = f"import os, sys; REASON = {reason!r}; {program}"
    script = (
        "import subprocess, sys, time\n"
        "from worker.trainer import children\n"
        "from worker.trainer.report import MessageWriter\n"
        "children.GRACE = children._ECHO = 0.1\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE)\n"
        "children.Children(MessageWriter(1))._watch(child, 1)\n"
    )

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, cwd=ROOT, timeout=60)

    assert done.returncode == code, done.stderr.decode()
    [failed] = [parse(line) for line in done.stdout.splitlines()]
    assert failed.type == "failed"
    assert failed.message.startswith(said)


@pytest.mark.parametrize(
    ("own", "ending", "said"),
    [
        ("crashed", 0, "The child's reason."),
        ("crashed", 3, "The child's reason."),
        ("user_error", 0, "Rank 0's reason."),
    ],
    ids=["an echo", "an echo of one that takes long to end", "a reason"],
)
def test_rank_0_says_whose_fault_it_was(own: str, ending: int, said: str) -> None:
    """Once a rank has ended, rank 0's all-reduce fails too: the child's reason is reported, not that second error."""
    theirs = Failed(kind="gpu_oom", code="does_not_fit", message="The child's reason.").model_dump_json()
    child = f"import sys, time; print({theirs!r}, flush=True); time.sleep({ending}); sys.exit(1)"
    script = (
        "import subprocess, sys, threading\n"
        "from tunery.trainer_protocol import Failed\n"
        "from worker.trainer import children\n"
        "from worker.trainer.report import MessageWriter\n"
        "ranks = children.Children(MessageWriter(1))\n"
        "ranks._count = 1\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE)\n"
        "threading.Thread(target=ranks._watch, args=(child, 1), daemon=True).start()\n"
        f'own = Failed(kind={own!r}, code="x", message="Rank 0\'s reason.")\n'
        "sys.exit(children.exit_code(ranks.say_failed(own)))\n"
    )

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, cwd=ROOT, timeout=60)

    [failed] = [parse(line) for line in done.stdout.splitlines()]
    assert failed.type == "failed"
    assert failed.message == said, done.stderr.decode()
    assert done.returncode == (EXIT_USER_ERROR if own == "user_error" else 1)


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (ValueError("TinyForCausalLM does not support sdpa"), "user_error", "training_crashed"),
        (NotImplementedError("no kernel for it"), "user_error", "training_crashed"),
        (KeyError("layers"), "user_error", "training_crashed"),
        (RuntimeError("CUDA error: unspecified launch failure"), "crashed", "training_crashed"),
        (OSError("No space left on device"), "crashed", "training_crashed"),
        (ConnectionResetError("rank 1"), "crashed", "training_crashed"),
        (Unavailable(part="The process that renders chat templates"), "crashed", "training_crashed"),
        (torch.OutOfMemoryError("x"), "gpu_oom", "does_not_fit"),
        (NotFinite(what="The loss became nan", step=3, rate=1e-3, kept=""), "nan_loss", "nan_loss"),
    ],
)
def test_failure_that_another_attempt_would_repeat_is_not_retried(error: Exception, kind: str, code: str) -> None:
    failed = describe(error)

    assert (failed.kind, failed.code) == (kind, code)
