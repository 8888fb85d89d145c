"""Attention of one token a row over cached keys and values, of which each row has its own number.

torch's kernels that take a mask read every position that it hides: of rows of different lengths, and of answers that
have just begun, that is most of a cache. They also have one block of threads for each head of keys, which for a single
row leaves most of a GPU idle. `plain` is the definition, and runs on a CPU.
"""

import torch
from torch import Tensor
from torch.nn import functional

_WIDEST = 256


def attend(
    query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, scale: float, window: int | None = None
) -> Tensor:
    """Returns what each row's token, at its last position, attends to: [rows, heads, width].

    `query` [rows, heads, width]; `keys`, `values` [rows, key heads, positions, width], of which the first `lengths`
    [rows], int64, are a row's. `window`: the positions that a token sees, with itself; None: all.
    """
    if not available(query, keys):
        return plain(query, keys, values, lengths, scale, window)
    from worker.trainer.kernels import cached_attention_triton  # without a GPU there is no Triton

    return cached_attention_triton.attend(query, keys, values, lengths, scale, window)


def available(query: Tensor, keys: Tensor) -> bool:
    """Whether the Triton kernel computes this: its products have 16 bits."""
    return query.is_cuda and query.dtype == keys.dtype != torch.float32 and query.shape[-1] <= _WIDEST


def plain(
    query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, scale: float, window: int | None = None
) -> Tensor:
    """Computes `attend` by its definition."""
    positions = torch.arange(keys.shape[2], device=keys.device)
    seen = positions < lengths[:, None]
    if window is not None:
        seen &= positions >= lengths[:, None] - window
    rows, heads, width = query.shape
    grouped = query.reshape(rows, keys.shape[1], -1, width)  # heads that share keys, as tokens of one head
    out = functional.scaled_dot_product_attention(grouped, keys, values, seen[:, None, None], scale=scale)
    return out.reshape(rows, heads, width)
