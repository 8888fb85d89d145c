"""A run's TensorBoard event file has every measurement at its step, as read back from its records."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import other_clients
import pytest
from run_folders import chat, lay_out, plan

from tunery.spec import Evaluation
from worker.trainer import event_files
from worker.trainer.report import MessageWriter, read_lines
from worker.trainer.run import carry_out
from worker.trainer.stop_signal import StopSignal


def _events(path: Path) -> Iterator[Any]:
    """Yields the file's events. A record is a length, its checksum, the message and its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    data = path.read_bytes()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        yield Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]


def _curves(folder: Path) -> dict[str, dict[int, float]]:
    curves: dict[str, dict[int, float]] = {}
    for event in _events(folder / event_files.FOLDER / event_files.NAME):
        for value in event.summary.value:
            curves.setdefault(value.tag, {})[event.step] = value.simple_value
    return curves


def test_a_run_leaves_its_curves(tmp_path: Path, tiny: Path) -> None:
    rows = [chat(i) for i in range(16)]
    settled = plan(evaluation=Evaluation(every_steps=2, task_rows=4, max_new_tokens=8))
    folder = lay_out(tmp_path / "run", tiny, settled, rows, valid=rows[:6])
    assert carry_out(folder, MessageWriter(None), StopSignal())

    found = _curves(folder / "out")
    metrics = read_lines(folder / "out" / "metrics.jsonl")
    steps = {entry["step"]: entry for entry in metrics if entry["type"] == "step"}
    evaluations = {entry["step"]: entry for entry in metrics if entry["type"] == "evaluated"}
    for tag, name in (
        ("train/loss", "train_loss"),
        ("run/learning_rate", "learning_rate"),
        ("run/grad_norm", "grad_norm"),
    ):
        assert found[tag] == pytest.approx({step: entry[name] for step, entry in steps.items()}), tag
    assert found["full_valid/loss"] == pytest.approx({step: entry["loss"] for step, entry in evaluations.items()})
    [task] = {entry["task_metric"] for entry in evaluations.values()}
    assert found[f"task/{task}"] == pytest.approx({step: entry["task_score"] for step, entry in evaluations.items()})
    assert sorted(found["train/loss"]) == [1, 2, 3, 4]
    assert sorted(found["full_valid/loss"]) == [2, 4]
    assert [path.name for path in (folder / "out" / "tensorboard").iterdir()] == [event_files.NAME]


def test_times_are_those_of_the_steps(tmp_path: Path) -> None:
    step: dict[str, Any] = {"type": "step", "train_loss": 1.0, "train_accuracy": None, "train_metrics": {"margin": 0.5}}
    step |= {"learning_rate": 1.0, "grad_norm": 1.0, "tokens": 1, "valid_loss": None, "valid_accuracy": None}
    entries = [{**step, "step": number, "seconds": 60.0, "valid_metrics": {}} for number in (1, 2, 3)]
    event_files.write(tmp_path, entries)
    times = {
        event.step: event.wall_time for event in _events(tmp_path / "tensorboard" / event_files.NAME) if event.step
    }
    assert (times[2] - times[1], times[3] - times[2]) == (60, 60)
    curves = _curves(tmp_path)
    assert curves["train/margin"] == {1: 0.5, 2: 0.5, 3: 0.5}
    assert not {"train/accuracy", "valid/loss"} & curves.keys()


READ = """
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
found = EventAccumulator(sys.argv[1])
found.Reload()
tags = found.Tags()["scalars"]
print(json.dumps({tag: {event.step: event.value for event in found.Scalars(tag)} for tag in tags}))
"""


@pytest.mark.slow
def test_tensorboard_reads_it(tmp_path: Path) -> None:
    packages = next((other_clients.install("trackers") / "lib").glob("python*")) / "site-packages"
    step: dict[str, Any] = {"type": "step", "train_loss": 1.5, "train_accuracy": 0.5, "train_metrics": {}}
    step |= {"learning_rate": 0.25, "grad_norm": 1.0, "tokens": 1, "valid_loss": None, "valid_accuracy": None}
    entries = [{**step, "step": number, "seconds": 1.0, "valid_metrics": {}} for number in (1, 2)]
    event_files.write(tmp_path, entries)
    done = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path / event_files.FOLDER)],
        env={**os.environ, "PYTHONPATH": str(packages)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["train/loss"] == {"1": 1.5, "2": 1.5}
    assert found["run/learning_rate"] == {"1": 0.25, "2": 0.25}


@pytest.mark.slow
def test_trainer_does_not_import_it_at_its_start() -> None:
    names = "('tensorboardX', 'tensorflow')"
    code = f"import sys, json, worker.trainer.run; print(json.dumps([n for n in {names} if n in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == []
