"""A run resumed in another folder has the interrupted run's state, bit for bit, and the same losses after it.

On a CPU, and with `-m gpu` in bf16 on the fast path of a CUDA device.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from run_folders import chat, lay_out, plan
from torch.utils import _pytree

from tunery.planning import expected
from tunery.spec import Full, Lora, Qlora
from worker.trainer import checkpoints
from worker.trainer.data import MicroBatch, rows_of_step
from worker.trainer.loop import _take_step
from worker.trainer.memory import MemoryPlan
from worker.trainer.report import MessageWriter
from worker.trainer.run import prepare
from worker.trainer.stop_signal import StopSignal
from worker.trainer.training import Progress, Training

ROWS = [chat(i, words=5 + 37 * i % 40) for i in range(30)]
BROKEN_AFTER, COMPARED = 7, 20  # an epoch has 4 steps, so it breaks in the middle of the second
HAS_CUDA = torch.cuda.is_available()
DEVICES = [
    pytest.param("cpu", marks=[pytest.mark.slow, pytest.mark.skipif(HAS_CUDA, reason="a run takes the GPU")]),
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device")]),
]
TECHNIQUES = {
    "lora": Lora(r=4, dropout=0.1),
    "qlora": Qlora(r=4, dropout=0.1),
    "full": Full(),
    "full in fp32": Full(weights_dtype="float32"),
}


@pytest.mark.filterwarnings("ignore:inner dimension:UserWarning")  # the tiny model's layers are narrow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", TECHNIQUES)
def test_state_is_the_same_to_the_bit_and_so_are_the_losses(tmp_path: Path, tiny: Path, device: str, kind: str) -> None:
    """The run is shuffled and packed, has several micro-batches a step and dropout, and stops within an epoch."""
    technique: Any = TECHNIQUES[kind]
    rate = 1e-4 if isinstance(technique, Full) else 1e-3
    settled = plan(technique=technique, n_epochs=8, batch_size=8, packing=True, learning_rate=rate, max_seq_length=256)
    t, again = (
        prepare(lay_out(tmp_path / name, tiny, settled, ROWS), MessageWriter(None), StopSignal()) for name in ("a", "b")
    )
    assert t.device.type == device
    for each in (t, again):
        each.objective.train()  # without dropout, random numbers would make no difference
    _cut_small(t)
    progress = Progress()
    for _ in range(BROKEN_AFTER):
        _take_step(t, progress)
    checkpoints.save_snapshot(t, progress)
    state, drawn = _state(t), list(_drawn(t, progress.step))
    wanted = [_take_step(t, progress)[0] for _ in range(COMPARED)]
    assert max(len(parts) for parts in drawn) > 1, "no step had two micro-batches"

    resumed = checkpoints.restore(again, t.folder / "snapshots" / f"step-{BROKEN_AFTER}")

    assert resumed.step == BROKEN_AFTER
    _assert_equal(_state(again), state)
    assert list(_drawn(again, resumed.step)) == drawn
    found = [_take_step(again, resumed)[0] for _ in range(COMPARED)]
    assert [step.step for step in found] == [step.step for step in wanted]
    assert [step.tokens for step in found] == [step.tokens for step in wanted]
    exact = {} if device == "cuda" else {"rel": 0, "abs": 0}  # the order of a GPU's sums may vary
    losses = [step.train_loss for step in wanted]
    assert [step.train_loss for step in found] == pytest.approx(losses, **({"rel": 1e-3, "abs": 1e-3} | exact))
    assert _losses_differ(losses), "a loss that stands still compares nothing"


def _cut_small(t: Training) -> None:
    """Limits micro-batches to a few rows; a GPU would otherwise take all rows of a step at once."""
    tokens = min(expected.CPU_MICRO_BATCH, t.stepper.memory.max_tokens, 160)
    packed = None if t.stepper.memory.packed_tokens is None else tokens
    t.stepper.adopt(MemoryPlan(tokens, packed_tokens=packed, graphs=t.stepper.memory.graphs))


def _state(t: Training) -> dict[str, torch.Tensor]:
    """Returns copies of all that the next steps depend on: weights, the optimizer's state, the random states."""
    found = {f"weight {name}": parameter.detach() for name, parameter in t.parameters.items()}
    for name, parameter in t.parameters.items():
        leaves, _ = _pytree.tree_flatten_with_path(t.optimizer.state[parameter])
        found |= {f"optimizer {name} {path}": torch.as_tensor(leaf) for path, leaf in leaves if leaf is not None}
    found["random cpu"] = torch.get_rng_state()
    if HAS_CUDA:
        found["random cuda"] = torch.cuda.get_rng_state()
    return {name: tensor.detach().cpu().clone() for name, tensor in found.items()}


def _assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert sum(name.startswith("optimizer") for name in wanted) > 10
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def _drawn(t: Training, step: int) -> Iterator[list[MicroBatch]]:
    """Yields the micro-batches of each step after `step`."""
    for later in range(step + 1, step + 1 + COMPARED):
        yield t.stepper.micro_batches(rows_of_step(len(t.rows.examples), later, t.plan.batch_size, t.plan.seed))


def _losses_differ(losses: list[float]) -> bool:
    return max(losses) - min(losses) > 0.01


def test_snapshot_that_says_only_whether_layers_are_recomputed(tmp_path: Path, tiny: Path) -> None:
    """Plans had a yes or no before layers were counted, and no offloading."""
    t = prepare(lay_out(tmp_path / "run", tiny, plan(), ROWS), MessageWriter(None), StopSignal())
    old = {"max_tokens": 64, "packed_tokens": None, "graphs": False}
    checkpoints._take_over(t.stepper, [old | {"recompute": True}])
    assert (t.stepper.memory.recompute, t.objective.recomputes) == (2, 2)
    checkpoints._take_over(t.stepper, [old | {"recompute": False}])
    assert t.stepper.memory == MemoryPlan(64)
    checkpoints._take_over(t.stepper, [old | {"host_embedding": True}])  # of a host with less memory
    assert t.stepper.memory == MemoryPlan(64)
    assert t.objective.recomputes == 0


@pytest.mark.parametrize(("here", "then", "recorded"), [(1, 2, True), (0, 0, True), (0, 2, False)])
def test_resumed_passes_are_recorded_if_preflight_has_judged_them(
    tmp_path: Path, tiny: Path, here: int, then: int, recorded: bool
) -> None:
    """Whether recomputed layers can be recorded is found for plans with some."""
    t = prepare(lay_out(tmp_path / "run", tiny, plan(), ROWS), MessageWriter(None), StopSignal())
    t.stepper.adopt(replace(t.stepper.memory, recompute=here, graphs=True))
    checkpoints._take_over(t.stepper, [{"max_tokens": 64, "packed_tokens": None, "recompute": then}])
    assert (t.stepper.memory.recompute, t.stepper.memory.graphs) == (then, recorded)
