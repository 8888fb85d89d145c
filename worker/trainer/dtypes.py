"""Decides which weights keep their own type when the others become bf16, and says in which type products are made."""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Keeps = Callable[[str], bool]
"""Whether the weight of this name keeps its type."""


def keeps(model: Any) -> Keeps:
    """Returns a test for weights with which the model's own code computes in fp32, such as a router's biases.

    A bias near 8 has steps of 1/32 in bf16: biases of eight experts that differ by less become equal, and rows go to
    other experts. Why also the list that transformers uses for fp16 only: those weights are small.
    """
    names = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    if not names:
        return lambda _name: False
    pattern = re.compile(rf"(^|\.)({'|'.join(map(re.escape, sorted(names)))})(\.|$)")
    return lambda name: pattern.search(name) is not None


def to_bf16(name: str, tensor: Tensor, keep: Keeps) -> Tensor:
    """Returns a floating-point weight in bf16, unless the model keeps it; integers as they are."""
    return tensor if keep(name) or not tensor.is_floating_point() else tensor.to(torch.bfloat16)


def multiplied_in(stored: torch.dtype, kind: str) -> torch.dtype:
    """Returns the type in which a product of tensors stored in `stored` is computed here, on a `kind` of device."""
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else stored
