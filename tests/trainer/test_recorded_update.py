"""Tests recorded steps of the optimizer on a CPU: recorded operations stand in for CUDA graphs."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from op_recorder import OpRecorder
from run_folders import chat, lay_out, plan
from torch import Tensor, nn

from tunery.spec import Full, Lora, Technique
from worker.trainer import recorded_update
from worker.trainer.loop import _take_step
from worker.trainer.recipes.optimizers import AdamW8bit
from worker.trainer.recorded_update import RecordedUpdate
from worker.trainer.report import MessageWriter
from worker.trainer.run import prepare
from worker.trainer.stop_signal import StopSignal
from worker.trainer.training import Progress, Training


class Recorder(OpRecorder):
    """Undoes what happened while it recorded, as a CUDA graph does nothing then."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__()
        self._optimizer = optimizer

    def record(self, work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        state = [value for values in self._optimizer.state.values() for value in values.values()]
        held = [t for t in (*parameters, *(p.grad for p in parameters), *state) if isinstance(t, Tensor)]
        before = [t.detach().clone() for t in held]
        made = super().record(work)
        with torch.no_grad():
            torch._foreach_copy_(held, before)
        return made


class Refusing(Recorder):
    def record(self, work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        raise RuntimeError("operation not permitted when stream is capturing")


def training(folder: Path, base: Path, technique: Technique) -> Training:
    settled = plan(technique=technique, n_epochs=2, weight_decay=0.1)
    lay_out(folder, base, settled, [chat(i, words=2 + i % 7) for i in range(12)])
    t = prepare(folder, MessageWriter(None), StopSignal())
    t.objective.train()
    return t


def record(t: Training, kind: type[Recorder] = Recorder) -> Recorder:
    """Records the optimizer's steps of a run from now on."""
    recorder = kind(t.optimizer)
    t.stepper._recorded = RecordedUpdate(t.optimizer, recorder)
    return recorder


def learned(t: Training) -> dict[str, Tensor]:
    progress = Progress()
    while progress.step < t.total_steps:
        _take_step(t, progress)
    return {name: p.detach().clone() for name, p in t.parameters.items()}


def assert_alike(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-5)  # rates rounded to fp32


@pytest.mark.parametrize("technique", [Lora(r=4, lora_plus_ratio=4), Full()], ids=["two rates", "two decays"])
def test_recorded_steps_are_those_of_the_optimizer(tmp_path: Path, tiny: Path, technique: Technique) -> None:
    wanted = learned(training(tmp_path / "plain", tiny, technique))
    t = training(tmp_path / "recorded", tiny, technique)

    recorder = record(t)

    assert_alike(learned(t), wanted)
    assert (recorder.recorded, recorder.replayed) == (1, t.total_steps - 1)
    assert {int(state["step"]) for state in t.optimizer.state.values()} == {t.total_steps}
    assert all(isinstance(group["lr"], float) for group in t.optimizer.param_groups), "a snapshot keeps numbers"


def test_gradients_in_other_tensors_are_not_missed(tmp_path: Path, tiny: Path) -> None:
    wanted = learned(training(tmp_path / "plain", tiny, Lora(r=4)))
    t = training(tmp_path / "recorded", tiny, Lora(r=4))
    recorder, progress = record(t), Progress()

    for _ in range(3):
        _take_step(t, progress)
    t.optimizer.zero_grad(set_to_none=True)
    while progress.step < t.total_steps:
        _take_step(t, progress)

    assert recorder.recorded == 2
    assert_alike(dict(t.parameters), wanted)


def test_step_that_cannot_be_recorded_is_done_all_the_same(tmp_path: Path, tiny: Path) -> None:
    wanted = learned(training(tmp_path / "plain", tiny, Lora(r=4)))
    t = training(tmp_path / "recorded", tiny, Lora(r=4))

    record(t, Refusing)

    assert_alike(learned(t), wanted)


def test_steps_are_not_recorded_without_recorded_passes(tmp_path: Path, tiny: Path) -> None:
    t = training(tmp_path / "run", tiny, Lora(r=4))
    assert t.stepper._recorded is None

    recorder, progress = record(t), Progress()
    _take_step(t, progress)
    t.stepper.adopt(replace(t.stepper.memory, graphs=False))
    for _ in range(2):
        _take_step(t, progress)

    assert recorder.recorded == 0
    assert all(p.grad is None for p in t.parameters.values())


def test_optimizers_that_count_on_the_host_are_not_recorded() -> None:
    weight = nn.Parameter(torch.ones(4, 4))

    assert recorded_update.can_record(torch.optim.AdamW([weight], fused=True))
    assert not recorded_update.can_record(torch.optim.AdamW([weight]))
    assert not recorded_update.can_record(torch.optim.SGD([weight], fused=True))
    assert not recorded_update.can_record(AdamW8bit([{"params": [weight], "wide_moments": False}], 1e-3, paged=False))
