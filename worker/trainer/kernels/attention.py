"""Causal attention of concatenated rows without padding, each of which sees only itself.

`attention_triton` has kernels for rows of common lengths; torch's variable-length attention takes all others. Both
take the rows' borders and compute nothing across them: no padding, no mask of length x length. `plain` is the
definition, and runs on a CPU, for which neither is.
"""

import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

OWN_WIDTHS = frozenset({32, 64, 128})
"""The widths of heads for which `attention_triton` has kernels: those of nearly all models."""
OWN_LONGEST = 8192
"""The longest row up to which they are faster, or as fast within 5 %; longer ones have not been measured."""
_FEW_ROWS = 64
"""The rows for which kernels are compiled at least, or each power of two of them would be compiled between steps."""


@dataclass(frozen=True)
class Borders:
    """Where rows begin and end: `ends` [rows + 1], int32 from 0, on the device; `longest`: the most tokens of a row.

    Without `ends` every sequence of the batch is one row, padded at the right, where causal attention never looks.
    `key_ends`, `longest_keys`: the same of the keys, of which each row has at least as many as queries: its last query
    sees all. None: as many.
    """

    ends: Tensor | None = None
    longest: int = 0
    key_ends: Tensor | None = None
    longest_keys: int = 0

    def of_windows(self, window: int | None, batch: int, width: int, device: torch.device) -> "Borders":
        """Returns the borders with `ends` if a window is narrower than the sequences, which torch's rectangles do not
        support.
        """
        if self.ends is not None or window is None or window >= width:
            return self
        return Borders(torch.arange(0, batch * width + 1, width, dtype=torch.int32, device=device), width)


def plain(query: Tensor, key: Tensor, value: Tensor, borders: Borders, scale: float, window: int | None) -> Tensor:
    """Computes attention by definition, row by row. [tokens, heads, width] each; key and value may have fewer heads."""
    assert borders.ends is not None
    outs = []
    of_queries, of_keys = (list(itertools.pairwise(ends.tolist())) for ends in (borders.ends, _key_ends(borders)))
    for (start, end), own in (pair for pair in zip(of_queries, of_keys, strict=True) if pair[0][0] < pair[0][1]):
        q, k, v = (part.transpose(0, 1) for part in (query[start:end], key[slice(*own)], value[slice(*own)]))
        earlier = k.shape[1] - q.shape[1]
        mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=query.device).tril(earlier)
        if window is not None:
            mask = mask.triu(earlier + 1 - window)
        outs.append(functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True))
    return torch.cat([out.transpose(0, 1) for out in outs])


def rows_apart(query: Tensor, key: Tensor, value: Tensor, borders: Borders, scale: float, window: int | None) -> Tensor:
    """Computes `plain`, on a CUDA device with kernels. `window`: positions that a token sees, with itself."""
    if not query.is_cuda:
        return plain(query, key, value, borders, scale, window)
    assert borders.ends is not None
    if window is None and _is_own(query, borders):
        from worker.trainer.kernels import attention_triton  # only with a CUDA device: a CPU build has no Triton

        return attention_triton.rows_apart(query, key, value, borders.ends, scale)
    found = _kernel()
    assert found is not None
    kernel, known = found
    # torch 2.11 has an option for the causal mask; in later releases it is a window without a right side.
    extra: dict[str, Any] = {"is_causal": True} if "is_causal" in known else {}
    if "window_size" in known:
        extra["window_size"] = (-1 if window is None else window - 1, 0)
    if "enable_gqa" in known:
        extra["enable_gqa"] = True
    longest = borders.longest
    extents = borders.ends, _key_ends(borders), longest, borders.longest_keys or longest
    out = kernel(query, key, value, *extents, scale=scale, **extra)
    assert isinstance(out, Tensor)
    return out


def _is_own(query: Tensor, borders: Borders) -> bool:
    fits = query.shape[-1] in OWN_WIDTHS and query.dtype != torch.float32  # products of which would be rounded to TF32
    return fits and borders.key_ends is None and borders.longest <= OWN_LONGEST


def room(rows: int) -> int:
    """Returns for how many rows, at least `rows`, kernels are compiled."""
    return max(_FEW_ROWS, 1 << (rows - 1).bit_length())


def kernels(rows: int, longest: int) -> tuple[bool, int]:
    """Returns the same for batches whose rows are attended to by the same kernels of one model."""
    return longest <= OWN_LONGEST, room(rows)


def _key_ends(borders: Borders) -> Tensor:
    ends = borders.ends if borders.key_ends is None else borders.key_ends
    assert ends is not None
    return ends


def available(width: int, window: int | None) -> bool:
    """Whether there are kernels for heads of this width and this window, on a CUDA device."""
    found = _kernel()
    return found is not None and width <= 256 and width % 8 == 0 and (window is None or "window_size" in found[1])


@cache
def _kernel() -> tuple[Callable[..., Any], frozenset[str]] | None:
    """Returns torch's variable-length attention and its arguments' names, which differ between releases."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn, frozenset(inspect.signature(varlen_attn).parameters)
