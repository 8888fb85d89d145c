"""Trains every family of the zoo with the real trainer, and compares it with plain transformers and PEFT.
The reference computes each row alone, unpadded, with eager attention and PEFT's own layers.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import BaseModel
from run_folders import chat, lay_out, plan
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tunery.failures import CannotAdapt, CannotQuantise
from tunery.planning.precision import decide
from tunery.spec import Full, Lora, Qlora, Technique
from worker.trainer import checkpoints
from worker.trainer.convert import convert
from worker.trainer.loop import train
from worker.trainer.recipes.qlora import load_quantised
from worker.trainer.report import MessageWriter
from worker.trainer.run import carry_out, prepare
from worker.trainer.stop_signal import StopSignal
from worker.trainer.training import Progress, Training

# PEFT searches modules for the ranks that it gave to experts' parameters, and warns about its handling of Conv1D.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
]

ROWS = [chat(i, words=words) for i, words in enumerate((2, 9, 1, 5, 12, 3))]
"""Rows of 33 to 92 tokens, on both sides of the zoo's attention windows and RoPE thresholds."""
KNOBS: dict[str, Technique] = {
    "lora": Lora(r=4, alpha=8),
    "qlora": Qlora(r=4, alpha=8, compute_dtype="float32"),
    "full": Full(),
}


def cases(
    techniques: Collection[str] = zoo.TECHNIQUES,
    *,
    wrong_today: bool = False,
    quick: Collection[str] = zoo.IN_EVERY_RUN,
) -> pytest.MarkDecorator:
    """Returns the parameters of a test: all families with their techniques, as slow tests if not in `quick`.

    `wrong_today`: families with a known fault are expected to fail.
    """
    params = []
    for name, entry in zoo.FAMILIES.items():
        marks = [] if name in quick else [pytest.mark.slow]
        if wrong_today and entry.wrong_today:
            marks.append(pytest.mark.xfail(strict=True, reason=entry.wrong_today))
        params += [
            pytest.param(name, technique, marks=marks) for technique in techniques if technique not in entry.refused
        ]
    return pytest.mark.parametrize(("family", "technique"), params)


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns a function that gives a family's converted base, which is made only once."""
    made: dict[str, Path] = {}

    def of(family: str) -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp("zoo")
            convert(str(zoo.make(family, folder / "source")), folder / "base")
            made[family] = folder / "base"
        return made[family]

    return of


def prepared(folder: Path, base: Path, technique: str, knobs: Technique | None = None, **changes: Any) -> Training:
    """Prepares an unclipped run with all rows in one step and random adapters: with B = 0, A has no gradient."""
    settled = {
        "technique": knobs or KNOBS[technique],
        "batch_size": len(ROWS),
        "max_grad_norm": 1e9,
        "learning_rate": 1e-3,
    }
    lay_out(folder, base, plan(**settled | changes), ROWS, public_checkpoints=0)
    t = prepare(folder, MessageWriter(None), StopSignal())
    if technique != "full":
        with torch.no_grad():
            for parameter in t.parameters.values():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return t


def reference(base: Path, technique: str, family: zoo.Family, **options: Any) -> Any:
    """Returns the model as plain transformers and PEFT make it. `options`: further fields of LoraConfig."""
    quantisation = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model: Any = AutoModelForCausalLM.from_pretrained(
        base,
        dtype=torch.float32,
        attn_implementation="eager",
        quantization_config=quantisation if technique == "qlora" else None,
        device_map={"": "cpu"},
    )
    if technique == "full":
        return model
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules="all-linear",
        exclude_modules=family.routers,
        task_type="CAUSAL_LM",
        target_parameters=family.parameters,
        **options,
    )
    return get_peft_model(model, config)


def learning(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def loss_of_rows_alone(model: Any, t: Training) -> Tensor:
    """Returns the mean loss over all labelled tokens, with each row computed alone."""
    total = torch.zeros(())
    for row in sorted(t.rows.rows, key=len):  # dynamic RoPE keeps the frequencies of a longer row
        logits = model(input_ids=torch.tensor([row.input_ids]), use_cache=False).logits[0, :-1].float()
        total = total + functional.cross_entropy(logits, torch.tensor(row.labels[1:]), reduction="sum")
    return total / sum(row.labelled for row in t.rows.rows)


class Capturing(MessageWriter):
    """Keeps the training losses that a run reports."""

    def __init__(self) -> None:
        super().__init__(None)
        self.losses: list[float] = []

    def write(self, message: BaseModel) -> None:
        super().write(message)
        if getattr(message, "type", "") == "step":
            self.losses.append(message.train_loss)  # type: ignore[attr-defined]


def first_step(t: Training) -> tuple[float, dict[str, Tensor]]:
    """Takes the run's first step with the real training loop, and returns its loss and gradients."""
    writer, gradients = Capturing(), {}
    step = t.optimizer.step

    def capture() -> None:
        gradients.update({name: p.grad.clone() for name, p in t.parameters.items() if p.grad is not None})
        step()

    t.optimizer.step = capture  # type: ignore[method-assign,assignment]
    train(replace(t, writer=writer), Progress())
    return writer.losses[0], gradients


def compare_with_plain(t: Training, base: Path, technique: str, family: str, **options: Any) -> None:
    plain = reference(base, technique, zoo.FAMILIES[family], **options)
    wanted = learning(plain)
    assert {name.removeprefix("model.") if technique != "full" else name[6:] for name in t.parameters} == set(wanted)
    with torch.no_grad():
        for name, parameter in t.parameters.items():
            wanted[name[6:]].copy_(parameter)
    loss = loss_of_rows_alone(plain.train(), t)
    loss.backward()

    found, gradients = first_step(t)

    assert found == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in wanted.items():
        if parameter.grad is None or not parameter.grad.any():
            assert f"model.{name}" not in gradients or not gradients[f"model.{name}"].any()
            continue
        error = (gradients[f"model.{name}"] - parameter.grad).norm() / parameter.grad.norm()
        assert error < 1e-5, f"{name}: {error:.1e}"


@cases(wrong_today=True)
def test_first_step_is_that_of_plain_transformers_and_peft(
    family: str, technique: str, base_of: Callable[[str], Path], tmp_path: Path
) -> None:
    t = prepared(tmp_path / "run", base_of(family), technique)

    compare_with_plain(t, base_of(family), technique, family)


@pytest.mark.parametrize("option", ["use_dora", "use_rslora"])
@cases(("lora", "qlora"), quick=("Llama", "GPT-2"))
def test_first_step_with_an_option_is_that_of_plain_peft(
    family: str, technique: str, option: str, base_of: Callable[[str], Path], tmp_path: Path
) -> None:
    settled = KNOBS[technique].model_copy(update={option: True})
    if option == "use_dora" and not zoo.FAMILIES[family].dropout:
        with pytest.raises(CannotAdapt, match="use_dora=True"):
            prepared(tmp_path / "run", base_of(family), technique, settled)
        return
    t = prepared(tmp_path / "run", base_of(family), technique, settled)

    compare_with_plain(t, base_of(family), technique, family, **{option: True})


@cases(wrong_today=True)
def test_packed_rows_are_rows_apart(
    family: str, technique: str, base_of: Callable[[str], Path], tmp_path: Path
) -> None:
    t = prepared(tmp_path / "run", base_of(family), technique, packing=True, max_seq_length=256)

    unpacked = any("not packed" in warning for warning in t.warnings)
    assert unpacked != zoo.FAMILIES[family].packs
    compare_with_plain(t, base_of(family), technique, family)


@cases()
def test_exported_model_is_the_one_in_memory(
    family: str, technique: str, base_of: Callable[[str], Path], tmp_path: Path
) -> None:
    t = prepared(tmp_path / "run", base_of(family), technique, batch_size=3)
    progress = Progress()
    train(t, progress)
    (tmp_path / "out").mkdir()

    checkpoints.write_artifact(t, progress, tmp_path / "out")

    ids = torch.tensor([t.rows.rows[0].input_ids])
    with torch.no_grad():
        loaded = exported(tmp_path / "out", base_of(family), technique)(ids).logits
        if technique == "full":  # round to the artifact's dtype
            for name, parameter in t.parameters.items():
                if not re.search(zoo.FAMILIES[family].in_fp32 or "$^", name):
                    parameter.copy_(parameter.to(torch.bfloat16))
        wanted = t.objective.causal.eval()(ids).logits
    assert float((loaded - wanted).norm() / wanted.norm()) < 1e-5


def exported(folder: Path, base: Path, technique: str) -> Any:
    """Loads the artifact as its user does; a QLoRA's base in the same four bits as in training."""
    if technique == "full":
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if technique == "qlora":
        model = load_quantised(base, decide(KNOBS["qlora"], "cpu"), torch.device("cpu"))
    else:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(folder)).eval()


@pytest.mark.parametrize(
    ("family", "technique", "reason"),
    [(name, *refused) for name, entry in zoo.FAMILIES.items() for refused in entry.refused.items()],
)
def test_technique_that_a_family_cannot_have_is_refused(
    family: str, technique: str, reason: str, base_of: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(CannotQuantise, match=reason):
        prepared(tmp_path / "run", base_of(family), technique)


class Stopping(MessageWriter):
    """Asks the run to stop after a given step."""

    def __init__(self, step: int, stop_signal: StopSignal) -> None:
        super().__init__(None)
        self.step, self.stop_signal = step, stop_signal

    def write(self, message: BaseModel) -> None:
        super().write(message)
        if getattr(message, "type", "") == "step" and getattr(message, "step", 0) == self.step:
            self.stop_signal.received = True


@cases(quick=("Llama",))
def test_resumed_run_is_the_unbroken_one(
    family: str, technique: str, base_of: Callable[[str], Path], tmp_path: Path
) -> None:
    settled = plan(technique=KNOBS[technique], batch_size=1, learning_rate=1e-3)
    whole, broken = (
        lay_out(tmp_path / name, base_of(family), settled, ROWS, public_checkpoints=0) for name in ("whole", "broken")
    )
    assert carry_out(whole, MessageWriter(None), StopSignal())
    stop_signal = StopSignal()
    assert not carry_out(broken, Stopping(2, stop_signal), stop_signal)

    assert carry_out(broken, MessageWriter(None), StopSignal())

    name = "model.safetensors" if technique == "full" else "adapter_model.safetensors"
    assert (broken / "out" / name).read_bytes() == (whole / "out" / name).read_bytes()


def test_docs_have_the_table_that_these_tests_hold() -> None:
    assert zoo.DOCS.read_text() == zoo.written(), "run `python tests/fixtures/zoo.py`"
    assert zoo.table() in zoo.DOCS.read_text()
