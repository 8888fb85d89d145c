"""The adapters of a run: PEFT's settings, precision, the choice of the loss, and the artifact."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from peft import PeftModel
from run_folders import chat, lay_out, plan
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tunery.spec import Full, Lora, Technique
from worker.trainer import checkpoints, loading
from worker.trainer.loop import train
from worker.trainer.recipes.lora import LORA
from worker.trainer.report import MessageWriter
from worker.trainer.run import prepare
from worker.trainer.stop_signal import StopSignal
from worker.trainer.training import Progress, Training

ROWS = [chat(i) for i in range(8)]
IDS = torch.tensor([[5, 60, 7, 80, 9, 100, 11]])


def start(folder: Path, base: Path, **changes: Any) -> Training:
    return prepare(lay_out(folder, base, plan(**changes), ROWS), MessageWriter(None), StopSignal())


def test_plans_knobs_reach_every_adapted_layer(tmp_path: Path, tiny: Path) -> None:
    technique = Lora(r=3, alpha=12, dropout=0.25, target_modules=["q_proj", "up_proj"])

    t = start(tmp_path / "run", tiny, technique=technique)

    layers = {name: module for name, module in t.objective.named_modules() if hasattr(module, "lora_A")}
    assert sorted(name.split(".")[-1] for name in layers) == ["q_proj", "q_proj", "up_proj", "up_proj"]
    for layer in layers.values():
        assert isinstance(layer.lora_dropout["default"], nn.Dropout)
        assert layer.lora_dropout["default"].p == 0.25
        assert layer.lora_A["default"].weight.shape[0] == 3
        assert layer.scaling["default"] == 4


def test_default_adapts_every_linear_layer_but_the_head(tmp_path: Path, tiny: Path) -> None:
    t = start(tmp_path / "run", tiny, technique=Lora())

    adapted = {name.split(".")[-1] for name, module in t.objective.named_modules() if hasattr(module, "lora_A")}

    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("continued", [False, True], ids=["new", "continued"])
def test_adapters_learn_in_fp32_on_a_bf16_base(tmp_path: Path, tiny: Path, continued: bool) -> None:
    adapter = tiny_models.lora(tmp_path / "adapter", tiny) if continued else None
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16)

    model = LORA.prepare(base, Lora(r=4, alpha=8), adapter)

    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)


def test_full_fine_tune_refuses_to_go_on_from_an_adapter(tmp_path: Path, tiny: Path) -> None:
    folder = lay_out(tmp_path / "run", tiny, plan(technique=Full()), ROWS)
    tiny_models.lora(folder / "adapter", tiny)

    with pytest.raises(ValueError, match="use technique 'lora' or 'qlora', or a full model as base"):
        prepare(folder, MessageWriter(None), StopSignal())


def test_model_that_does_more_to_its_logits_than_one_product_gets_the_textbooks_loss(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next architecture may do so under a name that no list has, so the loss is chosen by trial."""

    def load(folder: Path, technique: Technique, device: torch.device) -> Any:
        model = LORA.load_base(folder, technique, device)
        model.register_forward_hook(lambda _module, _args, out: out.__setitem__("logits", out.logits * 0.5))
        return model

    monkeypatch.setitem(loading.RECIPES, "lora", replace(LORA, load_base=load))
    t = start(tmp_path / "run", tiny, batch_size=8, learning_rate=1e-9)

    train(t, Progress())

    model = AutoModelForCausalLM.from_pretrained(tiny)
    total = labels = 0.0
    for row in t.rows.rows:
        logits = 0.5 * model(torch.tensor([row.input_ids])).logits[0, :-1]
        total += float(nn.functional.cross_entropy(logits, torch.tensor(row.labels[1:]), reduction="sum").detach())
        labels += sum(label >= 0 for label in row.labels[1:])
    assert t.writer.metrics[0]["train_loss"] == pytest.approx(total / labels, rel=1e-5)


@pytest.mark.parametrize("technique", [Full(), Lora(r=4, alpha=16)], ids=["full", "lora"])
def test_artifact_is_the_model_in_memory(tmp_path: Path, tiny: Path, technique: Full | Lora) -> None:
    t = start(tmp_path / "run", tiny, technique=technique, n_epochs=3)
    progress = Progress()
    train(t, progress)
    wanted = _logits(t.objective.eval().causal)
    (tmp_path / "out").mkdir()

    checkpoints.write_artifact(t, progress, tmp_path / "out")

    if isinstance(technique, Full):
        found = _logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32))
        tolerance = 2e-2  # the artifact's weights are bf16
    else:
        base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
        found = _logits(PeftModel.from_pretrained(base, tmp_path / "out").eval())
        tolerance = 1e-5
    assert float((found - wanted).norm() / wanted.norm()) < tolerance
    untrained = _logits(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32))
    assert float((found - untrained).norm() / wanted.norm()) > 10 * tolerance


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(IDS).logits
        return logits
