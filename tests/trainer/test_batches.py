"""Tests the batches of a run and the sums of their losses: order, micro-batches, packing, accumulation."""

import random
from collections.abc import Hashable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from run_folders import chat, lay_out, plan

from tunery.spec import Full
from worker.trainer import cuda_graphs, data, packing, rope, validation
from worker.trainer.data import IGNORED, Row, collate, micro_batches, share, singles
from worker.trainer.loop import _take_step
from worker.trainer.memory import MemoryPlan
from worker.trainer.report import MessageWriter
from worker.trainer.run import prepare
from worker.trainer.stepper import Stepper
from worker.trainer.stop_signal import StopSignal
from worker.trainer.training import Progress, Training

CPU = torch.device("cpu")


def training(folder: Path, base: Path, rows: list[dict[str, Any]], **changes: Any) -> Training:
    lay_out(folder, base, plan(**changes), rows)
    return prepare(folder, MessageWriter(None), StopSignal())


def test_every_epoch_sees_each_row_once_in_an_order_of_its_own() -> None:
    epochs = [
        [i for step in range(first, first + 3) for i in data.rows_of_step(10, step, 4, seed=1)] for first in (1, 4)
    ]

    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 2
    assert epochs[0] != epochs[1]
    assert epochs[0] == data.order(10, 1, 0)
    assert data.order(10, 1, 0) is data.order(10, 1, 0), "a large file is not shuffled again for every step"


def test_micro_batches_keep_to_the_budget_and_lose_nothing() -> None:
    lengths = [5, 90, 30, 31, 8, 7, 60, 300]

    parts = micro_batches(list(range(8)), lengths, 128)

    assert sorted(i for part in parts for [i] in part) == list(range(8))
    for part in parts:
        assert len(part) == 1 or len(part) * max(lengths[i] for [i] in part) <= 128


@pytest.mark.parametrize("seed", range(50))
def test_share_of_a_rank_fits_its_memory_plan(seed: int) -> None:
    lengths, ranks = _lengths(seed, 12), 1 + seed % 4
    shares = share(list(range(len(lengths))), lengths, ranks)

    assert sorted(i for rows in shares for i in rows) == list(range(len(lengths)))
    longest = sorted(lengths, reverse=True)[: -(-len(lengths) // ranks)]
    assert max(sum(lengths[i] for i in rows) for rows in shares) <= sum(longest)


@pytest.mark.parametrize("seed", range(50))
def test_ranks_have_nearly_the_same_tokens(seed: int) -> None:
    lengths = _lengths(seed, 8)
    shares = share(list(range(len(lengths))), lengths, 2)

    ways = product((0, 1), repeat=len(lengths))
    best = min(max(_tokens(way, lengths, rank) for rank in (0, 1)) for way in ways)
    assert max(sum(lengths[i] for i in rows) for rows in shares) <= 7 / 6 * best


def _lengths(seed: int, most: int) -> list[int]:
    """Returns up to `most` lengths, short ones and long ones."""
    numbers = random.Random(seed)
    return [numbers.randint(*numbers.choice(((1, 300), (1500, 2048)))) for _ in range(numbers.randint(0, most))]


def _tokens(way: Sequence[int], lengths: list[int], rank: int) -> int:
    return sum(length for at, length in zip(way, lengths, strict=True) if at == rank)


def test_share_goes_by_tokens_and_not_by_rows() -> None:
    assert share([0, 1, 2, 3], [10, 90, 20, 30], 2) == [[1], [3, 2, 0]]
    assert share([2, 1], [5, 5, 5], 1) == [[2, 1]]


def test_collate_predicts_each_label_from_the_token_before_it() -> None:
    rows = singles([Row([5, 6, 7], [IGNORED, 6, 7]), Row([8, 9], [8, 9])])

    batch = collate(rows, [[0], [1]], CPU)

    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch.label_positions.tolist() == [0, 1, 3]  # the first token of a row has no token before it
    assert batch.targets.tolist() == [6, 7, 9]
    assert batch.tokens == 5


def test_collate_never_predicts_across_packed_rows() -> None:
    rows = singles([Row([5, 6, 7], [IGNORED, 6, 7]), Row([8, 9], [8, 9])])

    batch = collate(rows, [[0, 1]], CPU)

    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9]]
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert batch.label_positions.tolist() == [0, 1, 3]


def test_packing_fills_sequences_and_loses_no_row() -> None:
    lengths = torch.randint(3, 60, (200,), generator=torch.Generator().manual_seed(0)).tolist()

    packed = data.pack(list(range(200)), lengths, 128)

    assert sorted(i for sequence in packed for i in sequence) == list(range(200))
    assert max(sum(lengths[i] for i in sequence) for sequence in packed) <= 128
    assert len(packed) <= 1.05 * sum(lengths) / 128 + 1


def test_row_longer_than_a_sequence_stands_alone() -> None:
    assert data.pack([0, 1], [200, 10], 128) == [[0], [1]]


def test_packed_loss_is_the_sum_of_the_rows_losses(tmp_path: Path, tiny: Path) -> None:
    t = training(tmp_path / "run", tiny, [chat(i) for i in range(5)])
    rows = t.rows.examples

    alone = sum(float(t.objective(collate(rows, [[i]], CPU), 1.0)[0].detach()) for i in range(5))
    packed = float(t.objective(collate(rows, [[0, 1, 2], [3, 4]], CPU), 1.0)[0].detach())

    assert packed == pytest.approx(alone, rel=1e-5)
    assert packing.keeps_rows_apart(t.objective, t.rows.rows, CPU)


@pytest.mark.parametrize("max_tokens", [10_000, 150], ids=["one micro-batch", "several"])
def test_packing_changes_no_step(tmp_path: Path, tiny: Path, max_tokens: int) -> None:
    """A step draws the same rows with and without packing, because rows are packed after they are drawn."""
    rows = [chat(i, words=2 + i % 9) for i in range(10)]
    found, cut = [], []
    for packing_asked in (False, True):
        t = training(tmp_path / str(packing_asked), tiny, rows, packing=packing_asked, n_epochs=2)
        t.stepper.memory = replace(t.stepper.memory, max_tokens=max_tokens)
        progress = Progress()
        cut.append([t.stepper.micro_batches(data.rows_of_step(10, step, 4, t.plan.seed)) for step in range(1, 7)])
        found.append([_take_step(t, progress)[0] for _ in range(t.total_steps)])

    assert [len(steps) for steps in found] == [6, 6]
    assert any(len(sequence) > 1 for step in cut[1] for part in step for sequence in part)
    for step, (plain, packed) in enumerate(zip(*found, strict=True)):
        drawn = [sorted(i for part in way[step] for sequence in part for i in sequence) for way in cut]
        assert drawn[0] == drawn[1]
        assert packed.train_loss == pytest.approx(plain.train_loss, rel=1e-4)
        assert packed.grad_norm == pytest.approx(plain.grad_norm, rel=1e-3)
        assert (packed.tokens, packed.train_accuracy, packed.learning_rate, packed.epoch) == (
            plain.tokens, plain.train_accuracy, plain.learning_rate, plain.epoch
        )  # fmt: skip


@pytest.mark.parametrize("packed_tokens", [None, 128])
def test_rows_of_different_groups_never_meet(packed_tokens: int | None) -> None:
    lengths = [10, 20, 30, 40, 50, 60]
    groups: list[Hashable] = ["short" if length < 35 else ("long", 1) for length in lengths]

    parts = micro_batches([5, 0, 3, 1, 2], lengths, 128, packed_tokens=packed_tokens, groups=groups)

    met = [{groups[i] for sequence in part for i in sequence} for part in parts]
    assert all(len(kinds) == 1 for kinds in met)
    assert sorted(i for part in parts for sequence in part for i in sequence) == [0, 1, 2, 3, 5]
    assert len(parts) == 2


def test_groups_hold_in_training_and_validation(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [chat(i, words=2 + i % 5) for i in range(8)]
    lay_out(tmp_path / "run", tiny, plan(), rows, rows)
    monkeypatch.setattr(rope.LengthRope, "group", lambda _self, length: length > 40)
    t = prepare(tmp_path / "run", MessageWriter(None), StopSignal())
    seen: list[set[bool]] = []
    usual = t.objective.forward

    def noting(batch: data.Batch, scale: float) -> Any:
        lengths = [int((ids != 0).sum()) for ids in batch.input_ids]
        seen.append({length > 40 for length in lengths})
        return usual(batch, scale)

    monkeypatch.setattr(t.objective, "forward", noting)
    assert t.valid is not None
    _take_step(t, Progress())
    validation.loss(t.stepper, t.valid.examples)

    assert all(len(sides) == 1 for sides in seen)
    assert len(seen) == 4


@pytest.mark.parametrize(
    ("rows", "lengths", "most", "padding"),
    [(8, (60, 700), 20, 0.06), (4, (60, 700), 20, 0.06), (8, (20, 100), 8, 0.08), (1, (60, 2000), 48, 0.04)],
)
def test_recorded_steps_of_uneven_rows_have_few_shapes(
    rows: int, lengths: tuple[int, int], most: int, padding: float
) -> None:
    numbers = random.Random(4)
    shapes = set()
    tokens = padded = 0
    for _ in range(200):
        drawn = [
            Row([5] * n, [IGNORED] * (n // 3) + [5] * (n - n // 3)) for n in numbers.choices(range(*lengths), k=rows)
        ]
        batch = collate(singles(drawn), [[*range(rows)]], CPU, cuda_graphs.PAD_TO, borders=True)
        assert batch.borders is not None
        tokens, padded = tokens + batch.tokens, padded + batch.input_ids.numel()
        shapes.add(cuda_graphs._shape(batch))

    assert len(shapes) <= most
    assert padded <= (1 + padding) * tokens


def test_sequences_beside_each_other_have_few_lengths_and_no_targets_of_padding() -> None:
    alike = [Row([5] * n, [IGNORED] * 40 + [5] * (n - 40)) for n in (97, 99, 100, 98)]
    uneven = [Row([5] * n, [5] * n) for n in (97, 20)]

    batch = collate(singles(alike), [[0, 1], [2, 3]], CPU, data.RECTANGLES_TO, borders=True)
    assert batch.input_ids.shape == (4, 128)
    assert batch.targets.shape == (sum(batch.labelled),)
    assert len(batch.targets) == sum(n - 40 for n in (97, 99, 100, 98))

    assert collate(singles(uneven), [[0], [1]], CPU, data.RECTANGLES_TO, borders=True).input_ids.shape == (1, 117)
    assert collate(singles(uneven), [[0], [1]], CPU, data.RECTANGLES_TO).input_ids.shape == (2, 128)


def test_next_step_is_built_once_unless_the_memory_plan_changes(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    t = training(tmp_path / "run", tiny, [chat(i, words=2 + i % 7) for i in range(8)], batch_size=4)
    built: list[int] = []
    usual = Stepper._collate

    def noting(stepper: Stepper, part: Any) -> data.Batch:
        built.append(len(part))
        return usual(stepper, part)

    monkeypatch.setattr(Stepper, "_collate", noting)
    first, second = [0, 1, 2, 3], [4, 5, 6, 7]

    t.stepper.prepare(second)
    t.stepper.accumulate(first, 1.0)
    assert built == [4, 4], "another step was taken for it"
    t.stepper.prepare(first)
    t.stepper.accumulate(first, 1.0)
    assert built == [4, 4, 4]
    t.stepper.adopt(replace(t.stepper.memory, max_tokens=60))
    t.stepper.accumulate(first, 1.0)
    assert sum(built[3:]) == 4
    assert len(built) > 4


def test_model_whose_rows_would_mix_is_not_packed(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The model recognises the start of a row by its positions: without them, rows would attend to their neighbours.
    forget = data.Batch.__init__

    def without_positions(self: Any, *, position_ids: Any, borders: Any, **rest: Any) -> None:
        forget(self, position_ids=None, borders=None, **rest)

    monkeypatch.setattr(data.Batch, "__init__", without_positions)
    t = training(tmp_path / "run", tiny, [chat(i) for i in range(6)], packing=True)

    assert t.stepper.memory.packed_tokens is None
    assert t.stepper.micro_batches(list(range(6))) == [
        [[i] for i in sorted(range(6), key=lambda i: -t.rows.lengths[i])]
    ]
    assert any("not packed" in warning for warning in t.warnings)


@pytest.mark.parametrize("technique", [Full(), None])
def test_accumulation_does_not_change_loss_or_gradient(tmp_path: Path, tiny: Path, technique: Full | None) -> None:
    changes = {"technique": technique} if technique else {}
    rows = [chat(i, words=2 + i % 7) for i in range(8)]
    found = []
    for number, max_tokens in enumerate((10_000, 1)):
        t = training(tmp_path / str(number), tiny, rows, batch_size=8, **changes)
        t.stepper.memory = MemoryPlan(max_tokens)
        found.append(_take_step(t, Progress())[0])

    assert len(t.stepper.micro_batches(list(range(8)))) == 8
    assert found[1].train_loss == pytest.approx(found[0].train_loss, rel=1e-5)
    assert found[1].grad_norm == pytest.approx(found[0].grad_norm, rel=1e-4)
    assert found[1].train_accuracy == found[0].train_accuracy


def test_last_short_step_is_the_mean_over_its_own_tokens(tmp_path: Path, tiny: Path) -> None:
    """Of 10 rows, 4 a step, the third step has 2: its gradient is their mean, not half of it."""
    t = training(tmp_path / "run", tiny, [chat(i) for i in range(10)], batch_size=4, learning_rate=1e-9)
    t.stepper.memory = MemoryPlan(1)
    progress = Progress()
    last = [_take_step(t, progress)[0] for _ in range(3)][-1]
    rows = [t.rows.examples[i] for i in data.rows_of_step(10, 3, 4, t.plan.seed)]

    loss, _ = t.objective(collate(rows, [[0], [1]], CPU), 1 / sum(row.labelled for row in rows))
    loss.backward()
    norm = torch.nn.utils.get_total_norm(p.grad for p in t.parameters.values() if p.grad is not None)

    assert len(rows) == 2
    assert last.train_loss == pytest.approx(loss.item(), rel=1e-5)
    assert last.grad_norm == pytest.approx(norm.item(), rel=1e-4)


def test_losses_of_three_steps(tmp_path: Path, tiny: Path) -> None:
    """The losses are literals: only a change of the training itself may change them."""
    t = training(tmp_path / "run", tiny, [chat(i) for i in range(12)])
    progress = Progress()

    losses = [_take_step(t, progress)[0].train_loss for _ in range(3)]

    assert losses == pytest.approx(LOSSES, abs=2e-4)
    assert progress.tokens == sum(t.rows.lengths)


LOSSES = [8.946486, 8.531140, 8.357866]


def test_rows_without_a_trained_token_are_left_out(tmp_path: Path, tiny: Path) -> None:
    rows = [chat(0), chat(1, words=40), chat(2)]

    t = training(tmp_path / "run", tiny, rows, max_seq_length=100)

    assert len(t.rows.examples) == 2
    assert t.rows.unlearnable == (2,)
