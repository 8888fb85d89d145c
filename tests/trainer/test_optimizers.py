"""The 8-bit AdamW updates many tensors at once, with the numbers of plain bitsandbytes, in resumed runs too."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from adapted import Counted
from eight_bit_steps import SHAPES, Steps, optimizer
from run_folders import chat, lay_out, plan
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from tunery.spec import Lora
from worker.trainer import checkpoints, pieces
from worker.trainer.parallel import whole
from worker.trainer.recipes import optimizers
from worker.trainer.recipes.optimizers import AdamW8bit
from worker.trainer.report import MessageWriter
from worker.trainer.run import prepare
from worker.trainer.stop_signal import StopSignal
from worker.trainer.training import Training

UPDATE = "bitsandbytes.optimizer_update_8bit_blockwise.default"
FULL_GPU = torch.OutOfMemoryError("fake: out of memory")


@pytest.fixture
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes buckets of a few of the small matrices; the large matrix has one of its own."""
    monkeypatch.setattr(optimizers, "BUCKET", 40_000)
    monkeypatch.setattr(optimizers, "SMALL", 10_000)


@pytest.mark.usefixtures("small_buckets")
def test_steps_of_buckets_are_those_of_bitsandbytes() -> None:
    made = Steps()

    made.take(5)

    made.assert_same()
    assert {state["step"] for state in made.ours.state.values()} == {5}
    # The order in which ranks gather the moments of their pieces.
    assert [*map(id, made.ours.state)] == [*map(id, made.parameters)]


def test_many_tensors_are_updated_by_few_calls() -> None:
    made = Steps()
    made.take(1)

    with Counted() as counted:
        made.ours.step()

    # Two groups' buckets, and the matrix that ends within a block.
    assert counted.of[UPDATE] == 3


def test_tensors_of_more_than_a_bucket_are_updated_by_several_calls() -> None:
    weights = [nn.Parameter(torch.zeros(2**20)) for _ in range(5)] + [nn.Parameter(torch.zeros(2**20 + 256))]
    made = AdamW8bit([{"params": weights, "wide_moments": False}], 1e-3, paged=False)
    for weight in weights:
        weight.grad = torch.ones_like(weight)

    with Counted() as counted:
        made.step()

    assert counted.of[UPDATE] == 3  # four of them, the fifth, the larger one
    assert made._room_for_copies(list(made._runs(weights))[:1]).nbytes == 32 * 2**20


@pytest.mark.usefixtures("small_buckets")
def test_parameters_without_a_gradient_do_not_move_those_of_others() -> None:
    """The first parameter, one within a bucket, and a whole bucket have none in some steps."""
    made = Steps()
    made.take(2, without=[0, 4, *range(43, 52)])
    places = {name: made.ours.state[made.parameters[1]][name].data_ptr() for name in ("state1", "absmax2")}
    made.take(2)
    made.take(1, without=[4, 30])
    made.take(2)

    made.assert_same()
    assert made.ours.state[made.parameters[4]]["step"] == 4
    assert places == {name: made.ours.state[made.parameters[1]][name].data_ptr() for name in places}


def test_piece_without_rows_is_left_out() -> None:
    piece = pieces.mark(nn.Parameter(torch.zeros(0, 256)), pieces.cut((64, 256), 2, 2))
    weight = nn.Parameter(torch.zeros(64, 256))
    made = AdamW8bit([{"params": [piece, weight], "wide_moments": False}], 1e-3, paged=False)
    piece.grad, weight.grad = torch.zeros_like(piece), torch.ones_like(weight)

    made.step()

    assert made.state[piece]["step"] == 0
    assert weight.detach().unique().tolist() == [pytest.approx(-1e-3)]


def saved(state: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Returns an optimizer's state as it comes back from a snapshot's files."""
    numbers, tensors = checkpoints._flatten({str(index): values for index, values in state.items()})
    content = save({name: whole(tensor) for name, tensor in tensors.items()})
    assert len(content) < 1.1 * sum(tensor.nbytes for tensor in tensors.values()) + 200 * len(tensors)
    return {int(i): s for i, s in checkpoints._unflatten(json.loads(json.dumps(numbers)), load(content)).items()}


@pytest.mark.usefixtures("small_buckets")
@pytest.mark.parametrize("in_files", [True, False])
def test_resumed_optimizer_continues_to_the_bit(in_files: bool) -> None:
    made = Steps()
    made.take(3, without=[4])

    stored = made.ours.state_dict()
    made.ours = optimizer(made.groups)
    made.ours.load_state_dict(stored | {"state": saved(stored["state"])} if in_files else stored)
    made.take(3)

    made.assert_same()


@pytest.mark.usefixtures("small_buckets")
def test_state_of_an_earlier_release_continues_to_the_bit() -> None:
    """Earlier releases stepped each tensor by bitsandbytes' own method."""
    made = Steps()
    made.take(3)
    stored = made.ours.state_dict()
    old = stored["state"] | made.plain.state_dict()["state"]

    made.ours.load_state_dict(stored | {"state": saved(old)})
    made.take(3)

    made.assert_same()


def test_moments_are_freed_with_the_states() -> None:
    """An export needs the memory."""
    made = Steps()
    made.take(1)
    storages = [StorageWeakRef(state["state1"].untyped_storage()) for state in made.ours.state.values()]
    assert len({storage.cdata for storage in storages}) < len(storages) - len(SHAPES)

    made.ours.state.clear()

    assert all(storage.expired() for storage in storages)


def training(folder: Path, base: Path) -> Training:
    settled = plan(technique=Lora(r=64, alpha=8), optimizer="adamw_8bit", weight_decay=0.1)
    return prepare(lay_out(folder, base, settled, [chat(0)]), MessageWriter(None), StopSignal())


def failing(usual: Callable[..., Any], at: int) -> Callable[..., Any]:
    """Returns `usual` with an out-of-memory error at one call, counted from 1."""
    calls = itertools.count(1)

    def called(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == at:
            raise FULL_GPU
        return usual(*args, **kwargs)

    return called


def update(t: Training, step: int) -> dict[str, Tensor]:
    """Takes a step on gradients of random numbers; returns the weights."""
    drawn = torch.Generator().manual_seed(step)
    for parameter in t.parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=drawn)
    t.stepper.update(step, 1e-2)
    return {name: parameter.detach().clone() for name, parameter in t.parameters.items()}


def test_step_without_memory_for_its_copies_is_taken_again(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_run, t = (training(tmp_path / name, tiny) for name in ("whole", "short"))
    update(whole_run, 1)
    wanted = update(whole_run, 2)
    update(t, 1)
    monkeypatch.setattr(optimizers.AdamW8bit, "_room_for_copies", failing(AdamW8bit._room_for_copies, 1))

    found = update(t, 2)

    assert all(torch.equal(found[name], weight) for name, weight in wanted.items())
    assert {state["step"] for state in t.optimizer.state.values()} == {2}


@pytest.mark.parametrize("at", [1, 2])
def test_step_that_fails_in_a_bucket_is_not_taken_again(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """The bucket's moments may have changed, and those of the ones before have."""
    monkeypatch.setattr(optimizers, "BUCKET", 10_000)
    t = training(tmp_path / "run", tiny)
    update(t, 1)
    name = "optimizer_update_8bit_blockwise"
    monkeypatch.setattr(bitsandbytes.functional, name, failing(getattr(bitsandbytes.functional, name), at))

    with pytest.raises(RuntimeError, match="in the middle of the optimizer's step 2"):
        update(t, 2)


def test_moments_that_cannot_be_joined_are_joined_by_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """No state has its part of one joined tensor while another kind of moment has none."""
    made = Steps()
    made.take(1)
    made.ours.load_state_dict(made.ours.state_dict() | {"state": saved(made.ours.state_dict()["state"])})
    cat = torch.cat
    monkeypatch.setattr(torch, "cat", failing(cat, 2))
    with pytest.raises(torch.OutOfMemoryError):
        made.ours.step()
    monkeypatch.setattr(torch, "cat", cat)

    assert {state["step"] for state in made.ours.state.values()} == {1}
    made.take(1)

    made.assert_same()
