"""Compares loss curves with those of TRL's SFTTrainer, and QLoRA's with LoRA on the dequantised base."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench import beside_trl, four_bits, sft

FOUND: dict[str, Any] = json.loads((beside_trl.ROOT / "bench" / "results" / "sft_tiny_cpu.json").read_text())
"""The results of TRL, as `python -m bench.sft tiny` stored them."""


@pytest.mark.parametrize("found", FOUND["runs"], ids=lambda found: found["run"])
def test_losses_are_those_of_trl(tmp_path: Path, tiny: Path, found: dict[str, Any]) -> None:
    """Compares every step of two shuffled epochs, with warmup, decay of the rate, weight decay and clipping."""
    technique, packing, rate = sft.RUNS[found["run"]]

    mine = sft.ours(sft.start(tmp_path / "run", tiny, technique, rate, packing=packing, steps=len(found["trl"])))

    for name in ("loss", "grad_norm"):
        wanted = [step[name] for step in found["trl"]]
        assert [step[name] for step in mine] == pytest.approx(wanted, rel=5e-3)
    assert mine[0]["loss"] - mine[-1]["loss"] > 0.2, "the loss moves by more than the tolerance"


def test_qlora_is_lora_on_what_its_four_bits_stand_for(tmp_path: Path, tiny: Path) -> None:
    found = four_bits.compare(tiny, tmp_path, steps=8)

    losses = found["losses"]
    assert losses["qlora"] == pytest.approx(losses["dequantised"], rel=5e-3)
    assert found["largest_difference_original"] > 0.02, "on these weights four bits make a difference that is seen"
