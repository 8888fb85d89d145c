"""Causal attention of rows that lie behind each other without padding, each seeing only itself.

torch's variable-length attention takes the rows' borders and does no work for anything between them: no padding, no
mask of length x length. `plain` is the definition, and what runs on a CPU, for which torch has no such kernel.
"""

import inspect
import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Borders:
    """Where rows begin and end: `ends` [rows + 1], int32 and from 0, on the device; `longest`: tokens of one at most.

    Without `ends` every sequence of the batch is one row, padded at the right, where causal attention never looks.
    """

    ends: Tensor | None = None
    longest: int = 0


def plain(query: Tensor, key: Tensor, value: Tensor, borders: Borders, scale: float, window: int | None) -> Tensor:
    """The definition, row by row. [tokens, heads, width] each; key and value may have fewer heads."""
    assert borders.ends is not None
    outs = []
    ends = borders.ends.tolist()
    for start, end in (pair for pair in itertools.pairwise(ends) if pair[0] < pair[1]):
        q, k, v = (part[start:end].transpose(0, 1) for part in (query, key, value))
        mask = torch.ones(end - start, end - start, dtype=torch.bool, device=query.device).tril()
        if window is not None:
            mask = mask.triu(1 - window)
        outs.append(functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True))
    return torch.cat([out.transpose(0, 1) for out in outs])


def rows_apart(query: Tensor, key: Tensor, value: Tensor, borders: Borders, scale: float, window: int | None) -> Tensor:
    """`plain`, by torch's kernel on a CUDA device. `window`: positions that a token sees, itself included."""
    if not query.is_cuda:
        return plain(query, key, value, borders, scale, window)
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    # torch 2.11 names the causal mask; later ones take it for a window without a right side.
    extra: dict[str, Any] = {"is_causal": True} if "is_causal" in known else {}
    if "window_size" in known:
        extra["window_size"] = (-1 if window is None else window - 1, 0)
    if "enable_gqa" in known:
        extra["enable_gqa"] = True
    ends, longest = borders.ends, borders.longest
    assert ends is not None
    out = varlen_attn(query, key, value, ends, ends, longest, longest, scale=scale, **extra)
    assert isinstance(out, Tensor)
    return out


def available(width: int, window: int | None) -> bool:
    """Whether torch's kernel takes heads of `width` numbers and this window, on a CUDA device."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return (
        width <= 256
        and width % 8 == 0
        and (window is None or "window_size" in inspect.signature(varlen_attn).parameters)
    )
