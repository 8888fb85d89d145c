"""Compares QLoRA with LoRA on the dequantised base and on the original one, step by step in fp32 on a CPU.

`python -m bench.four_bits BASE OUT.json [STEPS]`; BASE: a model's folder, or `tiny`, a random one of two layers. The
first comparison has to be equal: it is the same model, stored in two ways. The second shows what four bits cost.
"""

import json
import shutil
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from transformers import AutoModelForCausalLM

from bench import beside_trl, sft
from tunery.planning.precision import decide
from tunery.spec import Lora, Qlora
from worker.trainer.recipes.qlora import load_quantised

QLORA = Qlora(r=8, compute_dtype="float32")
RATE, STEPS = 1e-3, 16


def dequantise(base: Path, folder: Path) -> Path:
    """Writes a base in fp32 whose linear layers have the values of `base` in four bits; returns its folder."""
    device = torch.device("cpu")
    packed = load_quantised(base, decide(QLORA, device.type), device)
    dense = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for name, layer in packed.named_modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            state = layer.weight.quant_state
            values = bitsandbytes.functional.dequantize_4bit(layer.weight.data, state)
            dense.get_submodule(name).weight.data = values.float()
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    dense.save_pretrained(folder)
    return folder


def compare(base: Path, folder: Path, steps: int = STEPS) -> dict[str, Any]:
    """Returns the losses of QLoRA and of LoRA on the dequantised and the original base, and their differences."""
    lora = Lora(r=QLORA.r)
    bases = {"qlora": base, "dequantised": dequantise(base, folder / "dequantised"), "original": base}
    losses, weights = {}, {}
    for name, own in bases.items():
        t = sft.start(folder / name, own, QLORA if name == "qlora" else lora, RATE, steps=steps)
        weights = weights or {key: parameter.detach().clone() for key, parameter in t.parameters.items()}
        for key, parameter in t.parameters.items():  # all from the same adapter
            parameter.data.copy_(weights[key])
        losses[name] = [step["loss"] for step in sft.ours(t)]
    return {
        "losses": losses,
        "largest_difference_dequantised": _apart(losses, "dequantised"),
        "largest_difference_original": _apart(losses, "original"),
        "mean_gap": sum(a - b for a, b in zip(losses["qlora"], losses["original"], strict=True)) / steps,
    }


def _apart(losses: dict[str, list[float]], other: str) -> float:
    return max(abs(a - b) / b for a, b in zip(losses["qlora"], losses[other], strict=True))


def main() -> None:
    name, out, *rest = sys.argv[1:]
    with tempfile.TemporaryDirectory() as scratch:
        base = beside_trl.tiny(Path(scratch) / "base") if name == "tiny" else Path(name).resolve()
        found = compare(base, Path(scratch), int(rest[0]) if rest else STEPS)
    losses = found["losses"]
    for step in zip(*losses.values(), strict=True):
        print("   ", *(f"{loss:.6f}" for loss in step))
    print({key: value for key, value in found.items() if key != "losses"})
    about = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "base": name if name == "tiny" else base.name}
    Path(out).write_text(json.dumps({**about, "versions": beside_trl.versions(), **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
