"""transformers reads an FP8 export exactly as it was written and measured."""

import json
from pathlib import Path

import pytest
import tiny_models
import torch
from run_folders import Ear, chat, lay_out, plan, said
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tunery.spec import Export, Lora
from worker.trainer.data import Row
from worker.trainer.export import fp8, proof
from worker.trainer.export.errors import FormatDiffers
from worker.trainer.report import MessageWriter
from worker.trainer.run import carry_out
from worker.trainer.stop_signal import StopSignal

ROWS = [Row(list(range(3, 40)), [-100, *range(4, 40)])]


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, Path]:
    """Returns the folders of a model and of its FP8 export."""
    base = tiny_models.llama(tmp_path / "base", bf16=True, initializer_range=0.05)
    fp8.write(base, ROWS, out=tmp_path / "fp8", base_weights_sha256={"model.safetensors": "abc"})
    return base, tmp_path / "fp8"


def test_each_row_has_a_scale_of_its_own(written: tuple[Path, Path]) -> None:
    base, out = written
    found, name = load_file(out / "model.safetensors"), "model.layers.1.mlp.up_proj.weight"
    weight = load_file(base / "model.safetensors")[name].float()
    assert (found[name].dtype, found[f"{name}_scale"].shape) == (torch.float8_e4m3fn, (64, 1))
    assert found["lm_head.weight"].dtype == found["model.norm.weight"].dtype == torch.bfloat16
    back = found[name].float() * found[f"{name}_scale"].float()
    assert ((back - weight).abs() <= weight.abs() / 16 + weight.abs().amax(1, keepdim=True) / 2**17).all()


def test_small_row_beside_a_large_one_keeps_its_numbers() -> None:
    weight = torch.tensor([[1e-6, -3e-6], [1e3, 2e3]])
    eight_bits, scale = fp8.narrow(weight)
    assert torch.allclose(eight_bits.float() * scale.float(), weight, rtol=1 / 16, atol=0)


def test_transformers_reads_what_was_measured(written: tuple[Path, Path]) -> None:
    base, out = written
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()

    divergence = proof.compare(proof.log_probs(plain, ROWS), proof.log_probs(loaded, ROWS))

    recorded = json.loads((out / "fp8.json").read_text())["from_whole_model"]
    print(divergence, recorded)
    assert 0 < recorded["mean_kl"] < 1e-3
    assert divergence.mean_kl == pytest.approx(recorded["mean_kl"], rel=0.05)
    assert divergence.top1 == recorded["top1"]


def test_record_names_the_base_by_content(written: tuple[Path, Path]) -> None:
    assert json.loads((written[1] / "fp8.json").read_text())["base_weights_sha256"] == {"model.safetensors": "abc"}


def spoilt(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """Makes the FP8 export store each weight multiplied by `factor`."""
    own = fp8.narrow
    monkeypatch.setattr(fp8, "narrow", lambda weight: own(weight * factor))


def test_model_that_predicts_otherwise_in_eight_bits_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_models.llama(tmp_path / "base", bf16=True, initializer_range=0.05)
    spoilt(monkeypatch, 1.5)

    with pytest.raises(FormatDiffers, match=r"In FP8, the model's predictions differ .* \(at least 70\.00%\)"):
        fp8.write(base, ROWS, out=tmp_path / "fp8", base_weights_sha256={})


def test_job_leaves_out_eight_bits_that_answer_worse(tmp_path: Path, ear: Ear, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_models.llama(tmp_path / "base", bf16=True, never_said=tuple(range(6, 260)), initializer_range=0.05)
    folder = lay_out(tmp_path / "run", base, plan(export=Export(fp8=True, merged=True)), [chat(i) for i in range(8)])
    spoilt(monkeypatch, 1.5)

    assert carry_out(folder, MessageWriter(ear.descriptor), StopSignal())

    merged, eight_bits = said(ear, "exported")
    assert (merged.is_refused, eight_bits.is_refused) == (False, True)
    assert "In FP8, the model" in eight_bits.message
    assert (folder / "out" / "merged").exists()
    assert not (folder / "out" / "fp8").exists()


def test_job_leaves_the_model_in_eight_bits(tmp_path: Path, ear: Ear) -> None:
    base = tiny_models.llama(tmp_path / "base", bf16=True, never_said=tuple(range(6, 260)), initializer_range=0.05)
    asked = plan(technique=Lora(r=4), learning_rate=1e-3, export=Export(fp8=True))
    lay_out(tmp_path / "run", base, asked, [chat(i) for i in range(8)])

    assert carry_out(tmp_path / "run", MessageWriter(ear.descriptor), StopSignal())

    merged, eight_bits = said(ear, "exported")
    assert (merged.path, eight_bits.path, eight_bits.is_refused) == ("merged", "fp8", False), eight_bits.message
    assert "14 linear layers in eight bits; on" in eight_bits.message
    assert (tmp_path / "run" / "out" / "fp8" / "chat_template.jinja").exists()
    assert not (tmp_path / "run" / "out" / "merged").exists()
