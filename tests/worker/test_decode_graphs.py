"""Recorded passes answer as passes of their own do, whatever joins, leaves and moves between them.

On a CPU `OpRecorder` stands in for CUDA graphs: it does the recorded operations again on the tensors of the recording;
`lora_by_address` stands in for the kernels that find adapters by their addresses.
"""

import gc
import logging
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lora_by_address
import pytest
import torch
import zoo
from op_recorder import OpRecorder
from streamed import PROMPTS, greedy, make, read

from worker.server import bank, factors, models, slots
from worker.server.batch import Batch
from worker.server.cache_memory import CacheMemory
from worker.server.models import Base, Source
from worker.server.streams import Alone, Stream
from worker.trainer.decoding import graphs as decode_graphs
from worker.trainer.decoding.graphs import DecodeGraphs, recorder_for
from worker.trainer.rope import LengthRope

TOKENS = 14


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> OpRecorder:
    made = OpRecorder()
    monkeypatch.setattr(models, "recorder_for", lambda _model: lambda: made)
    monkeypatch.setattr(bank, "kernel_for", lambda _device: lora_by_address.add)
    return made


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.make("Llama", tmp_path_factory.mktemp("llama") / "base")


def alone(model: Any, prompt: list[int]) -> list[int]:
    return tokens([Alone(model, prompt, LengthRope())])[0]


def stocked(base: Path, folder: Path, count: int) -> tuple[Base, list[Any]]:
    """A base with adapters."""
    made = Base(Source(base, None, "cpu", torch.float32, graphs=True), CacheMemory(2**30))
    return made, [made.lay_on(make(folder / str(seed), base, seed)) for seed in range(count)]


def answer(adapter: Any, prompt: list[int]) -> list[int]:
    row = adapter.stream(prompt)
    (said,) = tokens([row])
    row.close()
    return said


def tokens(rows: list[Stream], count: int = TOKENS) -> list[list[int]]:
    """The rows' answers, of which each step writes one token of each."""
    said = [[greedy(row) for row in rows] for _ in range(count)]
    return [list(one) for one in zip(*said, strict=True)]


@pytest.mark.parametrize(
    ("family", "shape"), [("Llama", {}), ("Gemma 2", {"attn_logit_softcapping": 0.02}), ("Mistral", {})]
)
def test_recorded_answers_are_those_of_passes_alone(
    family: str, shape: dict[str, Any], tmp_path: Path, recorder: OpRecorder
) -> None:
    model = read(zoo.make(family, tmp_path / "base", **shape))
    batch = Batch(model, recorder=lambda: recorder)
    rows = [batch.join(prompt) for prompt in PROMPTS[:3]]
    first = tokens(rows, 6)  # type: ignore[arg-type]
    rows.append(batch.join(PROMPTS[0]))  # another number of rows
    then = tokens(rows, TOKENS - 6)  # type: ignore[arg-type]
    rows[0].close()  # the last row takes its slot
    last = tokens(rows[3:], 6)  # type: ignore[arg-type]

    assert [[*a, *b] for a, b in zip(first, then, strict=False)] == [alone(model, one) for one in PROMPTS[:3]]
    assert [*then[3], *last[0]] == alone(model, PROMPTS[0])
    assert recorder.recorded == 2  # the graph of three rows serves other three too
    assert recorder.replayed > recorder.recorded + 6


def test_graphs_follow_slots_that_grow(llama: Path, recorder: OpRecorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "_STEP", 8)
    model = read(llama)
    batch = Batch(model, recorder=lambda: recorder)
    rows = [batch.join(prompt) for prompt in PROMPTS[:2]]
    assert tokens(rows) == [alone(model, one) for one in PROMPTS[:2]]  # type: ignore[arg-type]
    assert recorder.recorded >= 2


def test_graphs_follow_slots_that_move(llama: Path, recorder: OpRecorder) -> None:
    """Two rows, three, and two again: as many as when the first graph was recorded, but elsewhere."""
    model = read(llama)
    batch = Batch(model, recorder=lambda: recorder)
    rows = [batch.join(prompt) for prompt in PROMPTS[:2]]
    first = tokens(rows, 6)  # type: ignore[arg-type]
    batch.join(PROMPTS[2]).close()
    third = batch.join(PROMPTS[2])
    third.likeliest()
    third.close()
    then = tokens(rows, TOKENS - 6)  # type: ignore[arg-type]
    assert [a + b for a, b in zip(first, then, strict=True)] == [alone(model, one) for one in PROMPTS[:2]]
    assert recorder.recorded >= 2


def test_graphs_reach_as_far_as_their_rows(llama: Path, recorder: OpRecorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long row leaves room, in which a short one grows without a move."""
    monkeypatch.setattr(slots, "_STEP", 8)
    model = read(llama)
    batch = Batch(model, recorder=lambda: recorder)
    long, short = batch.join(PROMPTS[1]), batch.join(PROMPTS[3])
    said = tokens([short], 1)[0]  # type: ignore[list-item]
    long.close()
    version = batch._lanes[0].slots.version
    said += tokens([short], TOKENS - 1)[0]  # type: ignore[list-item]
    assert said == alone(model, PROMPTS[3])
    assert batch._lanes[0].slots.version == version


def test_graphs_follow_adapters_that_move(
    llama: Path, tmp_path: Path, recorder: OpRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(factors, "_PLACES", 3)
    base, laid = stocked(llama, tmp_path, 4)
    wanted = [answer(one, PROMPTS[0]) for one in laid]
    assert len(set(map(tuple, wanted))) == 4
    for together in ([0], [0, 1], [1, 0], [0, 0], [2, 1], [3], [3, 2, 0], [1, 3], [0], [0, 1, 2, 3], [2, 0]):
        rows = [laid[i].stream(PROMPTS[0]) for i in together]
        assert tokens(rows) == [wanted[i] for i in together], together
        for row in rows:
            row.close()
    laid[2].leave()
    again = base.lay_on(tmp_path / "2")
    rows = [one.stream(PROMPTS[0]) for one in (laid[3], again, laid[0])]
    assert tokens(rows) == [wanted[i] for i in (3, 2, 0)]
    assert recorder.replayed > 2 * recorder.recorded


def test_graphs_are_of_the_rows_adapters(llama: Path, tmp_path: Path, recorder: OpRecorder) -> None:
    """Three rows stay three when one with another adapter takes a slot, and nothing moves."""
    _, laid = stocked(llama, tmp_path, 2)
    wanted = answer(laid[0], PROMPTS[1])
    rows: list[Any] = [laid[i].stream(PROMPTS[j]) for i, j in ((0, 0), (1, 3), (0, 3))]
    tokens(rows, 6)
    rows.append(laid[0].stream(PROMPTS[1]))
    said = tokens(rows, 1)[3]
    rows.pop(1).close()
    said += tokens(rows, TOKENS - 1)[2]
    assert said == wanted


def test_adapter_that_moves_between_two_passes_of_one_row_is_found(
    llama: Path, tmp_path: Path, recorder: OpRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row alone reads its adapter where it is; another batch's pass may put a different one there."""
    monkeypatch.setattr(factors, "_PLACES", 2)
    base, laid = stocked(llama, tmp_path, 3)
    wanted = answer(laid[0], PROMPTS[1])
    pair = [one.stream(PROMPTS[1]) for one in laid[:2]]
    tokens(pair, 3)  # together, which gives them places
    for one in pair:
        one.close()  # type: ignore[attr-defined]
    answer(laid[2], PROMPTS[0])  # so that the next pass looks up the first again
    row = laid[0].stream(PROMPTS[1])
    said = tokens([row], 6)[0]
    stack = next(iter(base.bank._stacks.values()))
    with torch.inference_mode():
        stack.gather([one._factors for one in laid[1:]])
    said += tokens([row], TOKENS - 6)[0]
    assert said == wanted


def test_graphs_hold_no_adapter_that_has_left(llama: Path, tmp_path: Path, recorder: OpRecorder) -> None:
    base, laid = stocked(llama, tmp_path, 2)
    rows = [one.stream(PROMPTS[0]) for one in laid]
    tokens(rows)
    gone = weakref.ref(laid[1]._factors)
    rows.pop(1).close()
    laid.pop(1).leave()
    gc.collect()
    assert gone() is None
    assert base.batch._lanes[0]._graphs._recorded  # type: ignore[union-attr]


def test_adapters_of_one_shape_share_a_graph(llama: Path, tmp_path: Path, recorder: OpRecorder) -> None:
    """Whichever of them the rows have, in whatever order, and beside rows without an adapter."""
    base, laid = stocked(llama, tmp_path, 3)
    models: list[Any] = [base, *laid]
    wanted = [answer(one, PROMPTS[0]) for one in models]
    stays = laid[0].stream(PROMPTS[0])  # so that slots stay where they are
    stays.likeliest()
    first = recorder.recorded
    for others in ([1, 2], [2, 1], [3, 3], [0, 3], [0, 0]):
        rows = [models[i].stream(PROMPTS[0]) for i in others]
        assert tokens([stays, *rows])[1:] == [wanted[i] for i in others], others
        for row in rows:
            row.close()
    assert recorder.recorded - first == 1


def test_adapters_of_other_shapes_have_their_own_graph(llama: Path, tmp_path: Path, recorder: OpRecorder) -> None:
    base, laid = stocked(llama, tmp_path, 1)
    laid.append(base.lay_on(make(tmp_path / "4", llama, 4, r=4)))
    wanted = [answer(one, PROMPTS[0]) for one in laid]
    stays = base.stream(PROMPTS[1])
    stays.likeliest()
    first = recorder.recorded
    for i in (0, 1, 0, 1):
        row = laid[i].stream(PROMPTS[0])
        assert tokens([stays, row])[1] == wanted[i]
        row.close()
    assert recorder.recorded - first == 2


def test_adapters_that_come_and_go_drop_no_graph(llama: Path, tmp_path: Path, recorder: OpRecorder) -> None:
    base, laid = stocked(llama, tmp_path, 3)
    rows = [one.stream(PROMPTS[0]) for one in (laid[0], base)]
    said = tokens(rows, 6)
    first = recorder.recorded
    laid[2].leave()
    said = [a + b for a, b in zip(said, tokens(rows, 1), strict=True)]
    again = base.lay_on(tmp_path / "2")
    said = [a + b for a, b in zip(said, tokens(rows, 1), strict=True)]
    stack = next(iter(base.bank._stacks.values()))
    with torch.inference_mode():  # as prompts of these do that are read together
        stack.gather([laid[1]._factors, laid[0]._factors, again._factors])  # type: ignore[union-attr]
    said = [a + b for a, b in zip(said, tokens(rows, 1), strict=True)]
    assert recorder.recorded == first
    for row in rows:
        row.close()  # type: ignore[attr-defined]
    assert said == [answer(one, PROMPTS[0])[:9] for one in (laid[0], base)]


def test_lanes_keep_their_graphs(llama: Path, tmp_path: Path, recorder: OpRecorder) -> None:
    """Long rows and short ones, with and without adapters, in turns."""
    base, laid = stocked(llama, tmp_path, 2)
    wanted = [answer(laid[0], PROMPTS[0]), answer(laid[1], PROMPTS[4]), answer(base, PROMPTS[4])]
    batch = Batch(base.model, base.bank, long_tokens=40, recorder=lambda: recorder)
    first = recorder.recorded
    rows = [
        batch.join(prompt, adapter)
        for prompt, adapter in (
            (PROMPTS[0], laid[0]._factors), (PROMPTS[4], laid[1]._factors), (PROMPTS[4], None),
        )
    ]  # fmt: skip
    assert tokens(rows) == wanted  # type: ignore[arg-type]
    assert [len(lane.rows) for lane in batch._lanes.values()] == [1, 2]
    assert recorder.recorded - first == 2


@pytest.mark.parametrize("fault", ["wrong", "nan", "refused"])
def test_passes_that_cannot_be_recorded_rightly_are_not(
    llama: Path, recorder: OpRecorder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    right = recorder.record

    def record(work: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
        if fault == "refused":
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        logits, replay = right(work)
        wrong = torch.full_like(logits, torch.nan) if fault == "nan" else logits.clone().roll(1, dims=-1)
        return wrong, replay

    monkeypatch.setattr(recorder, "record", record)
    model = read(llama)
    with caplog.at_level(logging.WARNING, logger=decode_graphs.__name__):
        batch = Batch(model, recorder=lambda: recorder)
        rows = [batch.join(prompt) for prompt in PROMPTS[:2]]
        assert tokens(rows) == [alone(model, one) for one in PROMPTS[:2]]  # type: ignore[arg-type]
    [said] = [record.getMessage() for record in caplog.records if record.name == decode_graphs.__name__]  # only once
    assert "are not recorded as CUDA graphs" in said


def test_a_lack_of_memory_and_broken_weights_are_no_reason_to_give_up(recorder: OpRecorder) -> None:
    right, calls = recorder.record, 0

    def record(work: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise torch.OutOfMemoryError
        return right(work)

    recorder.record = record  # type: ignore[method-assign]
    graphs = DecodeGraphs(recorder)
    tokens, positions = torch.ones(2, 1), torch.ones(2, 1)
    for _ in range(4):  # one adapter's logits are NaN
        graphs.logits(0, "broken", (tokens, positions), lambda a, b: (a + b) * torch.nan)
    assert (calls, graphs.is_broken) == (0, False)
    for _ in range(6):
        graphs.logits(0, "right", (tokens, positions), lambda a, b: a + b)
    assert (calls, graphs.is_broken, list(graphs._recorded)) == (2, False, ["right"])


def test_one_row_that_differs_is_enough_to_give_up(recorder: OpRecorder) -> None:
    """One of 64 rows, by a tenth: of all rows together it is little more than a hundredth."""
    right = recorder.record

    def record(work: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
        logits, replay = right(work)
        wrong = logits.clone()
        wrong[7] *= 1.1
        return wrong, replay

    recorder.record = record  # type: ignore[method-assign]
    graphs = DecodeGraphs(recorder)
    for _ in range(3):
        graphs.logits(0, "rows", (torch.ones(64, 1), torch.ones(64, 1)), lambda a, b: a + b)
    assert graphs.is_broken


def test_a_batch_that_fails_keeps_no_graphs(llama: Path, recorder: OpRecorder) -> None:
    batch = Batch(read(llama), recorder=lambda: recorder)
    tokens([batch.join(PROMPTS[0])], 6)  # type: ignore[list-item]
    graphs = batch._lanes[0]._graphs
    assert graphs is not None
    assert graphs._recorded
    batch.fail(RuntimeError("lost"))
    assert not graphs._recorded


def test_requests_one_after_another_share_graphs(llama: Path, tmp_path: Path, recorder: OpRecorder) -> None:
    base, laid = stocked(llama, tmp_path, 1)
    wanted = [answer(one, PROMPTS[1]) for one in (base, laid[0])]
    first = recorder.recorded
    assert [answer(one, PROMPTS[1]) for one in (base, laid[0]) for _ in range(3)] == [wanted[0]] * 3 + [wanted[1]] * 3
    assert recorder.recorded == first
    laid[0].leave()
    base.leave()
    assert base.memory.nbytes == 0


def test_slots_rest_where_memory_is_scarce(llama: Path) -> None:
    model, recorder = read(llama), OpRecorder(bytes_each=2**20)
    batch = Batch(model, memory=CacheMemory(2**24), recorder=lambda: recorder)
    for place, prompt in enumerate((PROMPTS[0], PROMPTS[1], PROMPTS[3])):
        row = batch.join(prompt)
        assert tokens([row]) == [alone(model, prompt)]  # type: ignore[list-item]
        batch.memory.limit = batch.memory.nbytes  # no room but for what is held
        row.close()
        assert recorder.recorded == 1, place


def test_resting_slots_are_counted_while_a_row_waits_for_them(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "_STEP", 64)
    model, recorder = read(llama), OpRecorder()
    batch = Batch(model, memory=CacheMemory(2**24), recorder=lambda: recorder, long_tokens=40)
    short, long = batch.join(PROMPTS[0]), batch.join(PROMPTS[4])
    tokens([short, long], 6)  # type: ignore[list-item]
    short.close()
    memory, (resting, running) = batch.memory, batch._lanes.values()
    assert memory.nbytes == resting.slots.nbytes + running.slots.nbytes > running.slots.nbytes
    memory.limit = memory.nbytes - 1
    waits = batch.join(PROMPTS[0])
    said = tokens([long], 8)  # type: ignore[list-item]
    assert not resting.rows
    assert memory.nbytes == resting.slots.nbytes + running.slots.nbytes <= memory.limit
    long.close()
    assert tokens([waits]) == [alone(model, PROMPTS[0])]  # type: ignore[list-item]
    assert said == [alone(model, PROMPTS[4])[6:]]


def test_graphs_leave_for_rows(llama: Path) -> None:
    model = read(llama)
    memory, recorder = CacheMemory(2**24), OpRecorder(bytes_each=2**23)
    batch = Batch(model, memory=memory, recorder=lambda: recorder)
    rows = [batch.join(PROMPTS[0])]
    said = tokens(rows, 6)  # type: ignore[arg-type]
    assert memory.nbytes == batch.nbytes + recorder.nbytes == batch.nbytes + 2**23
    memory.limit = memory.nbytes + batch.nbytes
    rows += [batch.join(PROMPTS[1]), batch.join(PROMPTS[3])]  # slots for four rows
    more = tokens(rows, TOKENS - 6)  # type: ignore[arg-type]
    assert len(batch.rows) == 3
    assert recorder.nbytes == 0
    assert memory.nbytes == batch.nbytes <= memory.limit
    assert said[0] + more[0] == alone(model, PROMPTS[0])


def test_graphs_and_resting_slots_leave_for_another_base(llama: Path) -> None:
    model = read(llama)
    memory, recorders = CacheMemory(2**24), [OpRecorder(2**20), OpRecorder(2**20)]
    one, other = (Batch(model, memory=memory, recorder=lambda made=made: made) for made in recorders)  # type: ignore[misc]
    row = one.join(PROMPTS[0])
    tokens([row], 6)  # type: ignore[list-item]
    needed = one.nbytes
    row.close()
    assert (one.nbytes, memory.nbytes) == (0, needed + 2**20)
    memory.limit = needed
    assert tokens([other.join(PROMPTS[1])]) == [alone(model, PROMPTS[1])]  # type: ignore[list-item]
    assert memory.nbytes == other.nbytes == needed
    assert one._lanes[0].slots.nbytes == recorders[0].nbytes == 0


def test_a_step_for_which_there_is_no_room_is_recorded_once(llama: Path) -> None:
    model = read(llama)
    memory, recorder = CacheMemory(2**24), OpRecorder(bytes_each=2**24)
    batch = Batch(model, memory=memory, recorder=lambda: recorder)
    row = batch.join(PROMPTS[0])
    assert tokens([row]) == [alone(model, PROMPTS[0])]  # type: ignore[list-item]
    assert (recorder.recorded, recorder.nbytes) == (1, 0)
    assert memory.nbytes == batch.nbytes
    memory.limit *= 2
    tokens([row], 6)  # type: ignore[list-item]
    assert (recorder.recorded, recorder.nbytes) == (2, 2**24)


def test_the_least_used_graphs_leave_first(llama: Path) -> None:
    model = read(llama)
    memory, recorders = CacheMemory(2**26), [OpRecorder(2**24) for _ in range(3)]
    batches = [Batch(model, memory=memory, recorder=lambda made=made: made) for made in recorders]  # type: ignore[misc]
    rows = [batch.join(PROMPTS[0]) for batch in batches[:2]]
    tokens(rows, 6)  # type: ignore[arg-type]
    tokens(rows[:1], 1)  # type: ignore[arg-type]
    memory.limit = memory.nbytes + 2**20  # room for a third row's slots
    tokens([batches[2].join(PROMPTS[0])], 6)  # type: ignore[list-item]
    assert [recorder.nbytes for recorder in recorders] == [2**24, 0, 2**24]


def test_few_graphs_are_kept(llama: Path, recorder: OpRecorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_graphs, "MOST", 1)
    model = read(llama)
    batch = Batch(model, recorder=lambda: recorder)
    one = batch.join(PROMPTS[0])
    assert tokens([one], 6)  # type: ignore[list-item]
    other = batch.join(PROMPTS[1])
    assert tokens([one, other], 6)  # type: ignore[list-item]
    (kept,) = batch._lanes[0]._graphs._recorded  # type: ignore[union-attr]
    assert kept[0] == 2  # type: ignore[index]


def test_a_cpu_records_nothing(llama: Path) -> None:
    assert recorder_for(read(llama)) is None


def needs_gpu(test: Any) -> Any:
    reason = "no CUDA device: run this on a host with a GPU"
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason=reason)(test))


@needs_gpu
def test_a_gpu_replays_graphs_and_answers_as_passes_alone(llama: Path, tmp_path: Path) -> None:
    folders = [make(tmp_path / str(seed), llama, seed, r=rank) for seed, rank in enumerate((8, 8, 64))]
    base = Base(Source(llama, None, "cuda", torch.float32, graphs=True), CacheMemory(2**30))
    laid = [base, *(base.lay_on(folder) for folder in folders)]
    wanted = [answer(one, PROMPTS[1]) for one in laid]
    graphs = base.batch._lanes[0]._graphs  # type: ignore[union-attr]
    for together in ([0], [1], [0, 0, 0], [1, 2], [2, 1], [1, 2, 3, 0], [3, 3, 1], [0, 2]):
        rows = [laid[i].stream(PROMPTS[1]) for i in together]
        assert tokens(rows) == [wanted[i] for i in together], together
        assert graphs._recorded, together  # type: ignore[union-attr]
        for row in rows:
            row.close()


@needs_gpu
def test_a_gpu_keeps_graphs_while_adapters_come_and_go(llama: Path, tmp_path: Path) -> None:
    memory = CacheMemory(2**30)
    base = Base(Source(llama, None, "cuda", torch.float32, graphs=True), memory)
    laid = [base.lay_on(make(tmp_path / str(seed), llama, seed)) for seed in range(4)]
    wanted = [answer(one, PROMPTS[1]) for one in laid]
    graphs = base.batch._lanes[0]._graphs  # type: ignore[union-attr]
    held = dict(graphs._recorded)  # type: ignore[union-attr]
    assert held
    laid[3].leave()
    laid[3] = base.lay_on(tmp_path / "3")
    assert [answer(one, PROMPTS[1]) for one in laid] == wanted
    assert dict(graphs._recorded) == held  # type: ignore[union-attr]
    rows = [one.stream(PROMPTS[1]) for one in (*laid, *reversed(laid))]  # read together, which moves them
    assert tokens(rows) == wanted + wanted[::-1]


@needs_gpu
def test_a_gpus_graphs_count_in_the_memory(llama: Path) -> None:
    memory = CacheMemory(2**30)
    base = Base(Source(llama, None, "cuda", torch.float32, graphs=True), memory)
    row = base.stream(PROMPTS[1])
    tokens([row])
    batch, reserved = base.batch, torch.cuda.memory_reserved()
    recorder = batch._lanes[0]._graphs._recorder  # type: ignore[union-attr]
    assert memory.nbytes == batch.nbytes + recorder.nbytes > batch.nbytes  # type: ignore[union-attr]
    held = recorder.nbytes
    batch._lanes[0]._graphs.clear()  # type: ignore[union-attr]
    batch._lanes[0].slots.place([0], [[0]])  # in place of those of the last pass, which are in the graph's memory
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert recorder.nbytes == 0
    assert torch.cuda.memory_reserved() <= reserved - held
