"""Tests which passes are recorded, on a CPU: a recording computes its pass again, from the tensors it was made of."""

import json
import random
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import adapted
import pytest
import torch
from run_folders import chat, lay_out, plan
from torch import Tensor

from tunery.planning import expected
from tunery.spec import Lora
from worker.trainer import cuda_graphs, run
from worker.trainer.cuda_graphs import SCALE, CudaGraphs, forward_backward
from worker.trainer.data import Batch, Row, collate, singles
from worker.trainer.kernels import attention
from worker.trainer.kernels import experts as grouped
from worker.trainer.objective import Objective, all_and_trainable
from worker.trainer.recorded_update import RecordedUpdate
from worker.trainer.report import MessageWriter
from worker.trainer.run import prepare
from worker.trainer.stop_signal import StopSignal
from worker.trainer.training import Training

CPU = torch.device("cpu")


class Again:
    """Counts recordings; each replay does the recorded work again."""

    nbytes = 0

    def __init__(self, refused: Collection[int] = ()) -> None:
        """`refused`: which of the recordings fail, counted from 1."""
        self.tried, self.forgotten, self._refused = 0, 0, refused

    def record(self, work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        self.tried += 1
        if self.tried in self._refused:
            raise RuntimeError("operation not permitted when stream is capturing")
        sums = torch.zeros(2, dtype=torch.float64)

        def replay() -> None:
            sums.copy_(work())

        return sums, replay

    def forget(self) -> None:
        self.forgotten += 1


@pytest.fixture
def objective(tmp_path: Path, tiny: Path) -> Objective:
    lay_out(tmp_path / "run", tiny, plan(technique=Lora(r=4)), [chat(i) for i in range(4)])
    return prepare(tmp_path / "run", MessageWriter(None), StopSignal()).objective


def rows_of(*lengths: int) -> Batch:
    numbers = random.Random(str(lengths))
    rows = [Row(ids, ids) for ids in ([numbers.randrange(5, 50) for _ in range(length)] for length in lengths)]
    places = [[place] for place in range(len(rows))]
    return collate(singles(rows), places, CPU, cuda_graphs.PAD_TO, borders=True)


def tried(objective: Objective, recorder: Again, batches: list[Batch], graphs: CudaGraphs | None = None) -> list[int]:
    """Runs passes, which must compute what plain ones do; returns how many recordings there were after each."""
    graphs, counts = graphs or CudaGraphs(objective, recorder), []
    parameters = [p for p in objective.parameters() if p.requires_grad]
    for batch in batches:
        objective.zero_grad()
        wanted, gradients = forward_backward(objective, batch, SCALE), [p.grad for p in parameters]
        objective.zero_grad()
        torch.testing.assert_close(graphs.run(batch), wanted)
        torch.testing.assert_close([p.grad for p in parameters], gradients)
        counts.append(recorder.tried)
    return counts


def test_only_the_first_shape_of_concatenated_rows_is_warmed_up(objective: Objective) -> None:
    batches = [rows_of(60, 20), rows_of(50, 30), rows_of(120, 20), rows_of(120, 25), rows_of(200, 20)]

    assert tried(objective, Again(), batches) == [0, 1, 2, 2, 3]


def test_shapes_with_other_kernels_are_warmed_up_too(objective: Objective, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are loaded for so many rows, and those of long rows are others: none can be loaded in a recording."""
    many = [rows_of(60, *[3] * 70), rows_of(60, *[3] * 70), rows_of(60, *[7] * 70)]
    assert tried(objective, Again(), [rows_of(60, 20), rows_of(50, 30), *many]) == [0, 1, 1, 2, 3]

    monkeypatch.setattr(attention, "OWN_LONGEST", 256)
    long = [rows_of(400, 9), rows_of(400, 9)]
    assert tried(objective, Again(), [rows_of(60, 20), rows_of(50, 30), *long]) == [0, 1, 1, 2]


def test_each_shape_of_rows_beside_each_other_is_warmed_up(objective: Objective) -> None:
    batches = [rows_of(60, 20), rows_of(60, 20), rows_of(60, 59), rows_of(60, 59), rows_of(100, 99)]

    assert tried(objective, Again(), batches) == [0, 1, 1, 2, 2]


def test_each_shape_is_warmed_up_once_a_cold_one_could_not_be_recorded(objective: Objective) -> None:
    cold, colder = rows_of(120, 20), rows_of(200, 20)
    batches = [rows_of(60, 20), rows_of(60, 20), cold, cold, colder, colder]

    assert tried(objective, Again(refused={2}), batches) == [0, 1, 2, 3, 3, 4]


def test_nothing_is_recorded_once_a_warm_shape_could_not_be(objective: Objective) -> None:
    batches = [rows_of(60, 20), rows_of(60, 20), rows_of(60, 20), rows_of(120, 20), rows_of(120, 20)]

    assert tried(objective, Again(refused={1}), batches) == [0, 1, 1, 1, 1]


def test_passes_that_are_recorded_ahead_are_not_recorded_again(objective: Objective) -> None:
    recorder = Again()
    batches = [rows_of(60, 20), rows_of(60, 59), rows_of(120, 20), rows_of(60, 20)]
    graphs = CudaGraphs(objective, recorder)
    graphs.record_ahead(batches)
    assert graphs.count == 3

    assert tried(objective, recorder, [*batches, rows_of(200, 20)], graphs) == [3, 3, 3, 3, 4]


def test_most_frequent_passes_are_recorded_ahead(objective: Objective, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "MOST_GRAPHS", 1)
    graphs = CudaGraphs(objective, recorder := Again())
    graphs.record_ahead([rows_of(120, 20), rows_of(60, 20), rows_of(60, 20), rows_of(200, 20)])
    assert [found.batch.tokens for found in graphs._recorded.values()] == [80]
    assert tried(objective, recorder, [rows_of(60, 20), rows_of(200, 20), rows_of(200, 20)], graphs) == [1, 1, 1]


def test_nothing_more_is_recorded_ahead_after_a_failure(objective: Objective) -> None:
    graphs = CudaGraphs(objective, recorder := Again(refused={1}))
    graphs.record_ahead([rows_of(60, 20), rows_of(120, 20), rows_of(60, 59)])
    assert graphs.failed
    assert recorder.tried == 1


@pytest.mark.parametrize("enough", [True, False], ids=["enough-memory", "short-of-memory"])
def test_recording_ahead_changes_nothing(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, *, enough: bool
) -> None:
    lay_out(tmp_path / "run", tiny, plan(technique=Lora(r=4, dropout=0.5)), [chat(i) for i in range(8)])
    found = []
    for ahead in (False, True):
        t = prepare(tmp_path / "run", MessageWriter(None), StopSignal())
        t.stepper.graphs = CudaGraphs(t.objective, recorder := Again())
        t.objective.train()
        torch.manual_seed(1)
        if ahead:
            with monkeypatch.context() as patched:
                if not enough:
                    patched.setattr(cuda_graphs, "forward_backward", _short_of_memory)
                t.stepper.record_ahead([[0, 1], [2, 3, 4]])
        assert (recorder.tried > 0) == (ahead and enough)
        weight = t.stepper.weight([0, 1])
        sums = t.stepper.accumulate([0, 1], weight)
        found.append([sums, *(p.grad for p in t.parameters.values() if p.grad is not None), torch.rand(3)])

    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def _short_of_memory(objective: Objective, batch: Batch, scale: float) -> Tensor:
    forward_backward(objective, batch, scale)
    raise torch.OutOfMemoryError


def test_training_leaves_no_recordings_and_no_gradients_to_what_follows(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = lay_out(tmp_path / "run", tiny, plan(technique=Lora(r=4)), [chat(i) for i in range(4)])
    recorder, found = Again(), []

    def prepared(*args: Any) -> Training:
        t = prepare(*args)
        t.stepper.graphs = CudaGraphs(t.objective, recorder)
        t.stepper._recorded = RecordedUpdate(t.optimizer, recorder)
        return t

    def score(t: Training, *_: Any) -> None:
        assert t.stepper.graphs is not None
        found.append((recorder.tried > 0, recorder.forgotten, t.stepper.graphs.count))
        assert all(p.grad is None for p in t.parameters.values())

    monkeypatch.setattr(run, "prepare", prepared)
    monkeypatch.setattr(run.comparison, "score", score)

    assert run.carry_out(folder, MessageWriter(None), StopSignal())
    assert found == [(True, 2, 0)]
    said = json.loads((folder / "out/training_config.json").read_text())["paths"]
    assert said["graphs"] == {"path": "recorded"}, "the record says how it was trained"


def test_larger_passes_are_never_recorded(objective: Objective) -> None:
    graphs, small, large = CudaGraphs(objective, recorder := Again()), rows_of(60, 20), rows_of(120, 20)
    graphs._most = small.input_ids.numel()
    graphs.record_ahead([small, large])
    assert graphs.count == 1
    assert tried(objective, recorder, [large, large], graphs) == [1, 1]


@pytest.mark.parametrize(
    ("changes", "tokens", "reason"),
    [
        ({}, 100, None),
        ({}, 10**6, "more than 8,192 tokens at once"),
        ({"recomputes": 1}, 100, None),
        ({"recomputes": 1, "draws_again": True}, 100, "activations are computed again with the same random numbers"),
        ({"recomputes": 1, "gradients": 2**28 + 1}, 100, "gradients need the memory of activations"),
        ({"gradients": 2**28 + 1}, 100, None),
        ({"is_sharded": True}, 100, "its weights are cut over the ranks"),
    ],
)
def test_why_steps_are_not_recorded_on_a_gpu(
    objective: Objective, changes: dict[str, Any], tokens: int, reason: str | None
) -> None:
    weight = SimpleNamespace(is_cuda=True, requires_grad=True, nbytes=changes.pop("gradients", 100))
    of = {name: getattr(objective, name) for name in ("causal", "model", "method", "noise", "is_sharded")}
    on_gpu: Any = SimpleNamespace(
        **({"recomputes": 0, "draws_again": False} | of | changes), parameters=lambda: iter([weight])
    )
    assert cuda_graphs.reason_against(on_gpu, tokens) == reason


@pytest.mark.parametrize(
    ("options", "one_by_one", "recorded"),
    [({}, None, True), ({}, "a width is no multiple of 8", False), ({"target_modules": ["q_proj"]}, None, False)],
    ids=["grouped", "one by one", "experts without adapters"],
)
def test_passes_of_a_mixture_are_recorded_unless_the_host_reads_its_routing(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], one_by_one: str | None, recorded: bool
) -> None:

    made = adapted.objective("qwen3_moe", **options)
    monkeypatch.setattr(grouped, "reason_against", lambda _weight: one_by_one)
    of = {name: getattr(made, name) for name in ("causal", "model", "method", "noise", "is_sharded", "recomputes")}
    weight = SimpleNamespace(is_cuda=True, requires_grad=True, nbytes=100)
    on_gpu: Any = SimpleNamespace(**of, draws_again=False, parameters=lambda: iter([weight]))

    reason = cuda_graphs.reason_against(on_gpu, 100)
    assert reason == (None if recorded else "the experts' work depends on the batch")


def test_a_mixtures_work_is_that_of_the_experts_of_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, mixture = (adapted.objective(family, target_modules=["q_proj"]) for family in ("qwen3", "qwen3_moe"))
    every, _ = all_and_trainable(mixture.model)
    of_experts = 3 * 4 * 3 * 64 * 32  # layers, experts, matrices of an expert
    monkeypatch.setattr(expected, "RECORDED_WORK", 1000 * (every - of_experts // 2))  # two experts of four
    assert cuda_graphs.most_tokens(mixture) == 1000
    monkeypatch.setattr(expected, "RECORDED_WORK", 1000 * all_and_trainable(dense.model)[0])
    assert cuda_graphs.most_tokens(dense) == 1000


def test_drivers_own_shortage_in_a_recorded_pass_is_noticed(objective: Objective) -> None:
    def full() -> None:
        raise RuntimeError("CUDA error: out of memory")

    graphs, batch = CudaGraphs(objective, Again()), rows_of(60, 20)
    graphs.record_ahead([batch])
    [found] = graphs._recorded.values()
    found.replay = full
    with pytest.raises(torch.OutOfMemoryError):
        graphs.run(batch)


def test_work_between_steps_takes_the_memory_of_recordings(tmp_path: Path, tiny: Path) -> None:
    lay_out(tmp_path / "run", tiny, plan(technique=Lora(r=4)), [chat(i) for i in range(4)])
    t = prepare(tmp_path / "run", MessageWriter(None), StopSignal())
    counts: list[int] = []

    def work() -> str:
        assert t.stepper.graphs is not None
        counts.append(t.stepper.graphs.count)
        if counts[-1]:
            raise torch.OutOfMemoryError
        return "done"

    t.stepper.graphs = CudaGraphs(t.objective, Again())
    t.stepper.record_ahead([[0, 1]])
    assert t.stepper.between_steps(work) == "done"
    assert counts == [1, 0]

    t.stepper.record_ahead([[0, 1]])
    t.stepper.make_room()
    assert t.stepper.graphs.count == 1, "there is enough memory"
    t.stepper.memory = replace(t.stepper.memory, recompute=1)
    t.stepper.make_room()
    assert t.stepper.graphs.count == 0


def test_a_plan_that_recomputes_otherwise_is_recorded_again(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graphs, "CudaRecorder", Again)
    lay_out(tmp_path / "run", tiny, plan(technique=Lora(r=4)), [chat(i) for i in range(4)])
    t = prepare(tmp_path / "run", MessageWriter(None), StopSignal())
    t.stepper.memory = replace(t.stepper.memory, graphs=True)
    before = t.stepper.graphs = CudaGraphs(t.objective, Again())
    t.stepper.adopt(replace(t.stepper.memory, max_tokens=64))
    assert t.stepper.graphs is before
    t.stepper.adopt(replace(t.stepper.memory, recompute=1))
    assert t.stepper.graphs is not before


def test_steps_after_a_rest_are_recorded_again(objective: Objective) -> None:
    graphs, batch = CudaGraphs(objective, recorder := Again()), rows_of(60, 20)
    assert tried(objective, recorder, [batch, batch], graphs) == [0, 1]
    graphs.forget()
    assert tried(objective, recorder, [batch], graphs) == [2]
