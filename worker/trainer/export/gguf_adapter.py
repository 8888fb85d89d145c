"""Writes a LoRA adapter as a GGUF file, which llama.cpp applies to its base's file."""

import re
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from transformers import AutoConfig

from worker.trainer.export import files, gguf_models, gguf_writer
from worker.trainer.export.errors import NoGguf
from worker.trainer.export.gguf_models import Array, Family

_FACTOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<letter>[AB])\.weight")


def write(base: Path, adapter: Path, *, out: Path, name: str) -> str:
    """Writes the adapter to the file `out` in fp32; returns its size in words. Raises NoGguf."""
    config = AutoConfig.from_pretrained(base)
    family = gguf_models.find(config)
    lora: Any = LoraConfig.from_pretrained(str(adapter))
    with closing(GGUFWriter(out, family.name)) as writer:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(lora.lora_alpha))
        writer.add_name(name)
        gguf_models.describe_base(writer, files.weights_sha256(base))
        for target, tensor in _tensors(adapter, lora, family, config).items():
            writer.add_tensor(target, tensor, raw_dtype=GGMLQuantizationType.F32)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    return f"{out.stat().st_size / 1e6:.1f} MB, for a GGUF file of its base"


def _tensors(adapter: Path, lora: Any, family: Family, config: Any) -> dict[str, Array]:
    """Returns both factors of each module by GGUF's names. Raises NoGguf."""
    mapped = gguf.get_tensor_name_map(family.arch, config.num_hidden_layers)
    found = {}
    for module, (a, b) in sorted(_factors(adapter, lora).items()):
        target = mapped.get_name(f"{module}.weight", try_suffixes=(".weight",))
        if target is None or (target == "output.weight" and config.tie_word_embeddings):
            raise NoGguf(reason=f"GGUF does not support an adapter on {module}.")
        scaled = b * np.float32(_correction(lora, module, len(a)))
        found[f"{target}.lora_a"] = np.ascontiguousarray(a)
        found[f"{target}.lora_b"] = np.ascontiguousarray(gguf_writer.convert(scaled, target, family, config))
    return found


def _factors(adapter: Path, lora: Any) -> dict[str, tuple[Array, Array]]:
    """Returns A [rank, in] and B [out, rank] of each module. Raises NoGguf if the adapter has more than these."""
    found: dict[str, dict[str, Array]] = {}
    for key, tensor in load_file(adapter / "adapter_model.safetensors").items():
        match = _FACTOR.fullmatch(key)
        if match is None or lora.use_dora:
            what = "it is a DoRA adapter" if lora.use_dora else f"the adapter has {key}"
            raise NoGguf(reason=f"{what}, and llama.cpp supports only plain LoRA. Merge it first.")
        found.setdefault(match["module"], {})[match["letter"]] = tensor.float().numpy()
    return {module: (both["A"], both["B"]) for module, both in found.items()}


def _correction(lora: Any, module: str, rank: int) -> float:
    """Returns the factor for B, as llama.cpp scales every module by one alpha over its own rank."""
    alpha = lora.alpha_pattern.get(get_pattern_key(lora.alpha_pattern.keys(), module), lora.lora_alpha)
    scale = alpha / rank**0.5 if lora.use_rslora else alpha / rank
    return float(scale * rank / lora.lora_alpha)
