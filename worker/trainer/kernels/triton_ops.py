"""Triton kernels for the elementwise work: each moves every number through memory once.

Only imported with a CUDA device; `elementwise` and `cross_entropy` have the definitions to which they are compared.
Statistics and products are in fp32 and rounded once, when stored.
"""

# mypy: ignore-errors
# ruff: noqa: N803 - Triton's own style: constants that a kernel is compiled for are in capitals

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


def _warps(block: int) -> int:
    return 4 if block <= 2048 else 8 if block <= 8192 else 16


@triton.jit
def _add_rms_norm_forward(X, R, H, Y, W, S, width, eps, ADDS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    place = row * width + columns
    h = tl.load(X + place, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        h += tl.load(R + place, mask=inside, other=0.0).to(tl.float32)
        rounded = h.to(H.dtype.element_ty)  # later layers see the rounded sum, so that is normalised
        tl.store(H + place, rounded, mask=inside)
        h = rounded.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(h * h, axis=0) / width + eps)
    tl.store(S + row, rstd)
    w = tl.load(W + columns, mask=inside, other=0.0).to(tl.float32)
    normed = (h * rstd).to(Y.dtype.element_ty).to(tl.float32)
    tl.store(Y + place, (normed * w).to(Y.dtype.element_ty), mask=inside)


# Numbers of tokens vary from step to step: a kernel for those that are multiples of 16 would be compiled in between.
@triton.jit(do_not_specialize=["rows", "rows_a_program"])
def _add_rms_norm_backward(DY, DH, H, W, S, DX, DW, rows, width, rows_a_program, ADDS: tl.constexpr,
                           LEARNS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    w = tl.load(W + columns, mask=inside, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK,), dtype=tl.float32)
    first = program * rows_a_program
    for row in range(first, min(first + rows_a_program, rows)):
        place = row.to(tl.int64) * width + columns
        dy = tl.load(DY + place, mask=inside, other=0.0).to(tl.float32)
        h = tl.load(H + place, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(S + row)
        normed = h * rstd
        if LEARNS:
            dw += dy * normed
        dn = dy * w
        dx = rstd * (dn - normed * (tl.sum(dn * normed, axis=0) / width))
        if ADDS:
            dx += tl.load(DH + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(DX + place, dx.to(DX.dtype.element_ty), mask=inside)
    if LEARNS:
        tl.store(DW + program.to(tl.int64) * width + columns, dw, mask=inside)


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (normed, x + residual, 1 / root mean square of each row) for contiguous `x` [..., width]."""
    width = x.shape[-1]
    rows = x.numel() // width
    h = torch.empty_like(x) if residual is not None else x
    out, rstd = torch.empty_like(x), torch.empty(rows, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    _add_rms_norm_forward[(rows,)](
        x, residual, h, out, weight, rstd, width, eps, ADDS=residual is not None, BLOCK=block, num_warps=_warps(block)
    )
    return out, h, rstd


def add_rms_norm_backward(
    grad: Tensor, grad_h: Tensor | None, h: Tensor, weight: Tensor, rstd: Tensor, *, learns: bool
) -> tuple[Tensor, Tensor | None]:
    """Returns the gradients of `h` (including that of its other uses, `grad_h`) and, if it `learns`, of the weight."""
    width = h.shape[-1]
    rows = h.numel() // width
    out = torch.empty_like(h)
    block = triton.next_power_of_2(width)
    # A program with many rows sums its part of the weight's gradient; without that gradient, more programs are faster.
    each = max(1, -(-rows // (4 * processors(h.device)))) if learns else 1
    programs = -(-rows // each)
    parts = torch.empty(programs, width, dtype=torch.float32, device=h.device) if learns else None
    _add_rms_norm_backward[(programs,)](
        grad, grad_h, h, weight, rstd, out, parts, rows, width, each,
        ADDS=grad_h is not None, LEARNS=learns, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return out, None if parts is None else parts.sum(0)


def processors(device: torch.device) -> int:
    """Returns how many multiprocessors a GPU has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit(do_not_specialize=["positions"])
def _rotate(X, Y, COS, SIN, positions, heads, x_batch, x_token, x_head, c_batch, c_token, SIGN: tl.constexpr,
            HALF: tl.constexpr, PADDED: tl.constexpr, HEADS: tl.constexpr):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    batch, position = token // positions, token % positions
    head, column = tl.arange(0, HEADS)[:, None], tl.arange(0, PADDED)[None, :]
    angle = batch * c_batch + position * c_token + column
    whole = (column < HALF) & (head < heads)
    cos = tl.load(COS + angle, mask=column < HALF, other=0.0).to(tl.float32)
    sin = tl.load(SIN + angle, mask=column < HALF, other=0.0).to(tl.float32) * SIGN
    source = X + batch * x_batch + position * x_token + head * x_head + column
    first = tl.load(source, mask=whole, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=whole, other=0.0).to(tl.float32)
    target = Y + (token * heads + head) * (2 * HALF) + column
    tl.store(target, (first * cos - second * sin).to(Y.dtype.element_ty), mask=whole)
    tl.store(target + HALF, (second * cos + first * sin).to(Y.dtype.element_ty), mask=whole)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """Rotates `x` [batch, positions, heads, head width] (last stride 1, others any); the result is contiguous.

    `sign` -1 rotates back, which is the gradient.
    """
    batch, positions, heads, width = x.shape
    out = torch.empty((batch, positions, heads, width), dtype=x.dtype, device=x.device)
    _rotate[(batch * positions,)](
        x, out, cos, sin, positions, heads, x.stride(0), x.stride(1), x.stride(2),
        cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1), SIGN=sign, HALF=width // 2,
        PADDED=triton.next_power_of_2(width // 2), HEADS=triton.next_power_of_2(heads),
    )  # fmt: skip
    return out


@triton.jit
def _swiglu_forward(G, U, Y, count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    gate = tl.load(G + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(U + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(Y + place, (gate * tl.sigmoid(gate) * up).to(Y.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward(D, G, U, Y, DG, DU, count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    grad = tl.load(D + place, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(G + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(U + place, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    active = gate * sigmoid
    tl.store(Y + place, (active * up).to(Y.dtype.element_ty), mask=inside)
    tl.store(DU + place, (grad * active).to(DU.dtype.element_ty), mask=inside)
    tl.store(DG + place, (grad * up * (sigmoid + active * (1.0 - sigmoid))).to(DG.dtype.element_ty), mask=inside)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Returns silu(gate) * up for contiguous tensors."""
    out = torch.empty_like(gate)
    _swiglu_forward[(triton.cdiv(gate.numel(), 2048),)](gate, up, out, gate.numel(), BLOCK=2048, num_warps=8)
    return out


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(silu(gate) * up, gradient of gate, gradient of up); `gate`, `grad` and `up` are overwritten with them."""
    count = gate.numel()
    _swiglu_backward[(triton.cdiv(count, 2048),)](grad, gate, up, gate, grad, up, count, BLOCK=2048, num_warps=8)
    return gate, grad, up


@triton.jit
def _weighted_swiglu_forward(B, W, Y, inner, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < inner
    gate = tl.load(B + row * 2 * inner + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(B + row * 2 * inner + inner + columns, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(W + row).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up * weight
    tl.store(Y + row * inner + columns, y.to(Y.dtype.element_ty), mask=inside)


@triton.jit
def _weighted_swiglu_backward(D, B, W, DW, inner, BLOCK: tl.constexpr):
    # One program has a whole row: the gradient of its weight is a sum over it.
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < inner
    gates, ups = B + row * 2 * inner + columns, B + row * 2 * inner + inner + columns
    grad = tl.load(D + row * inner + columns, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gates, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(ups, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(W + row).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    active = gate * sigmoid
    tl.store(DW + row, tl.sum(grad * active * up, axis=0))
    grad *= weight
    tl.store(D + row * inner + columns, (active * up * weight).to(D.dtype.element_ty), mask=inside)
    tl.store(ups, (grad * active).to(B.dtype.element_ty), mask=inside)
    tl.store(gates, (grad * up * (sigmoid + active * (1.0 - sigmoid))).to(B.dtype.element_ty), mask=inside)


def weighted_swiglu(both: Tensor, weights: Tensor) -> Tensor:
    """Returns silu(gate) * up * weight [rows, inner] of gate and up [rows, 2 * inner], contiguous."""
    rows, inner = both.shape[0], both.shape[1] // 2
    out = both.new_empty(rows, inner)
    _weighted_swiglu_forward[(rows, triton.cdiv(inner, 1024))](both, weights, out, inner, BLOCK=1024, num_warps=4)
    return out


def weighted_swiglu_backward(grad: Tensor, both: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(silu(gate) * up * weight, gradient of gate and up, gradient of the weights in fp32); `grad` and `both` are
    overwritten with the first two.
    """
    rows, inner = grad.shape
    grad_weights = torch.empty(rows, dtype=torch.float32, device=grad.device)
    block = triton.next_power_of_2(inner)
    _weighted_swiglu_backward[(rows,)](grad, both, weights, grad_weights, inner, BLOCK=block, num_warps=_warps(block))
    return grad, both, grad_weights


@triton.jit
def _sum_rows(X, U, P, Y, width, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for i in tl.static_range(COUNT):
        place = tl.load(P + token * COUNT + i).to(tl.int64) * width + columns
        total += tl.load(X + place, mask=inside, other=0.0).to(tl.float32)
        total += tl.load(U + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(Y + token * width + columns, total.to(Y.dtype.element_ty), mask=inside)


def sum_rows(rows: Tensor, update: Tensor, places: Tensor) -> Tensor:
    """Returns for each token the sum of its rows of `rows` and `update`, contiguous: [tokens, width]. `places`: its
    rows [tokens, k].
    """
    (tokens, count), width = places.shape, rows.shape[1]
    out = rows.new_empty(tokens, width)
    grid = (tokens, triton.cdiv(width, 1024))
    _sum_rows[grid](rows, update, places, out, width, COUNT=count, BLOCK=1024, num_warps=4)
    return out


@triton.jit
def _cross_entropy(L, T, LOSS, CORRECT, vocabulary, BLOCK: tl.constexpr, WRITES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(T + row)
    start = L + row * vocabulary
    columns = tl.arange(0, BLOCK)
    peak = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    best = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    best_place = tl.zeros((BLOCK,), dtype=tl.int32)
    for first in range(0, vocabulary, BLOCK):
        place = first + columns
        value = tl.load(start + place, mask=place < vocabulary, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(peak, value)
        # A lane that has seen only -inf would give nan: -inf minus -inf.
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(peak - shift) + tl.exp(value - shift)
        peak = higher
        better = value > best
        best, best_place = tl.where(better, value, best), tl.where(better, place, best_place)
    highest = tl.max(peak, axis=0)
    norm = highest + tl.log(tl.sum(total * tl.exp(peak - highest), axis=0))
    guess = tl.min(tl.where(best == highest, best_place, vocabulary), axis=0)
    counts = target >= 0
    wanted = tl.load(start + tl.where(counts, target, 0)).to(tl.float32)
    tl.store(LOSS + row, tl.where(counts, norm - wanted, 0.0))
    tl.store(CORRECT + row, (guess == target).to(tl.int32))
    if WRITES:
        for first in range(0, vocabulary, BLOCK):
            place = first + columns
            inside = place < vocabulary
            value = tl.load(start + place, mask=inside, other=float("-inf")).to(tl.float32)
            grad_logit = tl.exp(value - norm) - tl.where(place == target, 1.0, 0.0)
            tl.store(start + place, tl.where(counts, grad_logit, 0.0).to(L.dtype.element_ty), mask=inside)


def cross_entropy(logits: Tensor, targets: Tensor, *, writes: bool) -> tuple[Tensor, Tensor]:
    """Returns losses (fp32) and correct predictions of rows of contiguous `logits`, their gradients if it `writes`.

    Rows with a negative target have no loss. Of equal logits the first is the prediction.
    """
    rows, vocabulary = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    correct = torch.empty(rows, dtype=torch.int32, device=logits.device)
    block = min(4096, triton.next_power_of_2(vocabulary))
    _cross_entropy[(rows,)](logits, targets, losses, correct, vocabulary, BLOCK=block, WRITES=writes, num_warps=8)
    return losses, correct


@triton.jit
def _numbers(X, CODE, SCALES, SCALE_CODE, SCALE_SCALES, OFFSET, block, inside, HALF: tl.constexpr,
             NESTED: tl.constexpr):  # fmt: skip
    """Returns the numbers [blocks, 2 * HALF] of some blocks of NF4, in fp32."""
    if NESTED:
        coded = tl.load(SCALES + block, mask=inside, other=0).to(tl.int32)
        scale = tl.load(SCALE_CODE + coded) * tl.load(SCALE_SCALES + block // 256, mask=inside, other=0.0)
        scale += tl.load(OFFSET)
    else:
        scale = tl.load(SCALES + block, mask=inside, other=0.0)
    place = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    pair = tl.load(X + place, mask=inside[:, None], other=0).to(tl.int32)
    high = tl.load(CODE + (pair >> 4)) * scale[:, None]
    low = tl.load(CODE + (pair & 15)) * scale[:, None]
    return tl.interleave(high, low)


@triton.jit
def _unpack_nf4(X, Y, CODE, SCALES, SCALE_CODE, SCALE_SCALES, OFFSET, blocks, BLOCKS: tl.constexpr, HALF: tl.constexpr,
                NESTED: tl.constexpr):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < blocks
    numbers = _numbers(X, CODE, SCALES, SCALE_CODE, SCALE_SCALES, OFFSET, block, inside, HALF, NESTED)
    target = block[:, None] * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
    tl.store(Y + target, numbers.to(Y.dtype.element_ty), mask=inside[:, None])


def unpack_nf4(packed: Tensor, state: Any) -> Tensor:
    """Unpacks a weight in bitsandbytes' NF4, bit for bit as bitsandbytes does, in one launch instead of three.

    `state`: its QuantState. Dettmers et al. 2023 (arXiv:2305.14314): a code book of 16 values, a scale per block, and
    the scales themselves in 8 bits with a scale of their own per 256 and one offset.
    """
    out = torch.empty(state.shape, dtype=state.dtype, device=packed.device)
    blocks = out.numel() // state.blocksize
    outer = state.state2 if state.nested else None
    absent = state.code  # never read
    _unpack_nf4[(triton.cdiv(blocks, 64),)](
        packed, out, state.code, state.absmax, outer.code if outer else absent, outer.absmax if outer else absent,
        state.offset if outer else absent, blocks, BLOCKS=64, HALF=state.blocksize // 2, NESTED=state.nested,
        enable_fp_fusion=False,  # a fused product and sum rounds once, and differs in the last bit
    )  # fmt: skip
    return out


@triton.jit
def _unpack_nf4_to_e4m3(
    X, Y, CODE, SCALES, SCALE_CODE, SCALE_SCALES, OFFSET, Y_SCALES, rows, row_blocks,
    ROWS: tl.constexpr, HALF: tl.constexpr, NESTED: tl.constexpr, BY_COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1).to(tl.int64)  # of each row: one block of NF4
    inside = row < rows
    block = row * row_blocks + part
    both = _numbers(X, CODE, SCALES, SCALE_CODE, SCALE_SCALES, OFFSET, block, inside, HALF, NESTED)
    column = part * (2 * HALF) + tl.arange(0, 2 * HALF)
    if BY_COLUMNS:
        both = both / tl.load(Y_SCALES + column)[None, :]
    else:
        both = both / tl.load(Y_SCALES + row, mask=inside, other=1.0)[:, None]
    both = tl.clamp(both, -448.0, 448.0).to(Y.dtype.element_ty)
    if BY_COLUMNS:
        tl.store(Y + column[:, None] * rows + row[None, :], tl.trans(both), mask=inside[None, :])
    else:
        tl.store(Y + row[:, None] * (row_blocks * 2 * HALF) + column[None, :], both, mask=inside[:, None])


def unpack_nf4_to_e4m3(packed: Tensor, state: Any, scales: Tensor, *, by_columns: bool) -> Tensor:
    """Returns an NF4 weight [out, in] divided by its rows' or columns' `scales` [1, out or in], in e4m3.

    By columns it is transposed, [in, out]. `in` is a multiple of the block of 64.
    """
    rows, width = state.shape
    out = torch.empty((width, rows) if by_columns else (rows, width), dtype=torch.float8_e4m3fn, device=packed.device)
    outer = state.state2 if state.nested else None
    absent, row_blocks = state.code, width // state.blocksize  # `absent` is never read
    _unpack_nf4_to_e4m3[(triton.cdiv(rows, 64), row_blocks)](
        packed, out, state.code, state.absmax, outer.code if outer else absent, outer.absmax if outer else absent,
        state.offset if outer else absent, scales, rows, row_blocks, ROWS=64, HALF=state.blocksize // 2,
        NESTED=state.nested, BY_COLUMNS=by_columns,
    )  # fmt: skip
    return out


@triton.jit
def _quantise_rows(X, Q, S, width, x_row, LARGEST: tl.constexpr, BLOCK: tl.constexpr, PASSES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    peak = tl.zeros((BLOCK,), dtype=tl.float32)
    for part in tl.static_range(PASSES):
        place = part * BLOCK + columns
        peak = tl.maximum(peak, tl.abs(tl.load(X + row * x_row + place, mask=place < width, other=0.0).to(tl.float32)))
    highest = tl.maximum(tl.max(peak, axis=0), 1e-12)
    tl.store(S + row, highest / LARGEST)
    for part in tl.static_range(PASSES):
        place = part * BLOCK + columns
        value = tl.load(X + row * x_row + place, mask=place < width, other=0.0).to(tl.float32)
        tl.store(Q + row * width + place, (value * (LARGEST / highest)).to(Q.dtype.element_ty), mask=place < width)


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns `x` [rows, width] in e4m3, each row scaled by its largest number, and the scales [rows, 1] in fp32."""
    rows, width = x.shape
    out = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block = min(4096, triton.next_power_of_2(width))
    _quantise_rows[(rows,)](
        x, out, scales, width, x.stride(0), LARGEST=448.0, BLOCK=block, PASSES=triton.cdiv(width, block),
        num_warps=_warps(block),
    )  # fmt: skip
    return out, scales
