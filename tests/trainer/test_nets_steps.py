"""Compares optimizer steps with a loop of a few lines in plain transformers, peft and torch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from run_folders import chat, lay_out, plan
from transformers import AutoModelForCausalLM

from tunery.spec import Full, Lora, Schedule
from worker.trainer.adamw import StochasticAdamW
from worker.trainer.loop import learning_rate, train
from worker.trainer.report import MessageWriter
from worker.trainer.run import prepare
from worker.trainer.stop_signal import StopSignal
from worker.trainer.training import Progress, Training

ROWS = [chat(i, words=2 + i % 11) for i in range(24)]
RATES = [0.5e-2, 1e-2, 2 / 3 * 1e-2, 1 / 3 * 1e-2]
"""One step of warmup, then a linear decay that would reach zero one step after the last."""
EVERYTHING = {
    "n_epochs": 4,
    "batch_size": len(ROWS),  # every step sees every row, so their order does not matter
    "learning_rate": 1e-2,
    "schedule": Schedule(type="linear", warmup_ratio=0.25),
    "weight_decay": 0.3,
    "max_grad_norm": 0.05,
}


def start(folder: Path, base: Path, **changes: Any) -> Training:
    return prepare(lay_out(folder, base, plan(**changes), ROWS), MessageWriter(None), StopSignal())


def textbook(base: Path, technique: Full | Lora, t: Training) -> tuple[list[tuple[float, float]], dict[str, Any]]:
    """Takes four steps from the weights of `t`. Returns each step's loss and gradient norm, and the final weights."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).train()
    if isinstance(technique, Lora):
        config = LoraConfig(r=technique.r, lora_alpha=int(technique.alpha), target_modules="all-linear")
        model = get_peft_model(model, config)
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in t.parameters.items():
        learning[name.removeprefix("model.")].data.copy_(parameter.data)
    decayed, plain = ([p for p in learning.values() if (p.dim() > 1) == matrix] for matrix in (True, False))
    groups = [{"params": decayed, "weight_decay": 0.3}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]])
    labels = sum(label != -100 for row in t.rows.rows for label in row.labels[1:])
    found = []
    for rate in RATES:
        total = 0.0
        for row in t.rows.rows:
            logits = model(torch.tensor([row.input_ids])).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor(row.labels[1:]), reduction="sum") / labels
            loss.backward()
            total += loss.item()
        found.append((total, float(torch.nn.utils.clip_grad_norm_(learning.values(), 0.05))))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    return found, {name: p.detach() for name, p in learning.items()}


@pytest.mark.parametrize("technique", [Full(), Lora(r=4, alpha=16)], ids=["full", "lora"])
def test_steps_are_those_of_a_plain_loop(tmp_path: Path, tiny: Path, technique: Full | Lora) -> None:
    """Covers loss, clipping, weight decay, rates and updates together, with several micro-batches a step."""
    t = start(tmp_path / "run", tiny, technique=technique, **EVERYTHING)
    wanted, weights = textbook(tiny, technique, t)

    train(t, Progress())

    steps = [entry for entry in t.writer.metrics if entry["type"] == "step"]
    assert [step["learning_rate"] for step in steps] == pytest.approx(RATES)
    assert [step["train_loss"] for step in steps] == pytest.approx([loss for loss, _ in wanted], rel=1e-4)
    assert [step["grad_norm"] for step in steps] == pytest.approx([norm for _, norm in wanted], rel=1e-3)
    assert min(norm for _, norm in wanted) > 0.05, "nothing was clipped"
    for name, parameter in t.parameters.items():
        difference = (parameter - weights[name.removeprefix("model.")]).abs().max()
        assert difference < 2e-4, name


def test_rate_rises_over_the_warmup() -> None:
    settled = plan(learning_rate=0.8, schedule=Schedule(type="constant", warmup_ratio=0.3))

    assert [learning_rate(settled, step, 10) for step in range(1, 6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8])


@pytest.mark.parametrize("technique", [Full(), Lora(r=4)], ids=["full", "lora"])
def test_weight_decay_pulls_on_matrices_alone(tmp_path: Path, tiny: Path, technique: Full | Lora) -> None:
    t = start(tmp_path / "run", tiny, technique=technique, weight_decay=0.3)

    decay = {id(p): group["weight_decay"] for group in t.optimizer.param_groups for p in group["params"]}

    assert {name: decay[id(p)] for name, p in t.parameters.items()} == {
        name: 0.3 if p.dim() > 1 else 0.0 for name, p in t.parameters.items()
    }


def test_weight_without_gradient_decays_by_the_rate_and_no_more(tmp_path: Path, tiny: Path) -> None:
    """AdamW decouples the decay: added to the gradient, it would move this weight by the whole rate."""
    t = start(tmp_path / "run", tiny, technique=Full(), **EVERYTHING)
    rows = t.parameters["model.model.embed_tokens.weight"]
    unused = max(set(range(260)) - {token for row in t.rows.rows for token in row.input_ids})
    before = rows[unused].detach().clone()

    train(t, Progress())

    kept = 1.0
    for rate in RATES:
        kept *= 1 - rate * 0.3
    assert torch.allclose(rows[unused], before * kept, rtol=1e-5, atol=0)


def test_optimizer_that_holds_other_tensors_ends_the_run(tmp_path: Path, tiny: Path) -> None:
    t = start(tmp_path / "run", tiny, n_epochs=4, batch_size=24)
    for group in t.optimizer.param_groups:
        group["params"] = [torch.nn.Parameter(p.detach().clone()) for p in group["params"]]

    with pytest.raises(RuntimeError, match="does not have the model's weights"):
        train(t, Progress())


def test_small_bf16_matrix_decays_and_one_without_gradient_stays() -> None:
    moved, still = (torch.nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16)) for _ in range(2))
    group = {"params": [("moved", moved), ("still", still)], "weight_decay": 0.5}
    optimizer = StochasticAdamW([group], lr=0.25, seed=0)
    moved.grad = torch.zeros_like(moved)

    for _ in range(2):
        optimizer.step()

    assert torch.equal(moved, torch.full_like(moved, 0.875**2))
    assert torch.equal(still, torch.ones_like(still))
    assert still not in optimizer.state
