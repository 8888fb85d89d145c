"""The precision of a run's tensors, and the stochastic rounding that lets updates reach bf16 weights."""

import json
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from run_folders import chat, lay_out, plan
from torch import Tensor, nn

from tunery.planning import changes, memory
from tunery.planning.precision import Precision, decide
from tunery.spec import Full, Lora, Qlora
from worker.trainer import checkpoints, loop
from worker.trainer.adamw import SMALL, StochasticAdamW
from worker.trainer.kernels import adamw, stochastic
from worker.trainer.recipes.full import FULL
from worker.trainer.report import MessageWriter
from worker.trainer.run import carry_out, prepare
from worker.trainer.stop_signal import StopSignal
from worker.trainer.training import Progress

BF16_FULL = decide(Full(), "cuda")
ROWS = [chat(i) for i in range(10)]
RATE = 2e-5


@pytest.mark.parametrize(
    ("technique", "device", "wanted"),
    [
        (Full(), "cuda", Precision("bfloat16", "bfloat16", "bfloat16", "stochastic", "int8", "bfloat16")),
        (
            Full(weights_dtype="float32"),
            "cuda",
            Precision("float32", "float32", "float32", "nearest", "float32", "bfloat16"),
        ),
        (Lora(), "cuda", Precision("bfloat16", "bfloat16", "float32", "nearest", "float32", "bfloat16")),
        (Qlora(), "cuda", Precision("nf4", "bfloat16", "float32", "nearest", "float32", "bfloat16", True)),
        (Full(), "cpu", Precision("float32", "float32", "float32", "nearest", "float32", "float32")),
        (Lora(), "cpu", Precision("float32", "float32", "float32", "nearest", "float32", "float32")),
        (
            Qlora(quant_type="fp4", double_quant=False),
            "cpu",
            Precision("fp4", "float32", "float32", "nearest", "float32", "bfloat16", False),
        ),
    ],
)
def test_precision_follows_from_technique_and_device(technique: Any, device: str, wanted: Precision) -> None:
    assert decide(technique, device) == wanted


def test_estimate_counts_the_bytes_of_the_precision() -> None:
    model_info = {
        "hidden_size": 2048, "num_hidden_layers": 16, "vocab_size": 32_000, "intermediate_size": 8192,
        "params": 1_000_000_000,
    }  # fmt: skip
    narrow, wide = (
        memory.estimate(model_info, Full(weights_dtype=dtype), max_seq_length=512).parts
        for dtype in ("bfloat16", "float32")
    )

    assert [narrow[part] for part in ("base", "gradients", "optimizer")] == [2e9, 2e9, 2e9 * (1 + 4 / 256)]
    assert [wide[part] for part in ("base", "gradients", "optimizer")] == [4e9, 4e9, 8e9]


def test_too_large_masters_are_advised_to_be_bf16() -> None:
    model_info = {"hidden_size": 2048, "num_hidden_layers": 16, "vocab_size": 32_000, "params": 1_000_000_000}

    with pytest.raises(Exception, match=r"Use technique\.weights_dtype 'bfloat16', which needs about"):
        changes.check(model_info, Full(weights_dtype="float32"), max_seq_length=512, capacity=12 * 2**30)


def test_rounding_is_right_on_average() -> None:
    """Tests every sixteenth between bf16(0.04) and the next value, on both sides of zero."""
    low = torch.tensor(0.04).bfloat16().float()
    high = torch.nextafter(low.bfloat16(), torch.tensor(1.0).bfloat16()).float()
    draws = 2**16
    for sixteenth in range(17):
        for sign in (1, -1):
            exact = sign * (low + (high - low) * sixteenth / 16)
            noise = stochastic.noise(stochastic.seed_of(0, sixteenth, str(sign)), 0, draws)
            rounded = stochastic.rounded(exact.expand(draws).contiguous(), noise).float()

            assert set(rounded.abs().tolist()) <= {float(low), float(high)}
            spread = float((high - low) / 2 / draws**0.5)
            assert float(rounded.mean()) == pytest.approx(float(exact), abs=4 * spread + 1e-9)


def test_noise_is_uniform_and_differs_by_seed_step_and_tensor() -> None:
    seeds = [stochastic.seed_of(*which) for which in ((0, 1, "a"), (1, 1, "a"), (0, 2, "a"), (0, 1, "b"))]
    drawn = [stochastic.noise(seed, 0, 2**18).double() for seed in seeds]

    for one in drawn:
        assert (int(one.min()), int(one.max())) >= (0, 2**16 - 100)
        assert float(one.mean()) == pytest.approx(2**15, rel=0.005)
        assert float(one.std()) == pytest.approx(2**16 / 12**0.5, rel=0.005)
        assert abs(float(torch.corrcoef(torch.stack([one[:-1], one[1:]]))[0, 1])) < 0.01
    assert float(torch.corrcoef(torch.stack(drawn)).triu(1).abs().max()) < 0.01


def test_noise_of_a_part_is_that_part_of_the_whole() -> None:
    whole = stochastic.noise(5, 0, 3 * stochastic.BLOCK)

    assert torch.equal(stochastic.noise(5, 2 * stochastic.BLOCK, 100), whole[2 * stochastic.BLOCK :][:100])


def test_no_update_changes_no_weight() -> None:
    weight = torch.randn(10_000).bfloat16()
    before = weight.clone()

    stochastic.add(weight, torch.zeros_like(weight), 1.0, seed=1)

    assert torch.equal(weight, before)


def weights(count: int = 2**17) -> nn.Parameter:
    """Returns bf16 weights of a usual spread."""
    return nn.Parameter((torch.randn(count, generator=torch.Generator().manual_seed(0)) * 0.04).bfloat16())


def optimizer(parameter: nn.Parameter, seed: int = 0, **settings: Any) -> StochasticAdamW:
    group = {"params": [("weight", parameter)], "weight_decay": settings.pop("weight_decay", 0.0)}
    return StochasticAdamW([group], RATE, seed, **settings)


def steps(made: torch.optim.Optimizer, parameter: nn.Parameter, grads: list[Tensor]) -> nn.Parameter:
    for grad in grads:
        parameter.grad = grad.to(parameter.dtype)
        made.step()
    return parameter


def arrived(parameter: nn.Parameter, count: int, before: Tensor) -> float:
    """Returns how far the weights have moved, as a fraction of `count` unit steps of Adam."""
    return float((before - parameter.detach().float()).mean() / (count * RATE))


def test_unit_steps_arrive_where_rounding_to_nearest_loses_most() -> None:
    ones = [torch.ones(2**17)] * 8
    plain, ours = weights(), weights()
    before = plain.detach().float()

    steps(bitsandbytes.optim.AdamW8bit([plain], lr=RATE, weight_decay=0.0), plain, ones)
    steps(optimizer(ours), ours, ones)

    assert arrived(plain, 8, before) < 0.25
    assert arrived(ours, 8, before) == pytest.approx(1, abs=0.02)


def test_no_weight_stands_still_for_long() -> None:
    """Forty steps are three to twenty times the spacing of these weights, so hardly any may be unchanged."""
    plain, ours = weights(2**14), weights(2**14)
    before = plain.detach().clone()
    watched = before.abs() < 0.06

    steps(bitsandbytes.optim.AdamW8bit([plain], lr=RATE, weight_decay=0.0), plain, [torch.ones(2**14)] * 40)
    steps(optimizer(ours), ours, [torch.ones(2**14)] * 40)

    still = [float((p == before)[watched].float().mean()) for p in (plain, ours)]
    assert still[0] > 0.5
    assert still[1] < 0.05


@pytest.mark.parametrize("weight_decay", [0.0, 2.0])
def test_weights_go_where_fp32_adamw_takes_them(weight_decay: float) -> None:
    """Compares means over many weights, whose rounding errors are independent."""
    numbers = torch.Generator().manual_seed(1)
    grads = [torch.randn(2**17, generator=numbers) + 1 for _ in range(20)]
    ours = weights()
    exact = nn.Parameter(ours.detach().float())
    before = exact.detach().clone()

    steps(torch.optim.AdamW([exact], lr=RATE, weight_decay=weight_decay), exact, grads)
    steps(optimizer(ours, weight_decay=weight_decay), ours, grads)

    moved, wanted = (p.detach().float() - before for p in (ours, exact))
    assert float(moved.mean()) == pytest.approx(float(wanted.mean()), rel=0.02)
    # The decay contributes 0.17 in all; the noise of the rounding is 0.006.
    assert float(moved @ before) == pytest.approx(float(wanted @ before), abs=0.03)


@pytest.mark.parametrize("count", [SMALL - 1, 2**17 + 5])
def test_chunks_and_ranks_round_alike(count: int) -> None:
    grads = list(torch.randn(3, count, generator=torch.Generator().manual_seed(2)))
    whole, chunked, other = weights(count), weights(count), weights(count)

    steps(optimizer(whole), whole, grads)
    steps(optimizer(chunked, chunk=2 * stochastic.BLOCK), chunked, grads)
    steps(optimizer(other, seed=1), other, grads)

    assert torch.equal(whole, chunked)
    assert torch.equal(whole, other) == (count < SMALL)  # small tensors have fp32 masters and no noise


def broken(name: str) -> adamw.Kernel:
    """Returns a kernel that computes the definition with one fault."""

    def kernel(weight: Tensor, grad: Tensor, moments: list[Tensor], number: int, group: Any, *rounding: int) -> None:
        if name == "sign":
            grad = -grad
        if name == "step not counted":
            number = 1
        if name == "another noise":
            rounding = rounding[0] + 1, rounding[1]
        adamw.plain(weight, grad, moments, number, group, *rounding)
        if name == "last block's scale":
            moments[2][-1] *= 1.1
        if name == "next code":
            moments[1].copy_((moments[1].int() + 1).clamp(max=255))

    return kernel


@pytest.mark.parametrize("fault", ["sign", "step not counted", "another noise", "last block's scale", "next code"])
def test_kernel_with_a_fault_does_not_compute_the_definition(fault: str) -> None:
    cpu = torch.device("cpu")
    assert adamw.computes_the_definition(broken("nothing"), cpu)
    assert not adamw.computes_the_definition(broken(fault), cpu)


def test_definition_takes_the_step_of_adam_and_the_nearest_codes() -> None:
    weight, grad = weights(1000).detach(), torch.randn(1000).bfloat16() * 1e-3
    before = weight.float()
    codes = [torch.zeros(1000, dtype=torch.uint8) for _ in range(2)]
    scales = [torch.zeros(4) for _ in range(2)]
    group = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}

    adamw.plain(weight, grad, [*codes, *scales], 1, group, stochastic.seed_of(0, 1, "weight"), 0)

    # The first step of Adam has the size of the rate; the spacing of bf16 near 0.06 is 2**-12.
    assert torch.allclose(weight.float(), before - 1e-2 * grad.float().sign(), rtol=2**-7, atol=1e-4)
    for moment, table, code, scale in zip(
        (0.1 * grad.float(), 0.001 * grad.float() ** 2), adamw.tables(torch.device("cpu")), codes, scales, strict=True
    ):
        whole = torch.nn.functional.pad(moment, (0, 24)).view(4, 256)
        assert torch.allclose(scale, whole.abs().amax(1))
        part = moment / scale.repeat_interleave(256)[:1000]
        off, least = (table[code.int()] - part).abs(), (table[None] - part[:, None]).abs().amin(1)
        assert bool((off <= least + 1e-6).all())


def test_small_tensors_follow_their_master() -> None:
    """The bf16 spacing just below 1 is 2**-8: nine steps of 2e-4 are less than half of it, twenty are about all."""
    norm = nn.Parameter(torch.ones(64).bfloat16())
    made = StochasticAdamW([{"params": [("norm", norm)]}], 2e-4, 0)

    steps(made, norm, [torch.ones(64)] * 9)
    assert bool((norm == 1).all())
    steps(made, norm, [torch.ones(64)] * 11)

    assert torch.equal(norm.detach().float(), torch.full((64,), 1 - 2**-8))


def test_a_weight_in_fp32_among_bf16_ones_keeps_its_digits() -> None:
    router = nn.Parameter(torch.full((2 * SMALL,), 8.0))

    steps(optimizer(router), router, [torch.ones(2 * SMALL)])

    assert router[0].item() == pytest.approx(8 - RATE, abs=1e-6)


def test_resumed_optimizer_goes_on_to_the_bit() -> None:
    grads = list(torch.randn(6, 2**14, generator=torch.Generator().manual_seed(3)))
    whole = weights(2**14)
    steps(optimizer(whole), whole, grads)
    broken = weights(2**14)
    first = optimizer(broken)
    steps(first, broken, grads[:3])

    numbers, tensors = checkpoints._flatten({"weight": first.state_dict()["state"][0]})
    again = nn.Parameter(broken.detach().clone())
    second = optimizer(again)
    stored = checkpoints._unflatten(json.loads(json.dumps(numbers)), tensors)
    second.load_state_dict(second.state_dict() | {"state": {0: stored["weight"]}})
    steps(second, again, grads[3:])

    assert torch.equal(again, whole)


def run_in_bf16(folder: Path, base: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None) -> Any:
    """Runs a full fine-tune on the CPU in the precision of a GPU."""
    monkeypatch.setattr("worker.trainer.loading.decide", lambda *_: BF16_FULL)
    if not folder.exists():
        lay_out(folder, base, plan(technique=Full(), learning_rate=1e-4, n_epochs=3), ROWS)
    t = prepare(folder, MessageWriter(None), StopSignal())
    found = checkpoints.find_snapshot(t)
    progress = Progress() if found is None else checkpoints.restore(t, found)
    while progress.step < (stop_after or t.total_steps):
        loop._take_step(t, progress)
    if stop_after:
        checkpoints.save_snapshot(t, progress)
    return t


def test_run_in_bf16_moves_its_weights_and_resumes_to_the_bit(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_in_bf16(tmp_path / "whole", tiny, monkeypatch)
    run_in_bf16(tmp_path / "broken", tiny, monkeypatch, stop_after=4)
    resumed = run_in_bf16(tmp_path / "broken", tiny, monkeypatch)

    assert isinstance(whole.optimizer, StochasticAdamW)
    before = FULL.load_base(tiny, BF16_FULL, torch.device("cpu")).state_dict()
    for name, parameter in whole.parameters.items():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, resumed.parameters[name]), name
        if parameter.dim() > 1 and "embed" not in name:
            moved = parameter != before[name.removeprefix("model.")]
            assert float(moved.float().mean()) > 0.05, name


def test_snapshot_of_another_precision_is_not_taken(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU cannot continue the optimizer of a job that was paused on a GPU."""
    run_in_bf16(tmp_path / "run", tiny, monkeypatch, stop_after=2)
    monkeypatch.undo()

    assert checkpoints.find_snapshot(prepare(tmp_path / "run", MessageWriter(None), StopSignal())) is None


def test_record_says_the_precision(tmp_path: Path, tiny: Path) -> None:
    folder = lay_out(tmp_path / "run", tiny, plan(), ROWS)

    assert carry_out(folder, MessageWriter(None), StopSignal())

    assert json.loads((folder / "out" / "training_config.json").read_text())["precision"] == {
        "base": "float32", "dense": "float32", "trained": "float32", "rounding": "nearest", "moments": "float32",
        "compute": "float32", "double_quant": False, "fp8": False,
    }  # fmt: skip


def test_masters_in_fp32_compute_in_bf16(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = decide(Full(weights_dtype="float32"), "cuda")
    monkeypatch.setattr("worker.trainer.loading.decide", lambda *_: wide)
    t = prepare(
        lay_out(tmp_path / "run", tiny, plan(technique=Full(), learning_rate=1e-4), ROWS),
        MessageWriter(None),
        StopSignal(),
    )
    made: set[torch.dtype] = set()
    t.objective.causal.model.layers[0].mlp.gate_proj.register_forward_hook(lambda *args: made.add(args[2].dtype))

    loop._take_step(t, Progress())

    assert made == {torch.bfloat16}
    assert t.objective.chunked
    assert {p.dtype for p in t.parameters.values()} == {torch.float32}
