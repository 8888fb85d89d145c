"""Writes a whole model's folder as one GGUF file, for llama.cpp and programs built on it."""

import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from safetensors import safe_open
from transformers import AutoConfig

from tunery.spec import GgufType
from worker.trainer.export import files, gguf_models, gguf_tokenizers
from worker.trainer.export.errors import NoGguf
from worker.trainer.export.gguf_models import Array, Family
from worker.trainer.export.merge import Rounding
from worker.trainer.kernels import stochastic

_F16, _F32, _Q8_0 = GGMLQuantizationType.F16, GGMLQuantizationType.F32, GGMLQuantizationType.Q8_0
_TYPES: dict[GgufType, tuple[GGMLQuantizationType, LlamaFileType]] = {
    "f16": (_F16, LlamaFileType.MOSTLY_F16),
    "q8_0": (_Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
    "q4_1": (GGMLQuantizationType.Q4_1, LlamaFileType.MOSTLY_Q4_1),
}
_FOUR_BITS = (GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_1)
_OUTER = ("token_embd.weight", "output.weight")
"""Kept in 8 bits if the rest has 4, as in llama.cpp's own quantisation: every answer passes through them."""
_BLOCK = 32


def write(
    folder: Path,
    *,
    out: Path,
    kind: GgufType,
    name: str,
    base_weights_sha256: dict[str, str] | None = None,
    rounding: Rounding = "nearest",
) -> str:
    """Writes the model in `folder` to the file `out`, matrices in `kind`; returns its size in words. Raises NoGguf.

    `base_weights_sha256`: that of the base that the model was trained from; None for a base itself. `rounding`: how
    weights are rounded to four bits.
    """
    config = AutoConfig.from_pretrained(folder)
    family = gguf_models.find(config)
    with closing(GGUFWriter(out, family.name)) as writer:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(gguf_tokenizers.name_for(folder, name))
        writer.add_file_type(_TYPES[kind][1])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        gguf_models.describe(writer, family, config)
        if base_weights_sha256 is not None:
            gguf_models.describe_base(writer, base_weights_sha256)
        gguf_tokenizers.describe(writer, folder, config.vocab_size)
        _write_tensors(writer, folder, family, config, kind, rounding)
    composed = ", for texts in Unicode's NFC" if gguf_tokenizers.composes(folder) else ""
    return f"{out.stat().st_size / 1e6:.1f} MB, of the architecture {family.name}{composed}"


def _write_tensors(
    writer: GGUFWriter, folder: Path, family: Family, config: Any, kind: GgufType, rounding: Rounding
) -> None:
    """Writes header, fields and tensors. The header lists all tensors, so their sizes are determined first."""
    sources, shapes = names(folder, family, config), _shapes(folder)
    made = dict(gguf_models.made_tensors(config))
    types = {target: _type(target, shapes[source], kind) for target, source in sources.items()}
    for target, tensor in made.items():
        writer.add_tensor_info(target, tensor.shape, np.dtype(np.float32), tensor.nbytes, _F32)
    for target, source in sources.items():
        _announce(writer, target, shapes[source], types[target])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in made.values():
        writer.write_tensor_data(tensor)
    for target, tensor in _tensors(folder, sources):
        converted = convert(tensor, target, family, config)
        if rounding == "stochastic" and types[target] in _FOUR_BITS:
            converted = dither(converted, target, types[target])
        writer.write_tensor_data(encode(converted, target, types[target]))


def names(folder: Path, family: Family, config: Any) -> dict[str, str]:
    """Returns each tensor's own name by its GGUF name. Raises NoGguf for one without a place there."""
    mapped = gguf.get_tensor_name_map(family.arch, config.num_hidden_layers)
    found = {}
    for source in _shapes(folder):
        target = mapped.get_name(source, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise NoGguf(reason=f"GGUF does not support its weight {source}.")
        found[target] = source
    return found


def _shapes(folder: Path) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for path in files.weight_files(folder):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - it is not a dict
    return found


def _tensors(folder: Path, sources: dict[str, str]) -> Iterator[tuple[str, Array]]:
    """Yields each tensor in fp32, with one in memory at a time."""
    place: dict[str, Path] = {}
    for path in files.weight_files(folder):
        with safe_open(path, framework="pt") as file:
            place |= dict.fromkeys(file.keys(), path)
    for target, source in sources.items():
        with safe_open(place[source], framework="pt") as file:
            yield target, file.get_tensor(source).float().numpy()


def convert(tensor: Array, target: str, family: Family, config: Any) -> Array:
    """Returns a tensor as llama.cpp expects it under the name `target`."""
    if family.norm_offset and target.endswith("norm.weight"):
        return tensor + np.float32(family.norm_offset)
    if (heads := _permuted_heads(target, family, config)) is not None:
        return permute(tensor, heads)
    return tensor


def restore(tensor: Array, target: str, family: Family, config: Any) -> Array:
    """Inverts `convert`."""
    if family.norm_offset and target.endswith("norm.weight"):
        return tensor - np.float32(family.norm_offset)
    if (heads := _permuted_heads(target, family, config)) is not None:
        return tensor.reshape(heads, -1, 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
    return tensor


def _permuted_heads(target: str, family: Family, config: Any) -> int | None:
    """Returns the number of heads of a tensor whose rows are permuted; None for others."""
    found = re.search(r"\.attn_([qk])\.(weight|bias)$", target) if family.permutes else None
    if found is None:
        return None
    return int(config.num_attention_heads if found[1] == "q" else config.num_key_value_heads)


def permute(rows: Array, heads: int) -> Array:
    """Reorders rows of q or k so that those that RoPE rotates together are adjacent; before, they are half a head
    apart.
    """
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _type(target: str, shape: list[int], kind: GgufType) -> GGMLQuantizationType:
    if len(shape) < 2:
        return _F32
    wanted = _Q8_0 if kind.startswith("q") and target in _OUTER else _TYPES[kind][0]
    return wanted if wanted == _F16 or shape[-1] % _BLOCK == 0 else _F16


def _announce(writer: GGUFWriter, target: str, shape: list[int], kind: GGMLQuantizationType) -> None:
    block, bytes_a_block = gguf.GGML_QUANT_SIZES[kind]
    size = int(np.prod(shape)) // block * bytes_a_block
    writer.add_tensor_info(target, shape, np.dtype(np.float32), size, kind)


def dither(tensor: Array, target: str, kind: GGMLQuantizationType) -> Array:
    """Moves numbers by up to half a step of four bits, so that nearest rounding goes up or down at random and is right
    on average. The ends of a block stay, as they determine the step.
    """
    blocks = tensor.reshape(-1, _BLOCK)
    if kind == GGMLQuantizationType.Q4_1:
        low, high = blocks.min(1, keepdims=True), blocks.max(1, keepdims=True)
        step, is_end = (high - low) / 15, (blocks == low) | (blocks == high)
    else:
        high = np.abs(blocks).max(1, keepdims=True)
        low, step, is_end = -high, high / 8, np.abs(blocks) == high
    numbers = np.random.default_rng(stochastic.seed_of(0, 0, target)).random(blocks.shape, dtype=np.float32)
    moved = (blocks + (numbers - np.float32(0.5)) * step).clip(low, high)
    return np.asarray(np.where(is_end, blocks, moved), dtype=np.float32).reshape(tensor.shape)


def encode(tensor: Array, target: str, kind: GGMLQuantizationType) -> Array:
    """Encodes numbers in one of GGUF's types. Raises NoGguf if they are out of range."""
    if kind == _F32:
        return np.ascontiguousarray(tensor, dtype=np.float32)
    if kind == _F16:
        if np.abs(tensor).max() > np.finfo(np.float16).max:
            raise NoGguf(reason=f"{target} has values beyond 65,504, the largest in F16. Export q8_0 instead.")
        return np.ascontiguousarray(tensor, dtype=np.float16)
    return gguf.quants.quantize(np.ascontiguousarray(tensor), kind)
