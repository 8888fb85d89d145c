"""The Triton kernels behind `cached_attention.attend`: each program reads some of a row's positions of a head of keys,
once for all heads of queries that share it, and a second kernel joins the parts of a row.
"""

# mypy: ignore-errors
# ruff: noqa: N803 - Triton's own style: constants that a kernel is compiled for are in capitals

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from worker.trainer.kernels.triton_ops import processors

_BLOCK_BYTES = 2**14
"""Bytes of keys that a program has at hand: with values and those read ahead, four times as much in shared memory."""
_LEAST_ROWS = 16
"""The least rows of a matrix product."""
_PROGRAMS = 4
"""Programs for each multiprocessor, so that some compute while others wait for memory."""
_LEAST_PART = 128
"""The fewest positions that are worth a program of their own."""


def attend(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, scale: float, window: int | None) -> Tensor:
    """Does the same as `cached_attention.attend`, on CUDA tensors."""
    rows, heads, width = query.shape
    key_heads, positions = keys.shape[1:3]
    padded = max(16, triton.next_power_of_2(width))
    block = max(16, _BLOCK_BYTES // (2 * padded))
    parts = _parts(rows * key_heads, positions, processors(query.device))
    each = triton.cdiv(triton.cdiv(positions, parts), block) * block
    parts = triton.cdiv(positions, each)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    sums, peaks = out, out
    if parts > 1:
        sums = torch.empty(rows, heads, parts, padded, dtype=torch.float32, device=query.device)
        peaks = torch.empty(rows, heads, parts, 2, dtype=torch.float32, device=query.device)
    _attend[(rows * key_heads, parts)](
        query, keys, values, lengths, out, sums, peaks, scale * math.log2(math.e), window or 0, each, key_heads,
        *query.stride()[:2], *keys.stride()[:3], *values.stride()[:3], parts,
        SHARED=heads // key_heads, GROUP=max(_LEAST_ROWS, triton.next_power_of_2(heads // key_heads)), WIDTH=width,
        PADDED=padded, BLOCK=block, WINDOWED=window is not None, WHOLE=parts == 1, num_warps=4, num_stages=2,
    )  # fmt: skip
    if parts > 1:
        _join[(rows * heads,)](
            sums, peaks, out, parts, WIDTH=width, PADDED=padded, PARTS=triton.next_power_of_2(parts), num_warps=4
        )
    return out


def _parts(programs: int, positions: int, processors: int) -> int:
    """Returns in how many parts a row's positions are read: as many as fill the GPU."""
    wanted = triton.cdiv(_PROGRAMS * processors, programs)
    return max(1, min(wanted, positions // _LEAST_PART))


@triton.jit(do_not_specialize=["window", "each", "parts"])
def _attend(Q, K, V, LENGTHS, OUT, SUMS, PEAKS, scale, window, each, key_heads, q_row, q_head, k_row, k_head, k_place,
            v_row, v_head, v_place, parts, SHARED: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr,
            PADDED: tl.constexpr, BLOCK: tl.constexpr, WINDOWED: tl.constexpr, WHOLE: tl.constexpr):  # fmt: skip
    row, head = tl.program_id(0) // key_heads, tl.program_id(0) % key_heads
    row = row.to(tl.int64)
    part = tl.program_id(1)
    length = tl.load(LENGTHS + row).to(tl.int32)
    first, last = part * each, tl.minimum((part + 1) * each, length)
    if WINDOWED:
        first = tl.maximum(first, length - window)
    member, column, place = tl.arange(0, GROUP), tl.arange(0, PADDED), tl.arange(0, BLOCK)
    real = (member < SHARED)[:, None] & (column < WIDTH)[None, :]
    heads = head * SHARED + member
    q = tl.load(Q + row * q_row + heads[:, None] * q_head + column[None, :], mask=real, other=0.0)
    peak = tl.full((GROUP,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((GROUP,), dtype=tl.float32)
    sums = tl.zeros((GROUP, PADDED), dtype=tl.float32)
    k_start = K + row * k_row + head * k_head
    v_start = V + row * v_row + head * v_head
    for start in range(first, last, BLOCK):
        position = start + place
        inside = (position < last)[:, None] & (column < WIDTH)[None, :]
        k = tl.load(k_start + position[:, None] * k_place + column[None, :], mask=inside, other=0.0)
        v = tl.load(v_start + position[:, None] * v_place + column[None, :], mask=inside, other=0.0)
        scores = tl.dot(q, tl.trans(k)) * scale
        scores = tl.where((position < last)[None, :], scores, float("-inf"))
        new = tl.maximum(peak, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new[:, None])
        shrunk = tl.exp2(peak - new)
        total = total * shrunk + tl.sum(weights, axis=1)
        sums = sums * shrunk[:, None] + tl.dot(weights.to(v.dtype), v)
        peak = new
    if WHOLE:
        out = sums / total[:, None]
        where = (row * key_heads * SHARED + heads)[:, None] * WIDTH + column[None, :]
        tl.store(OUT + where, out.to(OUT.dtype.element_ty), mask=real)
    else:
        slot = (row * key_heads * SHARED + heads) * parts + part
        tl.store(SUMS + slot[:, None] * PADDED + column[None, :], sums, mask=(member < SHARED)[:, None])
        tl.store(PEAKS + slot * 2, peak, mask=member < SHARED)
        tl.store(PEAKS + slot * 2 + 1, total, mask=member < SHARED)


@triton.jit(do_not_specialize=["parts"])
def _join(SUMS, PEAKS, OUT, parts, WIDTH: tl.constexpr, PADDED: tl.constexpr, PARTS: tl.constexpr):
    head = tl.program_id(0).to(tl.int64)
    part, column = tl.arange(0, PARTS), tl.arange(0, PADDED)
    read = part < parts
    slot = head * parts + part
    peaks = tl.load(PEAKS + slot * 2, mask=read, other=float("-inf"))
    totals = tl.load(PEAKS + slot * 2 + 1, mask=read, other=0.0)
    sums = tl.load(SUMS + slot[:, None] * PADDED + column[None, :], mask=read[:, None], other=0.0)
    weights = tl.exp2(peaks - tl.max(peaks, axis=0))
    out = tl.sum(sums * weights[:, None], axis=0) / tl.sum(totals * weights, axis=0)
    tl.store(OUT + head * WIDTH + column, out.to(OUT.dtype.element_ty), mask=column < WIDTH)
