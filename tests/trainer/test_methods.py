"""The contract of methods, with pairs as examples: an example's rows stay together, and a step divides sums once."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_methods
from run_folders import WORDS, Ear, chat, lay_out, plan, said, steps_of
from torch.nn import functional

from tunery import spec
from tunery.errors import Unsupported
from tunery.rows import encoding
from worker.trainer import cuda_graphs, data, validation
from worker.trainer.data import IGNORED, Example, Row, collate, micro_batches
from worker.trainer.loop import _take_step
from worker.trainer.memory import MemoryPlan
from worker.trainer.objective import Objective
from worker.trainer.process import carry_out_and_report
from worker.trainer.report import MessageWriter
from worker.trainer.run import prepare
from worker.trainer.stop_signal import StopSignal
from worker.trainer.training import Progress, Training

CPU = torch.device("cpu")
PAIR = Example((Row([5, 6, 7], [IGNORED, 6, 7]), Row([5, 8], [5, 8])))
OTHER = Example((Row([9, 4], [9, 4]), Row([9, 3, 2, 1], [9, 3, IGNORED, 1])))


@pytest.fixture(autouse=True)
def _pairwise() -> Iterator[None]:
    with toy_methods.pairwise():
        yield


def pair(seed: int) -> dict[str, Any]:
    row = chat(seed, words=2 + seed % 6)
    wanted = row["messages"][-1]["content"]
    return {**row, "other": WORDS[(WORDS.index(wanted) + 1 + seed % 3) % len(WORDS)] + " alpha" * (seed % 2)}


PAIRS = [pair(i) for i in range(10)]


def training(folder: Path, base: Path, **changes: Any) -> Training:
    method = importlib.import_module("toy_pairwise.rows").Pairwise(margin=0.5)
    lay_out(folder, base, plan(method=method, **changes), PAIRS, PAIRS[:3])
    return prepare(folder, MessageWriter(None), StopSignal())


def plain_loss(t: Training, examples: list[Example]) -> torch.Tensor:
    """Returns the mean loss over pairs, from the model's logits of one row at a time."""
    losses = []
    for example in examples:
        sums = [
            functional.cross_entropy(
                t.objective.causal(input_ids=torch.tensor([row.input_ids])).logits[0, :-1],
                torch.tensor(row.labels[1:]),
                reduction="sum",
            )
            for row in example.rows
        ]
        losses.append(functional.softplus(0.5 - (sums[1] - sums[0])))
    return torch.stack(losses).mean()


def test_rows_of_an_example_are_sequences_of_their_own() -> None:
    batch = collate([PAIR, OTHER], [[0], [1]], CPU)

    assert batch.input_ids.tolist() == [[5, 6, 7, 0], [5, 8, 0, 0], [9, 4, 0, 0], [9, 3, 2, 1]]
    assert batch.position_ids is None
    assert batch.targets.tolist() == [6, 7, 8, 4, 3, 1]
    assert batch.labelled == (2, 1, 1, 2)


def test_packed_examples_keep_their_rows_behind_each_other() -> None:
    batch = collate([PAIR, OTHER], [[1, 0]], CPU, (1, 4))

    assert batch.input_ids.tolist() == [[9, 4, 9, 3, 2, 1, 5, 6, 7, 5, 8]]
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[0, 1, 0, 1, 2, 3, 0, 1, 2, 0, 1]]
    assert batch.labelled == (1, 2, 2, 1)
    assert batch.targets.tolist() == [4, 3, 1, 6, 7, 8, IGNORED, IGNORED]


@pytest.mark.parametrize("packed_tokens", [None, 60])
def test_micro_batches_of_pairs_keep_to_the_budget_with_their_padding(packed_tokens: int | None) -> None:
    shapes = [(2, 20), (2, 35), (2, 5), (2, 20), (2, 30), (2, 80)]
    lengths = [40, 45, 8, 25, 60, 90]

    parts = micro_batches(list(range(6)), lengths, 120, packed_tokens=packed_tokens, shapes=shapes)

    assert sorted(i for part in parts for packed in part for i in packed) == list(range(6))
    assert any(len(part) > 1 for part in parts)
    for part in parts:
        found = [shapes[packed[0]] if len(packed) == 1 else (1, sum(lengths[i] for i in packed)) for packed in part]
        assert len(part) == 1 or sum(rows for rows, _ in found) * max(width for _, width in found) <= 120


@pytest.mark.parametrize("changes", [{}, {"packing": True}], ids=["padded", "packed"])
@pytest.mark.parametrize("max_tokens", [10_000, 100, 1])
def test_step_is_the_mean_over_its_pairs(tmp_path: Path, tiny: Path, max_tokens: int, changes: dict[str, Any]) -> None:
    t = training(tmp_path / "run", tiny, batch_size=4, learning_rate=1e-9, max_grad_norm=1e9, **changes)
    packed = min(max_tokens, 60) if changes else None
    t.stepper.memory = MemoryPlan(max_tokens, packed_tokens=packed)
    progress = Progress()
    for step, pairs in ((1, 4), (2, 4), (3, 2)):  # the last step is short
        message, *_ = _take_step(t, progress)

        drawn = [t.rows.examples[i] for i in data.rows_of_step(10, step, 4, t.plan.seed)]
        wanted = plain_loss(t, drawn)
        gradients = torch.autograd.grad(wanted, list(t.parameters.values()), allow_unused=True)
        norm = torch.nn.utils.get_total_norm([g for g in gradients if g is not None])
        assert len(drawn) == pairs
        assert message.train_loss == pytest.approx(wanted.item(), rel=1e-5)
        assert message.grad_norm == pytest.approx(norm.item(), rel=1e-4)
        assert message.train_accuracy in [correct / pairs for correct in range(pairs + 1)]
    assert progress.tokens == t.rows.tokens


def test_validation_loss_is_the_mean_over_its_pairs(tmp_path: Path, tiny: Path) -> None:
    t = training(tmp_path / "run", tiny)
    assert t.valid is not None

    with torch.no_grad():
        wanted = plain_loss(t, t.valid.examples)

    assert validation.loss(t.stepper, t.valid.examples).loss == pytest.approx(wanted.item(), rel=1e-5)


def test_textbook_logits_give_the_same_row_losses(tmp_path: Path, tiny: Path) -> None:
    t = training(tmp_path / "run", tiny)
    batch = collate(t.rows.examples, [[0], [1], [2]], CPU, (1, 16))

    found = []
    for t.objective.chunked in (True, False):
        losses = t.objective.row_losses(batch)
        found.append((losses, torch.autograd.grad(losses.prod(), list(t.parameters.values()), allow_unused=True)))

    assert len(found[0][0]) == 6
    torch.testing.assert_close(*[losses for losses, _ in found])
    for one, other in zip(*[gradients for _, gradients in found], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_row_losses_leave_the_padding_out(tmp_path: Path, tiny: Path) -> None:
    t = training(tmp_path / "run", tiny)

    with torch.no_grad():
        padded, plain = (
            t.objective.row_losses(collate(t.rows.examples, [[0], [1]], CPU, pad_to)) for pad_to in ((1, 16), (1, 1))
        )

    torch.testing.assert_close(padded, plain)


def test_method_that_looks_at_its_batch_is_not_recorded(tmp_path: Path, tiny: Path) -> None:
    t = training(tmp_path / "run", tiny)

    assert cuda_graphs.reason_against(t.objective, 100) == "the method's passes differ from batch to batch"
    assert cuda_graphs.reason_against(Objective(t.objective.model), 100) == "not on a GPU"


def test_test_rows_are_chats_whatever_the_method() -> None:
    method = importlib.import_module("toy_pairwise.rows").Pairwise()
    kinds = [encoding.find_encoder(method, role) is encoding.CHATS for role in ("training", "validation", "test")]

    assert kinds == [False, False, True]


def test_run_of_a_plug_ins_method_learns(tmp_path: Path, tiny: Path, ear: Ear) -> None:
    method = importlib.import_module("toy_pairwise.rows").Pairwise()
    folder = lay_out(tmp_path / "run", tiny, plan(method=method, n_epochs=4), PAIRS)

    assert carry_out_and_report(folder, ear.descriptor, StopSignal()) == 0

    steps = steps_of(folder)
    assert [said(ear, "started")[0].examples, len(steps)] == [10, 12]
    assert steps[-1]["train_loss"] < 0.7 * steps[0]["train_loss"]


def test_method_that_no_plug_in_brought_is_refused_by_name(
    tmp_path: Path, tiny: Path, ear: Ear, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = importlib.import_module("toy_pairwise.rows").Pairwise()
    folder = lay_out(tmp_path / "run", tiny, plan(method=method), PAIRS)
    monkeypatch.delitem(spec.METHODS, "pairwise")

    assert carry_out_and_report(folder, ear.descriptor, StopSignal()) != 0

    assert "Method 'pairwise' is not supported" in said(ear, "failed")[0].message
    with pytest.raises(Unsupported):
        spec.find_method("pairwise")
