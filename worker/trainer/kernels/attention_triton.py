"""The Triton kernels behind `attention.rows_apart`, for rows of any lengths in one sequence.

torch's variable-length attention has a program for every block that the longest row would have, in each row, so with
rows of instruction data most programs find nothing to do. Here a program is a block that exists. Heads of queries that
share keys add their gradients of these within a program, so none is written for each of them. The method is that of
FlashAttention-2 (Dao, 2023).
"""

# mypy: ignore-errors
# ruff: noqa: N803 - Triton's own style: constants that a kernel is compiled for are in capitals

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from worker.trainer.kernels import attention

BLOCK, INNER = 64, 32
"""Queries, or keys, of a program, and those that it reads at a time: larger blocks have more beyond a row's end."""
_LOG2_E = tl.constexpr(math.log2(math.e))


class _RowsApart(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, ends, scale):
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        tokens, heads, _ = query.shape
        sums = torch.empty(heads, tokens, dtype=torch.float32, device=query.device)
        _forward[_grid(tokens, ends, heads)](
            query, key, value, out, sums, *_given(query, key, value, ends, scale), num_warps=4, num_stages=3
        )
        ctx.save_for_backward(query, key, value, out, sums, ends)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, d_out):
        query, key, value, out, sums, ends = ctx.saved_tensors
        d_out = d_out.contiguous()
        d_query, d_key, d_value = (
            torch.empty_like(part, memory_format=torch.contiguous_format) for part in (query, key, value)
        )
        shares = torch.empty_like(sums)
        given = _given(query, key, value, ends, ctx.scale)
        _backward_queries[_grid(len(query), ends, query.shape[1])](
            query, key, value, out, d_out, sums, shares, d_query, *given, num_warps=4, num_stages=3
        )
        _backward_keys[_grid(len(query), ends, key.shape[1])](
            query, key, value, d_out, sums, shares, d_key, d_value, *given, num_warps=4, num_stages=2
        )
        return d_query, d_key, d_value, None, None


def rows_apart(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, scale: float) -> Tensor:
    """Does the same as `attention.plain` without a window, on CUDA tensors; each row has as many keys as queries.

    `ends` [rows + 1], int32. The width of a head is a power of two.
    """
    return _RowsApart.apply(query, key, value, ends, scale)


def _grid(tokens: int, ends: Tensor, heads: int) -> tuple[int, int]:
    """Returns the most blocks that rows of so many tokens in all can have, and the heads."""
    return triton.cdiv(tokens, BLOCK) + len(ends) - 1, heads


def _given(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, scale: float) -> tuple[Any, ...]:
    """Returns the arguments that all kernels end with."""
    parts = (query, key, value)
    assert all(part.stride(2) == 1 for part in parts)
    rows = len(ends) - 1
    strides = (stride for part in parts for stride in part.stride()[:2])
    sizes = query.shape[1] // key.shape[1], attention.room(rows), query.shape[2]
    return ends, scale, len(query), rows, *strides, *sizes, BLOCK, INNER


@triton.jit
def _block(ENDS, rows, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Returns the row's begin and end, and where the program's block begins: not before the end if it has none."""
    block = tl.program_id(0)
    row = tl.arange(0, ROWS)
    begins = tl.load(ENDS + row, mask=row < rows, other=0)
    ends = tl.load(ENDS + row + 1, mask=row < rows, other=0)
    blocks = (ends - begins + BLOCK - 1) // BLOCK
    upto = tl.cumsum(blocks, axis=0)
    before = upto - blocks
    own = (before <= block) & (block < upto)
    begin = tl.sum(tl.where(own, begins, 0), axis=0)
    end = tl.sum(tl.where(own, ends, 0), axis=0)
    return begin, end, begin + (block - tl.sum(tl.where(own, before, 0), axis=0)) * BLOCK


@triton.jit
def _tile(X, head, place, end, by_token, by_head, WIDTH: tl.constexpr, CUT: tl.constexpr):
    """Loads a head's numbers at these places; with CUT zeros at `end` and beyond."""
    where = X + head * by_head + place.to(tl.int64)[:, None] * by_token + tl.arange(0, WIDTH)[None, :]
    if CUT:
        return tl.load(where, mask=(place < end)[:, None], other=0.0)
    return tl.load(where)


# Numbers of tokens and rows vary from step to step: a kernel for multiples of 16 would be compiled in between.
@triton.jit(do_not_specialize=["tokens", "rows"])
def _forward(Q, K, V, OUT, SUMS, ENDS, scale, tokens, rows, q_token, q_head, k_token, k_head, v_token, v_head,
             SHARED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
             INNER: tl.constexpr):  # fmt: skip
    begin, end, first = _block(ENDS, rows, ROWS, BLOCK)
    if first >= end:
        return
    head = tl.program_id(1)
    m = first + tl.arange(0, BLOCK)
    q = _tile(Q, head, m, end, q_token, q_head, WIDTH, True)
    peak = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    sums = tl.zeros((BLOCK, WIDTH), dtype=tl.float32)
    for start in range(begin, first, INNER):
        n = start + tl.arange(0, INNER)
        k = _tile(K, head // SHARED, n, end, k_token, k_head, WIDTH, False)
        v = _tile(V, head // SHARED, n, end, v_token, v_head, WIDTH, False)
        scores = tl.dot(q, tl.trans(k)) * (scale * _LOG2_E)
        peak, total, sums = _add(scores, v, peak, total, sums)
    for start in range(first, min(first + BLOCK, end), INNER):
        n = start + tl.arange(0, INNER)
        k = _tile(K, head // SHARED, n, end, k_token, k_head, WIDTH, True)
        v = _tile(V, head // SHARED, n, end, v_token, v_head, WIDTH, True)
        scores = tl.dot(q, tl.trans(k)) * (scale * _LOG2_E)
        scores = tl.where(m[:, None] >= n[None, :], scores, float("-inf"))
        peak, total, sums = _add(scores, v, peak, total, sums)
    where = _places(m, head, tl.num_programs(1), WIDTH)
    tl.store(OUT + where, (sums / total[:, None]).to(OUT.dtype.element_ty), mask=(m < end)[:, None])
    tl.store(SUMS + head * tokens + m, peak + tl.log2(total), mask=m < end)


@triton.jit
def _add(scores, v, peak, total, sums):
    """Adds values by their scores to sums that are relative to the highest score so far."""
    new = tl.maximum(peak, tl.max(scores, axis=1))
    weights = tl.exp2(scores - new[:, None])
    shrunk = tl.exp2(peak - new)
    total = total * shrunk + tl.sum(weights, axis=1)
    return new, total, sums * shrunk[:, None] + tl.dot(weights.to(v.dtype), v)


@triton.jit
def _places(place, head, heads, WIDTH: tl.constexpr):
    return place.to(tl.int64)[:, None] * heads * WIDTH + head * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit(do_not_specialize=["tokens", "rows"])
def _backward_queries(Q, K, V, OUT, DOUT, SUMS, SHARES, DQ, ENDS, scale, tokens, rows, q_token, q_head, k_token, k_head,
                      v_token, v_head, SHARED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
                      BLOCK: tl.constexpr, INNER: tl.constexpr):  # fmt: skip
    begin, end, first = _block(ENDS, rows, ROWS, BLOCK)
    if first >= end:
        return
    head = tl.program_id(1)
    m = first + tl.arange(0, BLOCK)
    where, inside = _places(m, head, tl.num_programs(1), WIDTH), (m < end)[:, None]
    q = _tile(Q, head, m, end, q_token, q_head, WIDTH, True)
    d_out = tl.load(DOUT + where, mask=inside, other=0.0)
    out = tl.load(OUT + where, mask=inside, other=0.0)
    share = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), axis=1)
    tl.store(SHARES + head * tokens + m, share, mask=m < end)  # which `_backward_keys` needs
    total = tl.load(SUMS + head * tokens + m, mask=m < end, other=float("inf"))
    dq = tl.zeros((BLOCK, WIDTH), dtype=tl.float32)
    for start in range(begin, first, INNER):
        n = start + tl.arange(0, INNER)
        k = _tile(K, head // SHARED, n, end, k_token, k_head, WIDTH, False)
        v = _tile(V, head // SHARED, n, end, v_token, v_head, WIDTH, False)
        weights = tl.exp2(tl.dot(q, tl.trans(k)) * (scale * _LOG2_E) - total[:, None])
        d_scores = weights * (tl.dot(d_out, tl.trans(v)) - share[:, None])
        dq += tl.dot(d_scores.to(k.dtype), k)
    for start in range(first, min(first + BLOCK, end), INNER):
        n = start + tl.arange(0, INNER)
        k = _tile(K, head // SHARED, n, end, k_token, k_head, WIDTH, True)
        v = _tile(V, head // SHARED, n, end, v_token, v_head, WIDTH, True)
        weights = tl.exp2(tl.dot(q, tl.trans(k)) * (scale * _LOG2_E) - total[:, None])
        weights = tl.where(m[:, None] >= n[None, :], weights, 0.0)
        d_scores = weights * (tl.dot(d_out, tl.trans(v)) - share[:, None])
        dq += tl.dot(d_scores.to(k.dtype), k)
    tl.store(DQ + where, (dq * scale).to(DQ.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "rows"])
def _backward_keys(Q, K, V, DOUT, SUMS, SHARES, DK, DV, ENDS, scale, tokens, rows, q_token, q_head, k_token, k_head,
                   v_token, v_head, SHARED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
                   INNER: tl.constexpr):  # fmt: skip
    _, end, first = _block(ENDS, rows, ROWS, BLOCK)
    if first >= end:
        return
    key_head, key_heads = tl.program_id(1), tl.num_programs(1)
    n = first + tl.arange(0, BLOCK)
    k = _tile(K, key_head, n, end, k_token, k_head, WIDTH, True)
    v = _tile(V, key_head, n, end, v_token, v_head, WIDTH, True)
    dk = tl.zeros((BLOCK, WIDTH), dtype=tl.float32)
    dv = tl.zeros((BLOCK, WIDTH), dtype=tl.float32)
    steps = (end - first + INNER - 1) // INNER
    for step in range(SHARED * steps):  # over the heads of queries, and in each over its later positions
        head = key_head * SHARED + step // steps
        m = first + (step % steps) * INNER + tl.arange(0, INNER)
        q = _tile(Q, head, m, end, q_token, q_head, WIDTH, True)
        where = _places(m, head, key_heads * SHARED, WIDTH)
        d_out = tl.load(DOUT + where, mask=(m < end)[:, None], other=0.0)
        total = tl.load(SUMS + head * tokens + m, mask=m < end, other=float("inf"))
        share = tl.load(SHARES + head * tokens + m, mask=m < end, other=0.0)
        weights = tl.exp2(tl.dot(k, tl.trans(q)) * (scale * _LOG2_E) - total[None, :])
        weights = tl.where(m[None, :] >= n[:, None], weights, 0.0)
        dv += tl.dot(weights.to(d_out.dtype), d_out)
        d_scores = weights * (tl.dot(v, tl.trans(d_out)) - share[None, :])
        dk += tl.dot(d_scores.to(q.dtype), q)
    where, inside = _places(n, key_head, key_heads, WIDTH), (n < end)[:, None]
    tl.store(DK + where, (dk * scale).to(DK.dtype.element_ty), mask=inside)
    tl.store(DV + where, dv.to(DV.dtype.element_ty), mask=inside)
