"""Checks that an adapter's weights are those that its configuration describes, without loading the base's."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tunery.failures import CannotAdapt
from worker.trainer import inspection
from worker.trainer.adapter_import.archive import CONFIG, WEIGHTS
from worker.trainer.adapter_import.errors import UnusableAdapter
from worker.trainer.export import files
from worker.trainer.recipes.lora import with_new_adapters

_PREFIX = "base_model.model."
_TYPES = {torch.float32, torch.float16, torch.bfloat16}
Scales = dict[str, tuple[int, float]]
"""Rank and alpha of each adapted module."""


def check(source: str, base: Path, folder: Path, config: LoraConfig) -> Scales:
    """Compares the adapter's weights in `folder` with the base's, and drops copies of the base's weights.

    Raises UnusableAdapter.
    """
    model = _adapted(source, base, config)
    wanted = {name: each.shape for name, each in get_peft_model_state_dict(model, save_embedding_layers=False).items()}
    tensors = _read(source, folder / WEIGHTS)
    kept = {name: each for name, each in tensors.items() if name in wanted}
    for name in sorted(tensors.keys() - wanted.keys()):
        _refuse_unless_the_bases(source, base, name, tensors[name])
    _check_shapes(source, kept, wanted)
    _check_numbers(source, kept)
    if len(kept) < len(tensors):
        save_file(kept, folder / WEIGHTS, metadata={"format": "pt"})
    return _scales(model)


def _adapted(source: str, base: Path, config: LoraConfig) -> Any:
    """Returns the base's model with the adapter's layers, without any weights."""
    try:
        with torch.device("meta"):
            return with_new_adapters(inspection.skeleton(source, base), config)
    except (CannotAdapt, ValueError, TypeError, NotImplementedError, RuntimeError, AttributeError, re.error) as error:
        cause = error.__cause__ or error  # PEFT's own message
        said = (str(cause).strip() or type(cause).__name__).splitlines()[0].rstrip(".")
        reason = f"PEFT cannot load it onto this base ({said}). Name the base that it was trained on."
        raise UnusableAdapter(source=source, reason=reason) from error


def _read(source: str, path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except Exception as error:  # safetensors raises its own bare Rust error
        raise UnusableAdapter(source=source, reason=f"{WEIGHTS} is damaged ({error}). Copy it again.") from error


def _refuse_unless_the_bases(source: str, base: Path, name: str, tensor: Tensor) -> None:
    """Accepts a copy of the base's own weight, such as the embeddings that PEFT saves; else raises UnusableAdapter.

    Why not load one that differs, as PEFT does: it would overwrite the base's, which other adapters use too.
    """
    own = _weight(base, name.removeprefix(_PREFIX).replace(".base_layer.", "."))
    if own is None:
        reason = f"it has {name}, which {CONFIG} on this base does not have. Name the base that it was trained on."
        raise UnusableAdapter(source=source, reason=reason)
    if own.shape != tensor.shape:
        reason = (
            f"{name} has {len(tensor)} rows, but the base's has {len(own)}: it was trained with another vocabulary. "
            "Add the base with the enlarged vocabulary, or train the new tokens with trainable_token_indices."
        )
        raise UnusableAdapter(source=source, reason=reason)
    if not torch.equal(own.to(torch.bfloat16), tensor.to(torch.bfloat16)):
        reason = f"{name} differs from the base's. List fully trained weights in modules_to_save."
        raise UnusableAdapter(source=source, reason=reason)


def _weight(base: Path, name: str) -> Tensor | None:
    """Returns the base's own weight; for a tied head, the embedding's."""
    for path in files.weight_files(base):
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            for each in (name, re.sub(r"^lm_head\.", "model.embed_tokens.", name)):
                if each in names:
                    found: Tensor = file.get_tensor(each)
                    return found
    return None


def _check_shapes(source: str, found: dict[str, Tensor], wanted: dict[str, torch.Size]) -> None:
    if missing := sorted(wanted.keys() - found.keys()):
        reason = f"{WEIGHTS} lacks {_listed(missing)}, which {CONFIG} describes. Copy both from one folder."
        raise UnusableAdapter(source=source, reason=reason)
    for name, tensor in sorted(found.items()):
        if tensor.shape != wanted[name]:
            reason = (
                f"{name} is {_size(tensor.shape)} in its file, but {_size(wanted[name])} according to {CONFIG} on this "
                "base. Name the base that it was trained on, or copy both files from one folder."
            )
            raise UnusableAdapter(source=source, reason=reason)


def _check_numbers(source: str, found: dict[str, Tensor]) -> None:
    for name, tensor in sorted(found.items()):
        if tensor.dtype not in _TYPES:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UnusableAdapter(source=source, reason=f"{name} is {kind}. Save it in float32, float16 or bfloat16.")
        if not tensor.isfinite().all():
            reason = f"{name} has values that are NaN or infinite. Use an earlier checkpoint."
            raise UnusableAdapter(source=source, reason=reason)


def _scales(model: Any) -> Scales:
    found: Scales = {}
    for name, layer in model.get_base_model().named_modules():
        if "default" in (getattr(layer, "r", None) or {}):
            found[name] = (layer.r["default"], layer.lora_alpha["default"])
    return found


def _size(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape))


def _listed(names: list[str]) -> str:
    return f"{', '.join(names[:3])}{' and more' if len(names) > 3 else ''}"
