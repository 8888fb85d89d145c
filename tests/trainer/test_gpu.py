"""Tests that need a CUDA device: `pytest -m gpu tests/trainer/test_gpu.py`."""

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import bitsandbytes
import pytest
import torch
from eight_bit_steps import Steps
from peft import LoraConfig, get_peft_model
from run_folders import Ear, chat, lay_out, plan, said
from torch import Tensor, nn
from torch.autograd import DeviceType

from bench import make_model
from tunery.spec import Dpo, Evaluation, Full, Lora, Qlora
from worker.trainer import checkpoints, embeddings, packing
from worker.trainer.adamw import StochasticAdamW
from worker.trainer.general import benchmark, choices
from worker.trainer.kernels import accumulation, adamw, adapters, casts, projections, stochastic
from worker.trainer.loop import _take_step
from worker.trainer.recorded_update import can_record
from worker.trainer.report import MessageWriter
from worker.trainer.run import carry_out, prepare, record_ahead
from worker.trainer.stop_signal import StopSignal
from worker.trainer.training import Progress

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:inner dimension:UserWarning"),  # the tiny model's layers are narrow
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: run these on a host with a GPU"),
]
ROWS = [chat(i, words=2 + i % 5) for i in range(24)]
EACH_TECHNIQUE = pytest.mark.parametrize(
    "technique",
    [Lora(r=4), Qlora(r=4), Full(), Full(weights_dtype="float32")],
    ids=["lora", "qlora", "full", "full in fp32"],
)


Recorded = Literal["never", "in the steps", "ahead"]


def losses(
    folder: Path, base: Path, recorded: Recorded, recompute: int = 0, offload: bool = False, **changes: Any
) -> list[tuple[float, float]]:
    t = prepare(lay_out(folder, base, plan(n_epochs=6, **changes), ROWS), MessageWriter(None), StopSignal())
    t.stepper.adopt(replace(t.stepper.memory, recompute=recompute, offload=offload))
    assert t.stepper.graphs is not None
    if recorded == "never":
        t.stepper.adopt(replace(t.stepper.memory, graphs=False))
    progress = Progress()
    if recorded == "ahead":
        record_ahead(t, progress)
        before = t.stepper.graphs.count
        assert before > 0
    steps = [_take_step(t, progress)[0] for _ in range(t.total_steps)]
    if recorded != "never":
        assert t.stepper.graphs is not None
        assert not t.stepper.graphs.failed
        assert t.stepper.graphs.count > 0
        assert recorded == "in the steps" or t.stepper.graphs.count == before
        update = t.stepper._recorded
        assert (update is not None) == can_record(t.optimizer)
        assert update is None or update._replay is not None
    return [(step.train_loss, step.grad_norm) for step in steps]


@EACH_TECHNIQUE
def test_recorded_passes_train_as_usual_ones_do(tmp_path: Path, tiny: Path, technique: Any) -> None:
    rate = 1e-4 if isinstance(technique, Full) else 1e-3
    when: tuple[Recorded, ...] = ("never", "in the steps", "ahead")
    usual, *recorded = (losses(tmp_path / each, tiny, each, technique=technique, learning_rate=rate) for each in when)

    for found in recorded:
        for (loss, norm), (other_loss, other_norm) in zip(usual, found, strict=True):
            assert other_loss == pytest.approx(loss, rel=0.02)
            assert other_norm == pytest.approx(norm, rel=0.1)


def test_recorded_passes_of_a_mixture_train_as_usual_ones_do(tmp_path: Path) -> None:
    make_model.make(tmp_path / "base", "small-moe")
    when: tuple[Recorded, ...] = ("never", "ahead")
    how: dict[str, Any] = {"technique": Lora(r=8), "learning_rate": 1e-4}
    usual, found = (losses(tmp_path / each, tmp_path / "base", each, **how) for each in when)

    for (loss, norm), (other_loss, other_norm) in zip(usual, found, strict=True):
        assert other_loss == pytest.approx(loss, rel=0.02)
        assert other_norm == pytest.approx(norm, rel=0.1)


@pytest.mark.parametrize("offload", [False, True], ids=["on the device", "from the host"])
@pytest.mark.parametrize("technique", [Lora(r=4), Qlora(r=4)], ids=["lora", "qlora"])
def test_recorded_passes_recompute_layers(tmp_path: Path, tiny: Path, technique: Any, offload: bool) -> None:
    how: dict[str, Any] = {"technique": technique, "learning_rate": 1e-3}
    usual = losses(tmp_path / "usual", tiny, "never", **how)
    found = losses(tmp_path / "recorded", tiny, "ahead", recompute=2, offload=offload, **how)

    for (loss, norm), (other_loss, other_norm) in zip(usual, found, strict=True):
        assert other_loss == pytest.approx(loss, rel=0.02)
        assert other_norm == pytest.approx(norm, rel=0.1)


def of_recordings() -> int:
    """Returns the bytes that torch has reserved for recordings."""
    return sum(one["total_size"] for one in torch.cuda.memory_snapshot() if one["segment_pool_id"] != (0, 0))


@pytest.mark.parametrize("offload", [False, True], ids=["on the device", "from the host"])
@pytest.mark.parametrize("failing", ["_forward", "_backward"])
def test_recording_that_fails_leaves_no_memory_behind(
    tmp_path: Path, tiny: Path, failing: str, offload: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    t, progress = prepare(lay_out(tmp_path / "run", tiny, plan(), ROWS), MessageWriter(None), StopSignal()), Progress()
    t.stepper.adopt(replace(t.stepper.memory, recompute=2, offload=offload))
    usual, calls = getattr(projections, failing), 0

    def fails(*of: Any) -> Any:
        nonlocal calls
        calls += (recording := torch.cuda.is_current_stream_capturing())
        if recording and calls == 3:
            raise torch.OutOfMemoryError("made for this test")
        return usual(*of)

    monkeypatch.setattr(projections, failing, fails)
    record_ahead(t, progress)
    assert t.stepper.graphs is not None
    assert t.stepper.graphs.failed
    assert math.isfinite(_take_step(t, progress)[0].train_loss)
    t.stepper.adopt(replace(t.stepper.memory, graphs=False))

    assert of_recordings() == 0
    assert math.isfinite(_take_step(t, progress)[0].train_loss)


def test_recordings_leave_no_memory_behind(tmp_path: Path, tiny: Path) -> None:
    t, progress = prepare(lay_out(tmp_path / "run", tiny, plan(), ROWS), MessageWriter(None), StopSignal()), Progress()
    before = torch.cuda.memory_allocated()
    record_ahead(t, progress)
    _take_step(t, progress)
    assert t.stepper.graphs is not None
    assert t.stepper.graphs.count > 0
    t.stepper.rest()

    assert of_recordings() == 0
    assert torch.cuda.memory_allocated() - before < 2**20  # what cuBLAS works in would be 64 MiB


@EACH_TECHNIQUE
def test_technique_runs_from_directory_to_artifact(tmp_path: Path, tiny: Path, technique: Any) -> None:
    folder = lay_out(tmp_path / "run", tiny, plan(technique=technique), ROWS, ROWS[:4], ROWS[:4])

    assert carry_out(folder, MessageWriter(None), StopSignal())

    assert (folder / "out" / "parity.json").exists()


def test_embedding_in_the_hosts_memory_is_looked_up_as_before(tmp_path: Path, tiny: Path) -> None:
    found = []
    for on_host in (False, True):
        folder = lay_out(tmp_path / str(on_host), tiny, plan(technique=Lora(r=4)), ROWS)
        t, progress = prepare(folder, MessageWriter(None), StopSignal()), Progress()
        weight = t.objective.causal.get_input_embeddings().weight
        if on_host:
            before, _as_loaded = weight.detach().clone(), weight.detach()
            allocated = torch.cuda.memory_allocated()
            assert embeddings.move_to_host(t.objective) == weight.nbytes
            assert torch.cuda.memory_allocated() <= allocated - weight.nbytes
            assert weight.is_cuda
            assert torch.equal(weight, before)
        found.append([_take_step(t, progress)[0].train_loss for _ in range(t.total_steps)])

    assert found[1] == pytest.approx(found[0], rel=0.01)


def test_packed_rows_keep_apart(tmp_path: Path, tiny: Path) -> None:
    t = prepare(lay_out(tmp_path / "run", tiny, plan(), ROWS), MessageWriter(None), StopSignal())

    assert packing.keeps_rows_apart(t.objective, t.rows.rows, t.device)


def test_four_bit_layer_on_the_gpu_has_the_gradients_of_the_definition() -> None:
    base = bitsandbytes.nn.Linear4bit(512, 256, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16)
    base.load_state_dict({"weight": torch.randn(256, 512, dtype=torch.bfloat16)})
    layer = get_peft_model(
        nn.Sequential(base.to("cuda")), LoraConfig(r=8, target_modules=["0"], init_lora_weights=False)
    ).base_model.model[0]
    adapters.install(layer.to("cuda"))
    dense = bitsandbytes.functional.dequantize_4bit(base.weight.data, base.weight.quant_state).double()
    tensors = [torch.randn(64, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)]
    tensors += [layer.lora_A.default.weight, layer.lora_B.default.weight]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    grad = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    wanted = projections.plain(exact[0], dense, exact[1], exact[2], layer.scaling["default"])
    wanted.backward(grad.double())

    out = layer(tensors[0])
    out.backward(grad)

    for found, reference in [(out, wanted), *((t.grad, e.grad) for t, e in zip(tensors, exact, strict=True))]:
        assert float((found.detach().double() - reference.detach()).norm() / reference.detach().norm()) < 1e-2


def _projected(x: Tensor, layers: list[projections.Layer]) -> list[Tensor]:
    """Returns the layers' products, and the gradients of their input and adapters."""
    given = [x, *(part for layer in layers for part in (layer.a, layer.b))]
    outs = projections.project(x, layers)
    return [*outs, *torch.autograd.grad([out.float().pow(2).sum() for out in outs], given)]


def _adapted() -> list[projections.Layer]:
    ranks, widths = (16, 3, 8), (512, 128, 640)
    return [
        projections.Layer(
            nn.Linear(256, width, bias=False, device="cuda", dtype=torch.bfloat16).requires_grad_(False),
            torch.randn(rank, 256, device="cuda", requires_grad=True),
            torch.randn(width, rank, device="cuda", requires_grad=True),
            0.5,
        )
        for rank, width in zip(ranks, widths, strict=True)
    ]


def test_adapters_that_are_cast_at_once_have_the_products_of_those_that_layers_cast() -> None:
    layers = _adapted()
    made = casts.Casts([casts.Adapter(each.a, each.b, torch.bfloat16, "x") for each in layers])
    made.update()
    x = torch.randn(300, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    wanted = _projected(x, layers)
    found = _projected(x, [replace(each, cast=made.of(each.a, each.b)) for each in layers])

    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def _kernels(work: Callable[[], None]) -> list[str]:
    """Returns the names of the kernels that run."""
    # torch 2.11 warns of whatever it does with a profile.
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with warnings.catch_warnings(action="ignore"), torch.profiler.profile(activities=activities) as profile:
        work()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if event.device_type == DeviceType.CUDA]


def test_gradients_of_adapters_are_added_by_one_launch() -> None:
    layers = _adapted()
    factors = [part for layer in layers for part in (layer.a, layer.b)]
    x = torch.randn(300, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def loss() -> Tensor:
        return torch.stack([out.float().pow(2).sum() for out in projections.project(x, layers)]).sum()

    loss().backward()
    loss().backward()
    wanted = [factor.grad for factor in factors]
    for factor in factors:
        factor.grad = None
    loss().backward()
    again = loss()

    def add() -> None:
        with accumulation.together():
            again.backward()

    names = _kernels(add)

    assert sum("multi_tensor_apply" in name for name in names) == 1
    for factor, total in zip(factors, wanted, strict=True):
        assert factor.grad is not None
        assert total is not None
        assert torch.equal(factor.grad, total)


def test_adapters_of_a_model_are_cast_in_a_few_launches() -> None:
    sizes = {"device": "cuda", "requires_grad": True}
    pairs = [(torch.randn(16, 256, **sizes), torch.randn(512, 16, **sizes)) for _ in range(112)]  # 16 layers of 7
    made = casts.Casts([casts.Adapter(a, b, torch.bfloat16, i // 4) for i, (a, b) in enumerate(pairs)])
    made.update()

    assert 0 < len(_kernels(made.update)) <= 4
    for a, b in pairs:
        found = made.of(a, b)
        assert found is not None
        assert torch.equal(found.a, a.bfloat16())
        assert torch.equal(found.b, b.bfloat16())


@pytest.mark.parametrize("count", [8192, 3 * 8192 + 77, 5_000_000])
@pytest.mark.parametrize("keep", [1.0, 0.9999])
def test_triton_rounds_as_the_reference_does(count: int, keep: float) -> None:
    weight = (torch.randn(count, device="cuda") * 0.04).bfloat16()
    update = (torch.randn(count, device="cuda") * 2e-5).bfloat16()
    found, left = weight.clone(), update.clone()
    seed = stochastic.seed_of(7, 3, "weight")

    stochastic.add(found, left, keep, seed, first=stochastic.BLOCK)
    stochastic.plain(weight, update, keep, seed, first=stochastic.BLOCK)

    assert not left.any()
    # A fused multiply-add is exact if keep is 1; otherwise its last fp32 bit may rarely change the bf16 result.
    assert int((found != weight).sum()) <= (0 if keep == 1 else count // 1000)


@pytest.mark.parametrize("own", [False, True], ids=["bitsandbytes", "own kernel"])
def test_steps_on_the_gpu_are_those_of_fp32_adamw(tmp_path: Path, own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over steps of both signs and several chunks, the means agree within the noise of 8-bit moments."""
    monkeypatch.setattr(adamw, "agrees", lambda _device: own)
    count, rate = 20_000_000, 2e-5
    ours = nn.Parameter((torch.randn(count, device="cuda") * 0.04).bfloat16())
    exact = nn.Parameter(ours.detach().float())
    before = exact.detach().clone()
    made = StochasticAdamW([{"params": [("weight", ours)], "weight_decay": 0.0}], rate, seed=1)
    reference = torch.optim.AdamW([exact], lr=rate, weight_decay=0.0)
    for _ in range(10):
        grad = torch.randn(count, device="cuda") + torch.where(torch.arange(count, device="cuda") % 2 == 0, 1.0, -1.0)
        ours.grad, exact.grad = grad.bfloat16(), grad
        made.step()
        reference.step()

    moved, wanted = (p.detach().float() - before for p in (ours, exact))
    for half in (slice(0, None, 2), slice(1, None, 2)):
        assert moved[half].mean().item() == pytest.approx(wanted[half].mean().item(), rel=0.01)
    # Each weight differs only by its own rounding, a few bf16 steps at 0.04, not by a fraction of its movement.
    assert (moved - wanted).std().item() < 5e-4


@pytest.mark.parametrize("paged", [False, True])
def test_eight_bit_steps_of_buckets_on_the_gpu_are_those_of_bitsandbytes(paged: bool) -> None:
    made = Steps("cuda", paged=paged)
    made.take(3)
    made.take(2, without=[4])

    made.assert_same()
    names = _kernels(made.ours.step)
    # The two parts of a bucket beside the parameter without a gradient, the second group's bucket, the matrix that ends
    # within a block; and the large one, if it is paged.
    assert sum("Static8bit" in name for name in names) == 4 + paged
    assert len(names) < len(made.parameters)


@pytest.mark.parametrize("technique", [Lora(r=4), Qlora(r=4), Full()], ids=["lora", "qlora", "full"])
def test_branches_and_rows_score_alike(tmp_path: Path, tiny: Path, technique: Any) -> None:
    """The attention of the fast path's layers, in bf16, must respect a mask of any form."""
    t = prepare(
        lay_out(tmp_path / "run", tiny, plan(technique=technique, learning_rate=1e-3), ROWS),
        MessageWriter(None),
        StopSignal(),
    )
    items = [benchmark.encode(t.template.tokenizer, item) for item in benchmark.load_items(40)]
    t.objective.eval()

    assert choices.keeps_branches_apart(t, items)
    with torch.no_grad(), t.objective.computing():
        one, other = (
            torch.tensor([value for each in way(t.objective, items, t.device) for value in each])
            for way in (choices.by_branches, choices.by_rows)
        )
    assert float((one - other).norm() / other.norm()) < 0.02


@EACH_TECHNIQUE
def test_preferences_are_learned_on_a_gpu(tmp_path: Path, tiny: Path, ear: Ear, technique: Any) -> None:
    """A step's own forward pass measures the reference, so the first loss is log 2 up to the rounding of bf16."""
    pairs = [
        {"prompt": row["messages"][:1], "chosen": row["messages"][1:], "rejected": f"no {number}"}
        for number, row in enumerate(ROWS)
    ]
    rate = 1e-3 if isinstance(technique, Full) else 1e-2
    asked = plan(method=Dpo(), technique=technique, n_epochs=6, learning_rate=rate)
    folder = lay_out(tmp_path / "run", tiny, asked, pairs, pairs[:5])

    assert carry_out(folder, MessageWriter(ear.descriptor), StopSignal())

    first, *_, last = said(ear, "step")
    assert first.train_loss == pytest.approx(math.log(2), abs=0.02)
    assert last.train_loss < 0.8 * first.train_loss
    assert last.train_metrics["rewards_margin"] > 0
    assert (folder / "snapshots" / "reference.safetensors").exists()


def test_general_benchmark_is_measured_whole_on_a_gpu(tmp_path: Path, tiny: Path, ear: Ear) -> None:
    evaluation = Evaluation(test_file="file-test", max_new_tokens=4)
    folder = lay_out(tmp_path / "run", tiny, plan(evaluation=evaluation), ROWS, test=ROWS[:2])

    assert carry_out(folder, MessageWriter(ear.descriptor), StopSignal())

    general = said(ear, "score")[-1].general
    assert general.items > 500  # those of the 800 that fit the tiny model's context
    assert general.forgetting.prompts > 50
    assert abs(general.forgetting.base_nll) > 0


@pytest.mark.parametrize("technique", [Lora(r=8), Qlora(r=8)], ids=["lora", "qlora"])
@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True},
        {"use_rslora": True, "lora_plus_ratio": 4.0},
        {"modules_to_save": ["lm_head", "embed_tokens"]},
        {"trainable_token_indices": [1, 2]},
    ],
    ids=str,
)
def test_options_of_adapters_train_in_bf16(tmp_path: Path, tiny: Path, technique: Any, changes: dict[str, Any]) -> None:
    settled = plan(technique=technique.model_copy(update=changes), n_epochs=6, neftune_noise_alpha=5.0)
    folder = lay_out(tmp_path / "run", tiny, settled, ROWS)
    writer = MessageWriter(None)

    assert carry_out(folder, writer, StopSignal())

    losses = [entry["train_loss"] for entry in writer.metrics if entry["type"] == "step"]
    assert losses[-1] < 0.8 * losses[0]


def test_paged_moments_are_paged_after_a_resume_and_the_same(tmp_path: Path, tiny: Path) -> None:
    settled = plan(technique=Full(weights_dtype="float32"), optimizer="paged_adamw_8bit", learning_rate=1e-4)
    t, again = (
        prepare(lay_out(tmp_path / name, tiny, settled, ROWS), MessageWriter(None), StopSignal()) for name in ("a", "b")
    )
    progress = Progress()
    for _ in range(3):
        _take_step(t, progress)
    checkpoints.save_snapshot(t, progress)

    checkpoints.restore(again, t.folder / "snapshots" / "step-3")

    for name, parameter in t.parameters.items():
        state, restored = t.optimizer.state[parameter], again.optimizer.state[again.parameters[name]]
        for key in ("state1", "state2", "absmax1", "absmax2"):
            assert (key in state) == (key in restored)
            if key in state:
                assert torch.equal(state[key].cpu(), restored[key].cpu()), (name, key)
                assert getattr(state[key], "is_paged", False) == getattr(restored[key], "is_paged", False), (name, key)
