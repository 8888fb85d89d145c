"""The memory plan is found by trial, shrinks after running out of memory, and never changes the training."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from run_folders import chat, lay_out, plan
from transformers import LlamaConfig

from tunery.failures import DoesNotFit
from tunery.planning import activations, expected
from tunery.planning import memory as planning
from tunery.planning.precision import decide
from tunery.spec import Full, Lora, Qlora
from worker.trainer import embeddings, hardware, layout, loading, preflight, reading, validation
from worker.trainer.data import Example, Row
from worker.trainer.kernels import decoder
from worker.trainer.loop import _take_step, train
from worker.trainer.memory import MemoryPlan, next_after
from worker.trainer.recipes.lora import LORA
from worker.trainer.report import MessageWriter
from worker.trainer.run import prepare
from worker.trainer.stop_signal import StopSignal
from worker.trainer.training import Progress, Training

ROWS = [chat(i, words=2 + i % 7) for i in range(8)]
FULL_GPU = torch.OutOfMemoryError("fake: out of memory")


def training(folder: Path, base: Path, **changes: Any) -> Training:
    lay_out(folder, base, plan(batch_size=8, **changes), ROWS, ROWS[:5])
    return prepare(folder, MessageWriter(None), StopSignal())


def failing(usual: Callable[..., Any], calls: Iterable[int]) -> Callable[..., Any]:
    """Returns `usual` with an out-of-memory error at the given calls, counted from 1."""
    chosen, count = set(calls), 0

    def called(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count in chosen:
            raise FULL_GPU
        return usual(*args, **kwargs)

    return called


def weights(t: Training) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in t.parameters.items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.allclose(first[name], second[name], rtol=1e-3, atol=1e-5) for name in first)


def test_constants_of_planning_are_those_of_the_trainer() -> None:
    named = {family.replace("_", "") for family in activations.FUSED | activations.FUSED_EXPERTS}
    assert {family.lower() for family in decoder.FAMILIES} == named


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_estimate_of_a_piece_is_that_of_the_layout(ranks: int) -> None:
    """The error of a job that fits no GPU names the number of GPUs that hold it sharded, from this estimate.

    The trainer plans by its own layout, which counts all weights that may be whole at once; the estimate counts those
    that are whole while all gradients exist.
    """
    sizes = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
    config = LlamaConfig(vocab_size=32_000, num_key_value_heads=40, tie_word_embeddings=False, **sizes)
    cut = layout.compute(config, decide(Full(), "cuda"), ranks)

    model_info = sizes | {"num_key_value_heads": 40, "vocab_size": 32_000, "params": cut.parameters}
    parts = planning.estimate(model_info, Full(), max_seq_length=512, ranks=ranks).parts

    assert [parts["base"], parts["optimizer"]] == pytest.approx([cut.weights, cut.moments], rel=0.01)
    beside = parts["gradients"] + parts["gathered"]
    assert cut.gradients + cut.gathered / 3 < beside < cut.gradients + cut.gathered


def test_next_plans_end_at_one_row_with_activations_made_again() -> None:
    several, packed, single = [[[0], [1]]], [[[0, 1]]], [[[0]], [[1]]]

    assert next_after(MemoryPlan(100, 80, graphs=True), several, 2) == MemoryPlan(100, 80)
    assert next_after(MemoryPlan(100, 80), several, 2) == MemoryPlan(50, 50)
    assert next_after(MemoryPlan(50, 50), packed, 2) == MemoryPlan(25, 25)
    assert next_after(MemoryPlan(25, 25), single, 2) == MemoryPlan(25, 25, recompute=2)
    assert next_after(MemoryPlan(25, 25, recompute=1), single, 2) == MemoryPlan(25, 25, recompute=2)
    assert next_after(MemoryPlan(25, 25, recompute=2), single, 2) == MemoryPlan(25, 25, recompute=2, offload=True)
    assert next_after(MemoryPlan(25, 25, recompute=2, offload=True), single, 2) is None
    assert next_after(MemoryPlan(25, 25, recompute=2), several, 2) == MemoryPlan(12, 12, recompute=2)
    assert next_after(MemoryPlan(25, 25), single, 0) is None  # a model without known layers


@pytest.mark.parametrize(
    ("calls", "wanted"),
    [([1], 256), ([1, 3], 128), ([1, 3, 6], 64)],
    ids=["at once", "in the second part", "three times"],
)
def test_step_that_runs_out_of_memory_is_taken_in_smaller_pieces(
    tmp_path: Path, tiny: Path, caplog: pytest.LogCaptureFixture, calls: list[int], wanted: int
) -> None:
    steps, found = [], []
    for number, at in enumerate(([], calls)):
        t = training(tmp_path / str(number), tiny)
        t.stepper.memory = replace(t.stepper.memory, max_tokens=512)
        t.objective.forward = failing(t.objective.forward, at)
        steps.append(_take_step(t, Progress())[0])
        found.append(weights(t))

    assert steps[1].train_loss == pytest.approx(steps[0].train_loss, rel=1e-5)
    assert steps[1].grad_norm == pytest.approx(steps[0].grad_norm, rel=1e-4)
    assert same(*found)
    assert t.stepper.memory.max_tokens == wanted
    assert "the memory plan from here on" in caplog.text


def test_one_row_too_many_is_recomputed_and_then_an_error(tmp_path: Path, tiny: Path) -> None:
    t = training(tmp_path / "run", tiny)
    usual = t.objective.forward

    def whole_only(*args: Any) -> Any:
        if not t.objective.recomputes:
            raise FULL_GPU
        return usual(*args)

    t.objective.forward = whole_only
    _take_step(t, Progress())

    assert t.stepper.memory.recompute
    assert all(len(part) == 1 for part in t.stepper.micro_batches(list(range(8))))

    t.objective.forward = failing(usual, range(1, 100))
    with pytest.raises(torch.OutOfMemoryError):
        _take_step(t, Progress())


@pytest.mark.parametrize("graphs", [False, True])
def test_evaluation_that_runs_out_of_memory_is_done_in_smaller_pieces(tmp_path: Path, tiny: Path, graphs: bool) -> None:
    t = training(tmp_path / "run", tiny)
    t.stepper.memory = replace(t.stepper.memory, graphs=graphs)
    assert t.valid is not None
    wanted = validation.loss(t.stepper, t.valid.examples)
    usual = t.objective.forward
    t.objective.forward = failing(usual, [1, 2, 3] if graphs else [1, 2])

    found = validation.loss(t.stepper, t.valid.examples)
    assert (found.loss, found.accuracy) == pytest.approx((wanted.loss, wanted.accuracy), rel=1e-6)

    assert t.stepper.memory.max_tokens == expected.CPU_MICRO_BATCH // 4
    assert t.objective.training
    t.objective.forward = failing(usual, range(1, 100))
    with pytest.raises(torch.OutOfMemoryError):
        validation.loss(t.stepper, t.valid.examples)
    assert not t.stepper.memory.recompute  # it saves nothing without a backward pass


def test_optimizer_that_runs_out_of_memory_at_its_start_steps_again(tmp_path: Path, tiny: Path) -> None:
    found = []
    for number, at in enumerate(([], [2])):
        t = training(tmp_path / str(number), tiny)
        t.optimizer.step = failing(t.optimizer.step, at)
        progress = Progress()
        steps = [_take_step(t, progress)[0].train_loss for _ in range(3)]
        found.append((steps, weights(t)))

    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6)
    assert same(found[0][1], found[1][1])


def test_optimizer_that_fails_half_way_ends_the_run(tmp_path: Path, tiny: Path) -> None:
    """Some weights have already changed, so neither repeating nor skipping the step would be the same training."""
    t = training(tmp_path / "run", tiny, n_epochs=4)
    usual = t.optimizer.step

    def half() -> None:
        groups = t.optimizer.param_groups
        whole = [group["params"] for group in groups]
        for group, parameters in zip(groups, whole, strict=True):
            group["params"] = parameters[: len(parameters) // 2]
        usual()
        for group, parameters in zip(groups, whole, strict=True):
            group["params"] = parameters
        raise FULL_GPU

    progress = Progress()
    _take_step(t, progress)
    t.optimizer.step = half

    with pytest.raises(RuntimeError, match="in the middle of the optimizer's step 2"):
        train(t, progress)

    assert progress.step == 1
    assert not list(t.folder.glob("snapshots/*"))


@pytest.mark.parametrize("technique", [Lora(r=4), Qlora(r=4), Full()], ids=["lora", "qlora", "full"])
def test_optimizers_state_is_made_before_the_first_step_and_counts_none(
    tmp_path: Path, tiny: Path, technique: Any
) -> None:
    t = training(tmp_path / "run", tiny, technique=technique, weight_decay=0.1)
    before = weights(t)

    assert len(t.optimizer.state) == len(t.parameters)
    for state in t.optimizer.state.values():
        assert float(state["step"]) == 0
        assert all(not value.any() for key, value in state.items() if key.startswith("exp"))
    assert all(group["lr"] == t.plan.learning_rate for group in t.optimizer.param_groups)
    assert all(parameter.grad is None for parameter in t.parameters.values())
    preflight.make_state(t.optimizer)
    assert all(torch.equal(before[name], parameter) for name, parameter in t.parameters.items())


def test_each_rank_plans_for_its_share_of_a_step(tmp_path: Path, tiny: Path) -> None:
    t = training(tmp_path / "run", tiny)

    one, three = (reading.work(t.run, t.rows, t.valid, packs=False, ranks=ranks) for ranks in (1, 3))

    assert (one.rows_a_step, three.rows_a_step) == (8, 3)
    assert (one.mean_step, three.mean_step) == (t.rows.tokens, round(t.rows.tokens / 3))
    assert one.row == three.row == max(t.rows.lengths)


def test_recorded_passes_are_not_larger_than_those_that_gain_from_it(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A larger one would need its memory beside that which the graphs keep."""
    t = training(tmp_path / "run", tiny)
    assert t.stepper.memory.max_tokens == expected.CPU_MICRO_BATCH
    work = reading.work(t.run, t.rows, t.valid, packs=False, ranks=1)
    gradients = sum(4 * parameter.numel() for parameter in t.parameters.values())
    gains: list[int] = []
    monkeypatch.setattr(
        preflight, "worthwhile", lambda _objective, tokens, _ranks: (gains.append(tokens), tokens < 600)[1]
    )
    monkeypatch.setattr(preflight, "most_tokens", lambda _: 300)
    monkeypatch.setattr(expected, "RECORDING_BYTES", 20_000)
    gpu = FakeGPU(monkeypatch, 200_000 + gradients)

    def found(**changes: Any) -> MemoryPlan:
        now = replace(work, **({"row": 200, "sequence": 200, "rows_a_step": 4, "mean_step": 500} | changes))
        return preflight._measured(t.objective, t.rows.rows, now, torch.device("cuda"))

    assert found() == MemoryPlan(300, graphs=True)
    assert gains == [500], "as many as a step has at once"
    assert found(mean_step=1000) == MemoryPlan(800)
    assert found(sequence=400, row=400) == MemoryPlan(400, graphs=True), "a longer row is recorded too"
    gpu.limit(monkeypatch, 50_000 + gradients)
    assert found() == MemoryPlan(250, graphs=True), "the recordings take room from activations"
    gpu.limit(monkeypatch, 22_500 + gradients)
    assert found() == MemoryPlan(800, recompute=2), "the recordings would not fit"


def test_libraries_take_their_memory_before_the_model_does(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    def load_base(*of: Any) -> Any:
        order.append("model")
        return LORA.load_base(*of)

    monkeypatch.setattr(loading, "device_ready", lambda device: order.append(f"libraries on {device}"))
    monkeypatch.setitem(loading.RECIPES, "lora", replace(LORA, load_base=load_base))
    training(tmp_path / "run", tiny)

    assert order == ["libraries on cpu", "model"]


def test_embedding_makes_room_for_the_optimizers_state(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    t = training(tmp_path / "run", tiny)
    t.optimizer.step = failing(t.optimizer.step, [1])
    moved = iter([100, 0])
    monkeypatch.setattr(embeddings, "move_to_host", lambda _: next(moved))
    work = preflight.Work(technique=t.plan.technique, rows_a_step=8, mean_step=480, row=60, sequence=60, packs=False)

    preflight.fit_micro_batch(t.objective, t.optimizer, t.rows.rows, work)

    assert list(t.optimizer.state)
    assert next(moved) == 0, "the embedding was moved"


def test_state_that_does_not_fit_is_told_before_the_first_step(tmp_path: Path, tiny: Path) -> None:
    t = training(tmp_path / "run", tiny)
    t.optimizer.step = failing(t.optimizer.step, [1])
    work = preflight.Work(technique=t.plan.technique, rows_a_step=8, mean_step=480, row=60, sequence=60, packs=False)

    with pytest.raises(DoesNotFit, match="The optimizer's state needs"):
        preflight.fit_micro_batch(t.objective, t.optimizer, t.rows.rows, work)
    assert all(group["lr"] == t.plan.learning_rate for group in t.optimizer.param_groups)


class FakeGPU:
    """Answers what preflight asks of a GPU: the free bytes, and the bytes that a pass takes for each token."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, free: int, keeps: int = 100, recomputes: int = 10) -> None:
        self.free, self.keeps, self.recomputes = free, keeps, recomputes
        self.trained: list[int] = []
        self.accumulated: list[bool] = []
        self.evaluated: list[int] = []
        monkeypatch.setattr(preflight, "_peak", self.peak)
        monkeypatch.setattr(preflight, "_peak_of_evaluation", self.peak_of_evaluation)
        monkeypatch.setattr(preflight._Probe, "inputs", lambda _: 0.0)
        self.cached = 0  # bytes that torch has reserved and nothing uses
        self.limit(monkeypatch, free)
        monkeypatch.setattr(torch.cuda, "empty_cache", self.empty)
        for name, answer in {
            "get_rng_state": torch.get_rng_state(),
            "get_device_properties": type("P", (), {"total_memory": free}),
        }.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
        for name in ("set_rng_state", "reset_peak_memory_stats"):
            monkeypatch.setattr(torch.cuda, name, lambda *_: None)
        monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)

    def limit(self, monkeypatch: pytest.MonkeyPatch, free: int) -> None:
        self.free = free
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (self.free - self.cached, self.free))

    def empty(self) -> None:
        self.cached = 0

    def peak(self, objective: Any, examples: list[Row], _device: Any, *, accumulates: bool) -> int:
        tokens = sum(map(len, examples))
        self.accumulated.append(accumulates)
        self.trained.append(tokens)
        kept = 1 - objective.recomputes / objective.layers
        return self._of(tokens, self.recomputes + int(kept * (self.keeps - self.recomputes)))

    def peak_of_evaluation(self, _objective: Any, row: Row, _device: Any) -> int:
        self.evaluated.append(len(row))
        return self._of(len(row), self.recomputes)

    def _of(self, tokens: int, each: int) -> int:
        if tokens * each > self.free:
            raise FULL_GPU
        return tokens * each


@pytest.mark.parametrize(
    ("free", "sequence", "validation", "wanted"),
    [
        (10**6, 1000, None, MemoryPlan(4000)),  # all tokens of a step
        (300_000, 1000, None, MemoryPlan(2700)),  # nine tenths of the free memory
        (150_000, 1000, None, MemoryPlan(1350)),  # slower with more tokens and recomputation
        (90_000, 1000, None, MemoryPlan(1472, recompute=1)),  # one of the two layers
        (12_000, 1000, None, MemoryPlan(1080, recompute=2)),
        (9_000, 1000, None, None),
        (10**6, 1000, 200_000, None),  # the longest validation row does not fit at all
        (300_000, 1000, 20_000, MemoryPlan(2700)),
    ],
)
def test_plan_is_what_fits(
    tmp_path: Path,
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
    free: int,
    sequence: int,
    validation: int | None,
    wanted: MemoryPlan | None,
) -> None:
    t = training(tmp_path / "run", tiny)
    gradients = sum(4 * parameter.numel() for parameter in t.parameters.values())
    gpu = FakeGPU(monkeypatch, free + gradients)
    gpu.cached = gradients  # of the step that made the optimizer's state
    row = Example((Row([5] * validation, [5] * validation),)) if validation else None
    work = preflight.Work(
        Lora(), rows_a_step=4, mean_step=4 * sequence, row=sequence, sequence=sequence, packs=False, validation=row
    )

    def measured() -> MemoryPlan:
        return preflight._measured(t.objective, t.rows.rows, work, torch.device("cuda"))

    if wanted is None:
        with pytest.raises(DoesNotFit):
            measured()
    else:
        assert measured() == wanted
        assert gpu.trained[0] == sequence
        assert gpu.evaluated == ([validation] if validation else [])
    assert t.objective.training


@pytest.mark.parametrize(("rows", "wanted"), [(4, MemoryPlan(4000, recompute=1)), (40, MemoryPlan(1080, recompute=2))])
def test_a_full_fine_tune_takes_a_whole_step_whose_gradients_are_made_meanwhile(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, rows: int, wanted: MemoryPlan
) -> None:
    """A step of more tokens than a GPU takes at once accumulates gradients, which are there before."""
    t = training(tmp_path / "run", tiny, technique=Full())
    gradients = sum(p.numel() * p.element_size() for p in t.parameters.values())
    gpu = FakeGPU(monkeypatch, 12_000 + gradients)
    gpu.keeps = gradients // 4000  # fits only in the memory of gradients that are not there yet
    work = preflight.Work(Full(), rows_a_step=rows, mean_step=rows * 1000, row=1000, sequence=1000, packs=False)

    found = preflight._measured(t.objective, t.rows.rows, work, torch.device("cuda"))

    assert found == wanted
    assert (False in gpu.accumulated) == (rows == 4)


@pytest.mark.parametrize(
    ("free", "moved", "wanted"),
    [
        (300_000, 0, MemoryPlan(2700)),  # several micro-batches, but nothing is recomputed
        (90_000, 60_000, MemoryPlan(1350, host_embedding=True)),
        (90_000, 1_000, MemoryPlan(1489, recompute=1, host_embedding=True)),
        (9_000, 3_000, MemoryPlan(1080, recompute=2, host_embedding=True)),  # did not fit at all
    ],
)
def test_embedding_is_moved_where_activations_would_be_recomputed(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, free: int, moved: int, wanted: MemoryPlan
) -> None:
    t = training(tmp_path / "run", tiny)
    gradients = sum(4 * parameter.numel() for parameter in t.parameters.values())
    gpu = FakeGPU(monkeypatch, free + gradients)
    work = preflight.Work(Lora(), rows_a_step=4, mean_step=4000, row=1000, sequence=1000, packs=False)
    done: list[int] = []

    def move(_objective: Any) -> int:
        freed = 0 if done else moved
        done.append(freed)
        gpu.free += freed
        return freed

    monkeypatch.setattr(embeddings, "move_to_host", move)
    monkeypatch.setattr(embeddings, "are_on_host", lambda _: bool(done))

    assert preflight._measured(t.objective, t.rows.rows, work, torch.device("cuda")) == wanted


@pytest.mark.parametrize(("mean_step", "wanted"), [(400, MemoryPlan(400, recompute=2)), (40, MemoryPlan(190))])
def test_plan_is_judged_by_the_mean_rows(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, mean_step: int, wanted: MemoryPlan
) -> None:
    """Of rows of 100 tokens one fits as it is and all with recomputation; of rows of 10 all fit as they are."""
    t = training(tmp_path / "run", tiny)
    FakeGPU(monkeypatch, 21_200 + sum(4 * parameter.numel() for parameter in t.parameters.values()))
    monkeypatch.setattr(embeddings, "move_to_host", lambda _: 0)
    monkeypatch.setattr(preflight, "worthwhile", lambda *_: False)
    work = preflight.Work(Lora(), rows_a_step=4, mean_step=mean_step, row=100, sequence=100, packs=False)

    found = preflight._measured(t.objective, t.rows.rows, work, torch.device("cuda"))

    assert replace(found, max_tokens=0) == replace(wanted, max_tokens=0)
    assert abs(found.max_tokens - wanted.max_tokens) < 5


def test_a_packed_sequence_is_shortened_before_a_row_is_refused(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    t = training(tmp_path / "run", tiny)
    gradients = sum(4 * parameter.numel() for parameter in t.parameters.values())
    FakeGPU(monkeypatch, 15_000 + gradients)
    work = preflight.Work(Lora(), rows_a_step=4, mean_step=2000, row=500, sequence=2000, packs=True)

    found = preflight._measured(t.objective, t.rows.rows, work, torch.device("cuda"))

    assert found == MemoryPlan(1350, recompute=2)


def test_plan_of_a_packed_run_packs_no_more_than_fits(tmp_path: Path, tiny: Path) -> None:
    t = training(tmp_path / "run", tiny, packing=True, max_seq_length=64)

    assert t.stepper.memory == MemoryPlan(expected.CPU_MICRO_BATCH, packed_tokens=64)


def test_what_recordings_have_reserved_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    def segment(total: int, used: int, pool: tuple[int, int] = (0, 0), device: int = 1) -> dict[str, Any]:
        return {"device": device, "total_size": total, "allocated_size": used, "segment_pool_id": pool}

    segments = [segment(100, 30), segment(20, 0), segment(1000, 10, pool=(0, 3)), segment(5000, 0, device=0)]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (7, 100))

    assert hardware.free_bytes(torch.device("cuda", 1)) == 7 + 70 + 20
