"""Copies a source's weights as bf16 safetensors, with one shard in memory at a time."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tunery.errors import UnusableModel
from worker.trainer import dtypes

INDEX = "model.safetensors.index.json"
_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}


def copy(source: str, folder: Path, out: Path, skeleton: Any) -> None:
    """Writes the weights in `folder` to `out`; `skeleton` is their model without weights. Raises UnusableModel."""
    shards = _shards(source, folder)
    keep = dtypes.keeps(skeleton)
    sixteen_bits = _is_mostly_16_bits(source, shards)
    weight_map: dict[str, str] = {}
    for shard in shards:
        tensors = {
            # In a 16-bit file, fp32 is intended, whatever the weight's name.
            name: tensor if sixteen_bits and tensor.dtype == torch.float32 else dtypes.to_bf16(name, tensor, keep)
            for name, tensor in _read(source, shard).items()
        }
        save_file(tensors, out / shard.name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, shard.name))
    _untangle(source, out, skeleton, weight_map)
    if len(set(weight_map.values())) > 1:
        (out / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2) + "\n")


def _shards(source: str, folder: Path) -> list[Path]:
    """Returns the weight files that a loader would read: those that the index names, or all."""
    index = folder / INDEX
    if not index.exists():
        one = folder / "model.safetensors"
        return [one] if one.exists() else sorted(folder.glob("*.safetensors"))
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    missing = [name for name in names if Path(name).name != name or not (folder / name).exists()]
    if missing:
        raise UnusableModel(source=source, reason=f"its index lists {missing[0]}, which is missing. Copy every shard.")
    return [folder / name for name in names]


def _is_mostly_16_bits(source: str, shards: list[Path]) -> bool:
    """Whether most bytes of the floating-point weights are in 16-bit types."""
    sizes: Counter[bool] = Counter()
    for shard in shards:
        with _opened(source, shard) as file:
            for name in file.keys():  # noqa: SIM118 - it is not a dict
                entry = file.get_slice(name)
                width = _BYTES.get(entry.get_dtype(), 0)
                sizes[width == 2] += width * torch.Size(entry.get_shape()).numel()
    return sizes[True] > sizes[False]


def _read(source: str, shard: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(shard)
    except Exception as error:  # safetensors raises its own bare Rust error
        raise _damaged(source, shard, error) from error


def _opened(source: str, shard: Path) -> Any:
    try:
        return safe_open(shard, framework="pt")
    except Exception as error:
        raise _damaged(source, shard, error) from error


def _damaged(source: str, shard: Path, error: Exception) -> UnusableModel:
    return UnusableModel(source=source, reason=f"{shard.name} is damaged ({error}). Copy it again.")


def _untangle(source: str, out: Path, skeleton: Any, weight_map: dict[str, str]) -> None:
    """Removes the second copy of a tied weight. Raises UnusableModel if the two differ.

    A loader that ties them would drop one, another would train both: two different models from the same files.
    """
    for copied, original in skeleton.all_tied_weights_keys.items():
        if copied not in weight_map or original not in weight_map:
            continue
        first, second = (load_file(out / weight_map[name])[name] for name in (copied, original))
        if first.shape != second.shape or not torch.equal(first, second):
            raise UnusableModel(
                source=source,
                reason=f"its config ties {copied} to {original} (tie_word_embeddings), but its files have two "
                "different ones. Set tie_word_embeddings to false in config.json, or remove the unused one.",
            )
        shard = out / weight_map.pop(copied)
        rest = {name: tensor for name, tensor in load_file(shard).items() if name != copied}
        save_file(rest, shard, metadata={"format": "pt"})
