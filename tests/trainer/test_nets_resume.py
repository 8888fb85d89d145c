"""A resumed run has the whole state of the interrupted one."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import BaseModel
from run_folders import Ear, chat, lay_out, plan
from safetensors.torch import load_file

from tunery.spec import Lora
from worker.trainer import checkpoints
from worker.trainer.report import MessageWriter
from worker.trainer.run import carry_out, prepare
from worker.trainer.stop_signal import StopSignal

ROWS = [chat(i) for i in range(8)]
FOREIGN = [{"messages": [row["messages"][0], {"role": "assistant", "content": "ZQX JVW KYB" * 2}]} for row in ROWS[:4]]
"""Answers of letters that never occur in ROWS, so they only become less likely after a step or two."""


class BreakingOff(MessageWriter):
    """Raises ConnectionError at a step, like a lost connection."""

    def __init__(self, step: int) -> None:
        super().__init__(None)
        self.step = step

    def write(self, message: BaseModel) -> None:
        super().write(message)
        if getattr(message, "type", "") == "step" and getattr(message, "step", 0) == self.step:
            raise ConnectionError("the lights went out")


def test_best_step_of_before_the_break_becomes_the_model(tmp_path: Path, tiny: Path, ear: Ear) -> None:
    """It also works on another host, which has only the snapshot."""
    settled = plan(technique=Lora(r=4), n_epochs=4, learning_rate=5e-2, select="best")
    whole, broken, elsewhere = (
        lay_out(tmp_path / name, tiny, settled, ROWS, FOREIGN, snapshot_seconds=1e-9)
        for name in ("whole", "broken", "elsewhere")
    )
    assert carry_out(whole, MessageWriter(None), StopSignal())
    with pytest.raises(ConnectionError):
        carry_out(broken, BreakingOff(6), StopSignal())
    (broken / "snapshots" / "step-5").rename(elsewhere / "resume")

    assert carry_out(elsewhere, MessageWriter(ear.descriptor), StopSignal())

    messages = ear.messages()
    [started] = [message for message in messages if message.type == "started"]
    [finished] = [message for message in messages if message.type == "finished"]
    assert started.first_step == 6
    assert finished.step < 5, "the best step has to be one of before the break"
    name = "adapter_model.safetensors"
    assert (elsewhere / "out" / name).read_bytes() == (whole / "out" / name).read_bytes()
    kept = load_file(whole / "checkpoints" / "step-8" / name)
    assert any((tensor != kept[key]).any() for key, tensor in load_file(whole / "out" / name).items())


def test_snapshot_of_a_newer_release_or_another_base_is_left_alone(
    tmp_path: Path, tiny: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = lay_out(tmp_path / "run", tiny, plan(), ROWS, snapshot_seconds=1e-9)
    with pytest.raises(ConnectionError):
        carry_out(folder, BreakingOff(2), StopSignal())
    t = prepare(folder, MessageWriter(None), StopSignal())
    snapshot = checkpoints.find_snapshot(t)
    assert snapshot is not None

    other = replace(t, run=t.run.model_copy(update={"base_model": "another"}))
    assert checkpoints.find_snapshot(other) is None
    state = json.loads((snapshot / "state.json").read_text())
    (snapshot / "state.json").write_text(json.dumps(state | {"version": 99}))
    assert checkpoints.find_snapshot(t) is None

    assert "belongs to the base tiny" in caplog.text
    assert "made by a newer release" in caplog.text
