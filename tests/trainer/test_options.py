"""Compares the effect of each option on a run's steps with plain torch and PEFT, in resumed runs too."""

from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, get_peft_model
from run_folders import Interrupting, chat, lay_out, plan
from transformers import AutoModelForCausalLM

from tunery.spec import Full, Lora, LossOn, Schedule, Supervised, Technique
from worker.trainer import cuda_graphs
from worker.trainer.data import collate
from worker.trainer.loop import train
from worker.trainer.recipes.lora import LORA
from worker.trainer.report import MessageWriter
from worker.trainer.run import carry_out, prepare
from worker.trainer.stop_signal import StopSignal
from worker.trainer.training import Progress, Training

ROWS = [chat(i, words=2 + i % 7) for i in range(8)]


def start(folder: Path, base: Path, **changes: Any) -> Training:
    return prepare(lay_out(folder, base, plan(**changes), ROWS), MessageWriter(None), StopSignal())


def learned(t: Training) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in t.parameters.items()}


def test_lora_plus_moves_b_by_its_own_rate(tmp_path: Path, tiny: Path) -> None:
    """Adam's first step moves each weight with a gradient by the rate, regardless of the gradient's size."""
    settled = {"technique": Lora(r=4, lora_plus_ratio=16), "learning_rate": 1e-3, "batch_size": 8, "max_grad_norm": 1e9}
    t = start(tmp_path / "run", tiny, **settled, schedule=Schedule(type="constant", warmup_ratio=0))
    with torch.no_grad():
        for parameter in t.parameters.values():
            parameter.normal_(0, 0.1)
    before = learned(t)

    train(t, Progress())

    moved = {name: (parameter - before[name]).abs().median().item() for name, parameter in t.parameters.items()}
    for name, distance in moved.items():
        assert distance == pytest.approx(16e-3 if ".lora_B." in name else 1e-3, rel=1e-2), name
    assert t.writer.metrics[0]["learning_rate"] == 1e-3


@pytest.mark.parametrize(("loss_on", "fraction"), [("assistant", 0.5), ("all", 1.0)])
def test_loss_on_chooses_the_tokens_that_are_learned(
    loss_on: LossOn, fraction: float, tmp_path: Path, tiny: Path
) -> None:
    t = start(tmp_path / "run", tiny, method=Supervised(loss_on=loss_on))

    assert all(row.labelled == len(row) - 1 for row in t.rows.rows) == (fraction == 1)
    assert sum(row.labelled for row in t.rows.rows) <= fraction * t.rows.tokens
    assert t.plan.model_dump()["method"] == {"type": "supervised", "loss_on": loss_on}


def test_dora_begins_as_the_base(tmp_path: Path, tiny: Path) -> None:
    t = start(tmp_path / "run", tiny, technique=Lora(r=4, use_dora=True))
    ids = torch.tensor([t.rows.rows[0].input_ids])

    with torch.no_grad():
        found = t.objective.causal.eval()(ids).logits
        wanted = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)(ids).logits

    assert float((found - wanted).norm() / wanted.norm()) < 1e-6


def test_dora_on_a_bf16_base_is_pefts(tmp_path: Path, tiny: Path) -> None:
    """As on a GPU, the adapters are in fp32 and the weights in bf16. DoRA uses none of our kernels."""
    ids = torch.tensor([[5, 60, 7, 80, 9, 100, 11]])
    models = []
    for ours in (True, False):
        torch.manual_seed(1)
        base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16)
        config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", use_dora=True, task_type="CAUSAL_LM")
        technique = Lora(r=4, alpha=8, use_dora=True)
        models.append(LORA.prepare(base, technique, None) if ours else get_peft_model(base, config).float())
    found, wanted = models
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
                wanted.get_parameter(name).copy_(parameter)
        difference = found(ids).logits.float() - wanted(ids).logits
        assert float(difference.norm() / wanted(ids).logits.norm()) < 2e-2


@pytest.mark.parametrize(
    "technique",
    [Lora(r=4, alpha=8, use_dora=True, dropout=0.1), Lora(r=4, alpha=8, use_rslora=True, lora_plus_ratio=4)],
    ids=["dora", "rslora and lora+"],
)
def test_resumed_run_is_the_unbroken_one(tmp_path: Path, tiny: Path, technique: Technique) -> None:
    compare_resumed(tmp_path, tiny, technique=technique)


def compare_resumed(folder: Path, base: Path, **changes: Any) -> None:
    settled = plan(n_epochs=2, batch_size=2, **changes)
    whole, broken = (lay_out(folder / name, base, settled, ROWS, public_checkpoints=0) for name in ("whole", "broken"))
    assert carry_out(whole, MessageWriter(None), StopSignal())
    stop_signal = StopSignal()
    assert not carry_out(broken, Interrupting(3, stop_signal), stop_signal)

    assert carry_out(broken, MessageWriter(None), StopSignal())

    name = "adapter_model.safetensors"
    assert (broken / "out" / name).read_bytes() == (whole / "out" / name).read_bytes()


@pytest.mark.parametrize("packing", [False, True])
def test_neftunes_noise_is_bounded_by_each_rows_own_length(tmp_path: Path, tiny: Path, packing: bool) -> None:
    """The other rows of the batch make no difference, and evaluation has no noise."""
    t = start(tmp_path / "run", tiny, neftune_noise_alpha=5.0, batch_size=8, packing=packing)
    embedding, seen = t.objective.causal.get_input_embeddings(), []
    embedding.register_forward_hook(lambda module, args, out: seen.append((args[0], out, module.weight[args[0]])))
    part = [list(range(8))] if packing else [[i] for i in range(8)]
    batch = collate(t.rows.examples, part, t.device)
    assert batch.lengths == (((*map(len, t.rows.rows),),) if packing else tuple((len(row),) for row in t.rows.rows))

    with torch.no_grad():
        t.objective.train().sums(batch, 1.0)
        t.objective.eval().sums(batch, 1.0)

    (_, noisy, plain), (_, quiet, same) = seen
    assert torch.equal(quiet, same)
    size = (noisy - plain).abs()
    for number, lengths in enumerate(batch.lengths):
        begin = 0
        for length in lengths:
            bound = 5.0 / (length * 32) ** 0.5
            assert 0.9 * bound < size[number, begin : begin + length].max() <= bound
            assert size[number, begin : begin + length].mean().item() == pytest.approx(bound / 2, rel=0.15)
            begin += length
    assert "noise" in str(cuda_graphs.reason_against(t.objective, 100))


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit"])
@pytest.mark.parametrize("technique", [Lora(r=64, alpha=8), Full()], ids=["lora", "full"])
def test_eight_bit_optimizer_is_bitsandbytes_own(
    tmp_path: Path, tiny: Path, optimizer: str, technique: Technique
) -> None:
    """Takes two steps from equal gradients. Moments of 4,096 or more weights are in 8 bits, an embedding's in 32."""
    t = start(tmp_path / "run", tiny, technique=technique, optimizer=optimizer, weight_decay=0.1)
    copies = {name: torch.nn.Parameter(p.detach().clone()) for name, p in t.parameters.items()}
    plain = bitsandbytes.optim.AdamW8bit(list(copies.values()), lr=1e-2, weight_decay=0.1)
    for step in (1, 2):
        for name, parameter in t.parameters.items():
            parameter.grad = torch.randn_like(parameter)
            copies[name].grad = parameter.grad.clone()
        t.stepper.update(step, 1e-2)
        plain.step()

    for name, parameter in t.parameters.items():
        state = t.optimizer.state[parameter]
        wide = "embed_tokens" in name or parameter.numel() < 4096
        assert state["state1"].dtype == (torch.float32 if wide else torch.uint8), name
        if "embed_tokens" not in name and parameter.dim() > 1:
            assert torch.equal(parameter, copies[name]), name
    assert any(t.optimizer.state[p]["state1"].dtype == torch.uint8 for p in t.parameters.values())
    assert t.precision.moments == "int8"


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"optimizer": "adamw_8bit"}, id="8bit"),
        pytest.param({"neftune_noise_alpha": 10.0}, id="noise", marks=pytest.mark.slow),
    ],
)
def test_resumed_run_of_an_option_is_the_unbroken_one(tmp_path: Path, tiny: Path, changes: dict[str, Any]) -> None:
    compare_resumed(tmp_path, tiny, technique=Lora(r=64, alpha=8), **changes)
