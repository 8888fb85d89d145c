"""Writes a whole model with its linear layers in eight bits, in the compressed-tensors format, which vLLM serves.

Each row of a matrix has its own scale; inputs are scaled token by token when the model runs. Embeddings, norms and head
stay unchanged.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from worker.trainer.data import Row
from worker.trainer.export import files, proof
from worker.trainer.export.errors import FormatDiffers
from worker.trainer.export.proof import Answered, Divergence
from worker.trainer.weights import INDEX

_LARGEST = torch.finfo(torch.float8_e4m3fn).max
_EIGHT_BITS = {"num_bits": 8, "type": "float", "symmetric": True}
RECORD = "fp8.json"


def write(folder: Path, rows: list[Row], *, out: Path, base_weights_sha256: dict[str, str]) -> str:
    """Writes the model in `folder` to `out`; describes the loss from eight bits, which `fp8.json` holds too.

    Raises FormatDiffers, FormatAnswersWorse.
    """
    out.mkdir()
    layers = _layers(folder)
    weight_map: dict[str, str] = {}
    for shard in files.weight_files(folder):
        tensors = _narrowed(load_file(shard), layers)
        save_file(tensors, out / shard.name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard.name)
    if (folder / INDEX).exists():
        (out / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2) + "\n")
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": _described()}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    files.copy_texts(folder, out)
    record: dict[str, Any] = {"from_whole_model": None, "base_weights_sha256": base_weights_sha256}
    said = f"{len(layers)} linear layers in eight bits"
    if rows and files.fits_in_fp32(folder):
        divergence, answered = _measure(folder, out, rows)
        divergence.check(proof.FP8, FormatDiffers, format="FP8")
        answered.check("FP8")
        record["from_whole_model"] = asdict(divergence) | {"answers": asdict(answered)}
        said += f"; {divergence.describe('the whole model')}"
    (out / RECORD).write_text(json.dumps(record | {"bounds": asdict(proof.FP8)}, indent=2) + "\n")
    return said


def _layers(folder: Path) -> set[str]:
    """Returns the names of the linear layers' weights, without the head's."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    head = model.get_output_embeddings()
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }


def _described() -> dict[str, Any]:
    weights = _EIGHT_BITS | {"strategy": "channel", "dynamic": False}
    inputs = _EIGHT_BITS | {"strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


def _narrowed(tensors: dict[str, Tensor], layers: set[str]) -> dict[str, Tensor]:
    found = {}
    for name, tensor in tensors.items():
        if name in layers:
            found[name], found[f"{name}_scale"] = narrow(tensor)
        else:
            found[name] = tensor
    return found


def narrow(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns a matrix [out, in] in eight bits and the scale of each row [out, 1] in bf16."""
    wide = weight.float()
    # The scale as it will be stored, so that its own rounding does not add to that of the weights.
    scale = (wide.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / _LARGEST).to(torch.bfloat16)
    return (wide / scale.float()).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn), scale


@torch.no_grad()
def _measure(folder: Path, out: Path, rows: list[Row]) -> tuple[Divergence, Answered]:
    """Measures how far the model with the files' weights differs from the original, and how both would answer."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    chosen = proof.choose(rows, model.config.get_text_config().vocab_size)
    reference = proof.log_probs(model, chosen)
    for shard in files.weight_files(out):
        tensors = load_file(shard)
        for name in (name for name in tensors if f"{name}_scale" in tensors):
            layer = model.get_submodule(name.removesuffix(".weight"))
            layer.weight.copy_(tensors[name].float() * tensors[f"{name}_scale"].float())
            layer.register_forward_pre_hook(_round_inputs)
    found = proof.log_probs(model, chosen)
    return proof.compare(reference, found), proof.compare_answers(reference, found, chosen)


def _round_inputs(_layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Rounds inputs as a server does: to eight bits, with a scale for each token."""
    wide, *others = args
    scale = wide.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / _LARGEST
    return ((wide / scale).to(torch.float8_e4m3fn).to(wide.dtype) * scale, *others)
