"""The coverage report says which linear weights are trained and which are in four bits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from run_folders import Ear, Interrupting, chat, lay_out, plan, said
from transformers import AutoModelForCausalLM, Gemma3Config

from tunery.planning import memory, shape
from tunery.rows.template import ChatTemplate
from tunery.spec import Full, Lora, Qlora, Technique
from worker.trainer import checkpoints, coverage, inspection
from worker.trainer.kernels import experts as kernels
from worker.trainer.objective import all_and_trainable
from worker.trainer.recipes import targets
from worker.trainer.recipes.lora import LORA
from worker.trainer.report import MessageWriter
from worker.trainer.run import carry_out, prepare
from worker.trainer.stop_signal import StopSignal

ROWS = [chat(i) for i in range(4)]
SEVEN = [f"mlp.{name}_proj" for name in ("down", "gate", "up")] + [f"self_attn.{name}_proj" for name in "koqv"]


def run(folder: Path, base: Path, ear: Ear, technique: Technique) -> tuple[dict[str, Any], Any]:
    """Returns the coverage report in a run's artifact, and the run's `started` message."""
    assert carry_out(
        lay_out(folder, base, plan(technique=technique), ROWS), MessageWriter(ear.descriptor), StopSignal()
    )
    record = json.loads((folder / "out" / "training_config.json").read_text())
    [started] = said(ear, "started")
    return record["coverage"], started


@pytest.mark.parametrize(
    ("technique", "quantised"), [(Lora(r=2), None), (Qlora(r=2), 1.0), (Full(), None)], ids=["lora", "qlora", "full"]
)
def test_usual_run_covers_every_linear_weight(
    tmp_path: Path, tiny: Path, ear: Ear, technique: Technique, quantised: float | None
) -> None:
    report, started = run(tmp_path / "run", tiny, ear, technique)

    assert (report["learning"], report["quantised"]) == (1.0, quantised)
    assert [kind["kind"] for kind in report["kinds"]] == [f"model.layers.*.{name}" for name in SEVEN]
    # Two layers of four attention products (two of them half as wide) and three of 32 x 64.
    assert sum(kind["weights"] for kind in report["kinds"]) == 2 * (3 * 32 * 32 + 3 * 32 * 64)
    assert (started.learning_share, started.quantised_share, started.warnings) == (1.0, quantised, [])


def test_layers_that_were_not_named_are_named_in_a_warning(tmp_path: Path, tiny: Path, ear: Ear) -> None:
    report, started = run(tmp_path / "run", tiny, ear, Lora(r=2, target_modules=["q_proj", "up_proj"]))

    assert report["learning"] == pytest.approx(1 / 3)
    assert [kind["kind"] for kind in report["kinds"] if kind["learning"]] == [
        "model.layers.*.mlp.up_proj",
        "model.layers.*.self_attn.q_proj",
    ]
    assert report["kinds"][0]["why"] == "not among target_modules"
    [warning] = started.warnings
    assert warning.startswith(
        "Only 33% of the base's linear weights have adapters or are trained themselves. Not included: "
        "model.layers.*.mlp."
    )


@pytest.mark.parametrize("family", ["GPT-OSS", "DeepSeek-V3"])
def test_experts_have_adapters_and_count(tmp_path: Path, family: str) -> None:
    base: Any = AutoModelForCausalLM.from_pretrained(zoo.make(family, tmp_path), dtype=torch.float32)

    report = coverage.describe(LORA.prepare(base, Lora(r=2), None), Lora(r=2), quantised=False)

    kinds = {kind["kind"].rpartition("layers.*.")[2]: kind for kind in report["kinds"]}
    assert kinds["mlp.experts.gate_up_proj"]["learning"] == kinds["mlp.experts.gate_up_proj"]["weights"] > 0
    assert report["learning"] == 1.0
    assert coverage.warnings(report) == []


def test_weights_in_16_bits_beside_those_in_four_are_named() -> None:
    """A base with experts would look like this if it were not refused."""
    kinds = [
        {"kind": "mlp.experts.up", "weights": 80, "learning": 80, "quantised": 0},
        {"kind": "self_attn.q_proj", "weights": 20, "learning": 20, "quantised": 20},
    ]

    [warning] = coverage.warnings({"learning": 1.0, "quantised": 0.2, "kinds": kinds})

    assert warning == "Only 20% of the base's linear weights are in four bits. Not included: mlp.experts.up."


@pytest.mark.parametrize("names", ["all-linear", ["q_proj", "up_proj"]])
def test_vision_tower_gets_no_adapters(names: Any) -> None:
    """Text never passes through it: its adapters would be created and counted, but never trained."""
    sizes = zoo.SIZE | {"head_dim": 16, "sliding_window": 16}
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Gemma3Config(
        text_config=sizes, vision_config=tower | {"image_size": 28, "patch_size": 14}, mm_tokens_per_image=4
    )
    base: Any = AutoModelForCausalLM.from_config(config)

    model: Any = LORA.prepare(base, Lora(r=2, target_modules=names), None)

    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert learning
    assert not [name for name in learning if "vision" in name]
    loss = model(input_ids=torch.tensor([[5, 60, 7, 80]])).logits.sum()
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    report = coverage.describe(model, Lora(r=2, target_modules=names), quantised=False)
    towers = [kind for kind in report["kinds"] if "vision" in kind["kind"]]
    assert {kind["why"] for kind in towers} == {"text never passes it"}
    assert (report["learning"] == 1.0) == (names == "all-linear")


@pytest.mark.parametrize("family", ["Llama", "GPT-2", "DeepSeek-V3", "GPT-OSS", "Mixtral"])
def test_estimate_counts_what_is_made(tmp_path: Path, family: str) -> None:
    base: Any = AutoModelForCausalLM.from_pretrained(zoo.make(family, tmp_path), dtype=torch.float32)
    model_info = inspection.model_info("zoo", base, ChatTemplate.load(tmp_path)) | coverage.model_info(base.config)
    experts = sum(weight.numel() for weight in targets.experts(base).values())

    model = LORA.prepare(base, Lora(r=4), None)

    assert shape.trainable_params(model_info, Lora(r=4)) == all_and_trainable(model)[1]
    report = coverage.describe(model, Lora(r=4), quantised=False)
    assert model_info["counts"]["experts"] == experts
    assert model_info["counts"]["four_bit"] == sum(kind["weights"] for kind in report["kinds"]) - experts
    estimates = [
        memory.estimate(each, Lora(), max_seq_length=64, device="cpu") for each in (model_info, without(model_info))
    ]
    sums = [estimate.parts["experts"] for estimate in estimates]
    merged = experts if family == "GPT-OSS" else 0  # rows pass through the adapters of the other families' experts
    assert sums == [4 * (merged + merged // 2), 0]
    assert model_info["counts"]["unmerged"] == experts - merged
    assert (kernels.products(model) is not None) == (experts > merged)


def without(model_info: dict[str, Any]) -> dict[str, Any]:
    """Returns the model info as an earlier release stored it."""
    return {name: value for name, value in model_info.items() if name not in ("counts", "active_experts_size")}


def test_four_bits_of_a_base_are_counted_as_they_are_packed(tmp_path: Path, tiny: Path) -> None:
    base: Any = AutoModelForCausalLM.from_pretrained(tiny)
    model_info = inspection.model_info("tiny", base, ChatTemplate.load(tiny)) | coverage.model_info(base.config)
    t = prepare(lay_out(tmp_path / "run", tiny, plan(technique=Qlora(r=2)), ROWS), MessageWriter(None), StopSignal())

    packed = sum(kind["quantised"] for kind in coverage.of(t)["kinds"])

    assert model_info["counts"]["four_bit"] == packed == 2 * (3 * 32 * 32 + 3 * 32 * 64)


def test_snapshot_of_a_run_that_taught_other_weights_is_not_taken(
    tmp_path: Path, tiny: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An earlier release did not train a model's experts."""
    stop_signal = StopSignal()
    folder = lay_out(tmp_path / "run", tiny, plan(batch_size=1), ROWS)
    assert not carry_out(folder, Interrupting(1, stop_signal), stop_signal)
    t = prepare(folder, MessageWriter(None), StopSignal())
    assert checkpoints.find_snapshot(t) is not None
    t.parameters.popitem()

    assert checkpoints.find_snapshot(t) is None

    assert "it has other trainable weights" in caplog.text
