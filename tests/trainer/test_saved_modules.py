"""Compares fully trained modules and single trained token rows, in addition to adapters, with plain PEFT."""

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import zoo
from peft import LoraConfig, PeftModel, get_peft_model
from run_folders import Interrupting, chat, lay_out, plan
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM

from tunery.failures import CannotAdapt
from tunery.spec import Lora, Qlora, Schedule
from worker.trainer import coverage
from worker.trainer.loop import train
from worker.trainer.recipes.lora import LORA
from worker.trainer.report import MessageWriter
from worker.trainer.run import carry_out, prepare
from worker.trainer.stop_signal import StopSignal
from worker.trainer.training import Progress, Training

ROWS = [chat(i, words=2 + i % 7) for i in range(8)]
HEAD = Lora(r=4, alpha=8, modules_to_save=["lm_head", "norm"])
EMBEDDING = Lora(r=4, alpha=8, modules_to_save=["embed_tokens"])
TOKENS = Lora(r=4, alpha=8, trainable_token_indices=[1, 2])
HEAD_AND_ROWS = Lora(r=4, alpha=8, modules_to_save=["lm_head"], trainable_token_indices=[1, 2])
EMBEDDING_AND_ROWS = Lora(r=4, alpha=8, modules_to_save=["embed_tokens"], trainable_token_indices=[1, 2])
CASES = pytest.mark.parametrize(
    ("tied", "technique"),
    [
        pytest.param(False, HEAD, marks=pytest.mark.slow),
        (False, TOKENS),
        (True, EMBEDDING),
        pytest.param(True, HEAD, marks=pytest.mark.slow),
        pytest.param(True, TOKENS, marks=pytest.mark.slow),
        (False, HEAD_AND_ROWS),
        pytest.param(False, EMBEDDING_AND_ROWS, marks=pytest.mark.slow),
    ],
    ids=["head", "tokens", "tied embedding", "tied head", "tied tokens", "head and rows", "embedding and rows"],
)
PEFTS_NAMES: dict[str, dict[str, Any]] = {
    "head": {"modules_to_save": ["lm_head", "norm"]},
    "tied embedding": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "tied head": {"modules_to_save": ["embed_tokens", "norm"], "ensure_weight_tying": True},
    "tokens": {"trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [1, 2]}},
    "tied tokens": {"trainable_token_indices": [1, 2]},
    "head and rows": {"modules_to_save": ["lm_head"], "trainable_token_indices": {"embed_tokens": [1, 2]}},
    "embedding and rows": {"modules_to_save": ["embed_tokens"], "trainable_token_indices": {"lm_head": [1, 2]}},
}
KINDS = {
    id(HEAD): "head",
    id(EMBEDDING): "embedding",
    id(TOKENS): "tokens",
    id(HEAD_AND_ROWS): "head and rows",
    id(EMBEDDING_AND_ROWS): "embedding and rows",
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Returns one model with a tied and one with an untied head, by whether it is tied."""
    folder = tmp_path_factory.mktemp("saved")
    return {tied: tiny_models.llama(folder / str(tied), tie_word_embeddings=tied) for tied in (False, True)}


def start(folder: Path, base: Path, **changes: Any) -> Training:
    """Prepares a run with all rows in one step and random adapters: with B = 0, A would have no gradient."""
    settled = {"batch_size": 8, "max_grad_norm": 1e9, "learning_rate": 1e-2}
    settled["schedule"] = Schedule(type="constant", warmup_ratio=0)
    t = prepare(
        lay_out(folder, base, plan(**settled | changes), ROWS, public_checkpoints=0), MessageWriter(None), StopSignal()
    )
    with torch.no_grad():
        for parameter in t.parameters.values():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return t


def name_of(technique: Lora, tied: bool) -> str:
    kind = KINDS[id(technique)]
    return f"tied {kind}" if tied else kind


@CASES
def test_first_step_is_plain_pefts(tmp_path: Path, bases: dict[bool, Path], tied: bool, technique: Lora) -> None:
    t = start(tmp_path / "run", bases[tied], technique=technique)
    base: Any = AutoModelForCausalLM.from_pretrained(bases[tied], dtype=torch.float32)
    options = PEFTS_NAMES[name_of(technique, tied)]
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    plain: Any = get_peft_model(base, config)
    wanted = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    assert {name.removeprefix("model.") for name in t.parameters} == set(wanted)
    with torch.no_grad():
        for name, parameter in t.parameters.items():
            wanted[name.removeprefix("model.")].copy_(parameter)
    total = torch.zeros(())
    for row in t.rows.rows:
        logits = plain(input_ids=torch.tensor([row.input_ids])).logits[0, :-1]
        total = total + functional.cross_entropy(logits, torch.tensor(row.labels[1:]), reduction="sum")
    loss = total / sum(row.labelled for row in t.rows.rows)
    loss.backward()
    gradients: dict[str, torch.Tensor] = {}
    before = {name: p.detach().clone() for name, p in t.parameters.items()}
    step = t.optimizer.step

    def capture() -> None:
        gradients.update({name: p.grad.clone() for name, p in t.parameters.items() if p.grad is not None})
        step()

    t.optimizer.step = capture  # type: ignore[method-assign,assignment]
    train(t, Progress())

    assert t.writer.metrics[0]["train_loss"] == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in t.parameters.items():
        grad = wanted[name.removeprefix("model.")].grad
        assert grad is not None
        assert (gradients[name] - grad).norm() < 1e-5 * grad.norm(), name
        rate = 1e-3 if "modules_to_save" in name or "trainable_tokens" in name else 1e-2
        assert (parameter - before[name]).abs().max().item() == pytest.approx(rate, rel=1e-2), name


@CASES
def test_artifact_is_the_model_in_memory(tmp_path: Path, bases: dict[bool, Path], tied: bool, technique: Lora) -> None:
    """Plain PEFT loads it, it is the base with the adapter disabled, and a resumed run writes the same files."""
    settled = plan(technique=technique, n_epochs=2, batch_size=2)
    whole, broken = (
        lay_out(tmp_path / name, bases[tied], settled, ROWS, public_checkpoints=0) for name in ("whole", "broken")
    )
    assert carry_out(whole, MessageWriter(None), StopSignal())
    stop_signal = StopSignal()
    assert not carry_out(broken, Interrupting(3, stop_signal), stop_signal)
    t = prepare(broken, MessageWriter(None), StopSignal())
    ids = torch.tensor([t.rows.rows[0].input_ids])

    assert carry_out(broken, MessageWriter(None), StopSignal())

    name = "adapter_model.safetensors"
    assert (broken / "out" / name).read_bytes() == (whole / "out" / name).read_bytes()
    base: Any = AutoModelForCausalLM.from_pretrained(bases[tied], dtype=torch.float32)
    with torch.no_grad():
        untouched = base(ids).logits
        loaded: Any = PeftModel.from_pretrained(base, str(whole / "out")).eval()
        tuned = loaded(ids).logits
        with loaded.disable_adapter():
            assert torch.equal(loaded(ids).logits, untouched)
    assert float((tuned - untouched).norm() / untouched.norm()) > 1e-3
    if tied:
        inputs, head = loaded.get_input_embeddings().weight, loaded.get_output_embeddings().weight
        assert torch.equal(inputs, head)


def test_head_learns_in_fp32_beside_a_bf16_base_and_is_saved_in_bf16(tmp_path: Path, bases: dict[bool, Path]) -> None:
    base: Any = AutoModelForCausalLM.from_pretrained(bases[False], dtype=torch.bfloat16)
    technique = Lora(r=4, modules_to_save=["lm_head", "embed_tokens"], trainable_token_indices=None)

    model: Any = LORA.prepare(base, technique, None)

    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    logits = model(input_ids=torch.tensor([[5, 60, 7, 80]])).logits
    assert logits.dtype == torch.bfloat16
    logits.float().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    LORA.export(model, tmp_path, "tiny", None)
    written = load_file(tmp_path / "adapter_model.safetensors")
    assert {key: tensor.dtype for key, tensor in written.items() if "lora_" not in key} == {
        "base_model.model.lm_head.weight": torch.bfloat16,
        "base_model.model.model.embed_tokens.weight": torch.bfloat16,
    }
    assert model.get_output_embeddings().weight.dtype == torch.float32


BOTH = ["lm_head", "embed_tokens"]


@pytest.mark.parametrize(
    ("tied", "technique", "reason"),
    [
        (
            False,
            Lora(modules_to_save=["lm_heat"]),
            "no module 'lm_heat', .* modules such as 'embed_tokens' or 'lm_head'",
        ),
        (False, Lora(modules_to_save=["mlp"]), "has no weight of its own"),
        (False, Qlora(target_modules=["q_proj"], modules_to_save=["up_proj"]), "is quantised"),
        (False, Lora(modules_to_save=BOTH, trainable_token_indices=[1]), "Leave trainable_token_indices out"),
        (True, Lora(modules_to_save=["lm_head"], trainable_token_indices=[1]), "Leave trainable_token_indices out"),
    ],
)
def test_module_that_cannot_learn_whole_is_refused(
    tmp_path: Path, bases: dict[bool, Path], tied: bool, technique: Lora, reason: str
) -> None:
    with pytest.raises(CannotAdapt, match=reason) as refused:
        start(tmp_path / "run", bases[tied], technique=technique)
    assert "target_modules" not in str(refused.value), "which would not help"


def test_router_that_learns_whole_is_plain_pefts(tmp_path: Path) -> None:
    """It returns several tensors, of which the experts' indices stay integers."""
    base = zoo.make("Qwen3-MoE", tmp_path / "base")
    technique = Lora(r=4, alpha=8, target_modules=["q_proj"], modules_to_save=["gate"])
    ids = torch.tensor([[5, 60, 7, 80]])
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 0.05)):
        model: Any = LORA.prepare(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), technique, None)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], modules_to_save=["gate"])
        plain: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
        found, wanted = (each(input_ids=ids).logits for each in (model, plain))
        assert found.dtype == dtype
        assert (found - wanted).norm() < tolerance * wanted.norm()
        for each in (found, wanted):
            each.float().square().mean().backward()
        name = "base_model.model.model.layers.0.mlp.gate.modules_to_save.default.weight"
        grads = [dict(each.named_parameters())[name].grad for each in (model, plain)]
        assert grads[0] is not None
        assert grads[1] is not None
        assert (grads[0] - grads[1]).norm() < 4 * tolerance * grads[1].norm()


@pytest.mark.parametrize("use_cache", [False, True])
def test_norms_of_queries_and_keys_learn_in_fp32_inside_a_bf16_base(tmp_path: Path, use_cache: bool) -> None:
    base = zoo.make("Qwen3", tmp_path / "base")
    technique = Lora(r=4, alpha=8, target_modules=["v_proj"], modules_to_save=["q_norm", "k_norm"])
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["v_proj"], modules_to_save=["q_norm", "k_norm"])
    model: Any = LORA.prepare(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), technique, None)
    plain: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    name = "base_model.model.model.layers.0.self_attn.q_norm.modules_to_save.default.weight"
    for each in (model, plain):
        dict(each.named_parameters())[name].data.mul_(3)
    ids = torch.tensor([[5, 60, 7, 80, 9, 10]])
    found, wanted = (each(input_ids=ids, use_cache=use_cache).logits for each in (model, plain))
    assert found.dtype == torch.bfloat16
    assert (found - wanted).norm() < 0.05 * wanted.norm()
    with model.disable_adapter(), plain.disable_adapter():
        found, other = (each(input_ids=ids, use_cache=use_cache).logits for each in (model, plain))
    assert (found - other).norm() < 0.05 * other.norm() < (other - wanted).norm()


def test_router_that_has_an_adapter_and_would_learn_whole_is_refused(tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(zoo.make("Qwen3-MoE", tmp_path / "base"))

    with pytest.raises(CannotAdapt, match="Leave it out of modules_to_save, or list target_modules without it"):
        LORA.prepare(base, Lora(modules_to_save=["gate"]), None)


def test_rows_of_a_head_with_a_bias_are_refused(tmp_path: Path) -> None:
    """PEFT's layer for them has no bias: the model would not start as its base, and its merge would be another one."""
    base = AutoModelForCausalLM.from_pretrained(zoo.make("Phi", tmp_path / "base"), dtype=torch.float32)

    with pytest.raises(CannotAdapt, match="Use modules_to_save with the head"):
        LORA.prepare(base, Lora(trainable_token_indices=[1]), None)

    LORA.prepare(base, Lora(trainable_token_indices=[1], modules_to_save=["lm_head"]), None)


def test_chunked_loss_takes_the_head_that_learns(tmp_path: Path, bases: dict[bool, Path]) -> None:
    t = start(tmp_path / "run", bases[False], technique=HEAD)

    assert t.objective.chunked
    assert coverage.of(t)["learning"] == 1.0
