"""One pass of AdamW with 8-bit moments over a bf16 weight, rounded stochastically, in Triton.

bitsandbytes finds a moment's code by a binary search in its table of 256, which takes most of its kernel's time. The
table is regular: decade i of seven, from 1e-7 to 1, is cut into n * 2**i equal cells (n = 1 for the signed moment, 2
for the other), and a code stands for its cell's middle. So codes are computed here. Beside them stand 0 and 1.
"""

# mypy: ignore-errors
# ruff: noqa: N803 - Triton's own style: pointers, and constants that a kernel is compiled for, are in capitals

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from worker.trainer.kernels.adamw import QUANTISED
from worker.trainer.kernels.stochastic import BLOCK, LANE


@triton.jit
def _cell(y, FIRST: tl.constexpr):
    """Returns the number of the code next to `y` in (0, 1], counted from the smallest positive one; -1 for 0.

    `FIRST`: how many cells the smallest decade has. The nearest of two codes at a decade's end is not always the one
    of the decade that `y` is in: a large cell's middle is farther from their border.
    """
    cells = tl.full(y.shape, 1.0, tl.float32) * FIRST
    scale = tl.full(y.shape, 1e6, tl.float32)
    lower: tl.constexpr = 1.0 * FIRST
    for decade in tl.static_range(1, 7):
        below = 1.0 - 0.45 / (lower * (1 << (decade - 1)))  # the last middle below the border, in units of the border
        above = 10.0 * (0.1 + 0.45 / (lower * (1 << decade)))  # the first one above
        higher = y >= (below + above) / 2.0 * 10.0 ** (decade - 7)
        cells = tl.where(higher, cells * 2.0, cells)
        scale = tl.where(higher, scale * 0.1, scale)
    inside = tl.floor((y * scale - 0.1) * (cells / 0.9))
    inside = tl.minimum(tl.maximum(inside, 0.0), cells - 1.0)
    found = (cells - FIRST + inside).to(tl.int32)
    last: tl.constexpr = 127 * FIRST - 1
    found = tl.where(y > 1.0 - 0.225 / (lower * 64), last + 1, found)
    return tl.where(y * 1e6 < (0.1 + 0.45 / lower) / 2.0, -1, found)


@triton.jit
def _value(cell, FIRST: tl.constexpr):
    """Returns the code of `_cell`: the middle of the cell of this number, 1 above the last one, 0 for -1."""
    number = (tl.maximum(cell, 0) + FIRST).to(tl.float32)
    decade = ((number.to(tl.int32, bitcast=True) >> 23) - 127).to(tl.float32)
    # (number + 1/2) over the decade's cells, in [1, 2): the fraction of a float with the exponent of 1.
    part = ((number + 0.5).to(tl.int32, bitcast=True) & 0x7FFFFF | 0x3F800000).to(tl.float32, bitcast=True)
    value = (0.9 * part - 0.8) * tl.exp2((decade - 5.0 - FIRST) * 3.321928094887362)  # FIRST - 1 is its logarithm
    value = tl.where(cell == 127 * FIRST, 1.0, value)
    return tl.where(cell < 0, 0.0, value)


@triton.jit(do_not_specialize=["keep", "rate", "seed", "first_counter"])
def _adamw(
    W, G, C1, C2, S1, S2, count, keep, beta1, beta2, eps, rate, seed, first_counter,
    LANE: tl.constexpr, QUANTISED: tl.constexpr,
):  # fmt: skip
    rows: tl.constexpr = LANE // QUANTISED
    row = tl.arange(0, rows)
    column = row[:, None] * QUANTISED + tl.arange(0, QUANTISED)[None, :]
    one, two, three, four = tl.randint4x(seed, first_counter + tl.program_id(0) * LANE + column)
    start = tl.program_id(0).to(tl.int64) * (8 * LANE)
    for lane in range(8):  # not unrolled: the code would not fit into the instruction caches
        first = start + lane * LANE
        place = first + column
        inside = place < count
        scaled = first // QUANTISED + row
        begun = first + row * QUANTISED < count
        grad = tl.load(G + place, inside, 0.0).to(tl.float32)
        code1 = tl.load(C1 + place, inside, 127).to(tl.int32)  # 0: no part of the scale
        code2 = tl.load(C2 + place, inside, 0).to(tl.int32)
        # The signed codes: 127 negative ones, the largest first, 0, and 128 positive ones, with 1.
        value = _value(tl.where(code1 < 127, 126 - code1, code1 - 128), 1)
        moment1 = tl.where(code1 < 127, -value, value) * tl.load(S1 + scaled, begun, 0.0)[:, None]
        moment2 = _value(code2 - 1, 2) * tl.load(S2 + scaled, begun, 0.0)[:, None]
        moment1 = moment1 * beta1 + (1.0 - beta1) * grad
        moment2 = moment2 * beta2 + (1.0 - beta2) * grad * grad

        exact = tl.load(W + place, inside, 0.0).to(tl.float32) * keep
        exact -= rate * (moment1 / (tl.sqrt(moment2) + eps))
        word = tl.where(lane % 4 < 2, tl.where(lane % 4 == 0, one, two), tl.where(lane % 4 == 2, three, four))
        noise = (word >> (lane // 4 * 16)) & 0xFFFF
        bits = exact.to(tl.uint32, bitcast=True) + noise.to(tl.uint32, bitcast=True)
        tl.store(W + place, (bits & 0xFFFF0000).to(tl.float32, bitcast=True).to(tl.bfloat16), inside)

        largest1, largest2 = tl.max(tl.abs(moment1), axis=1), tl.max(moment2, axis=1)
        tl.store(S1 + scaled, largest1, begun)
        tl.store(S2 + scaled, largest2, begun)
        inverse1, inverse2 = 1.0 / tl.maximum(largest1, 1e-37), 1.0 / tl.maximum(largest2, 1e-37)
        cell1 = _cell(tl.abs(moment1) * inverse1[:, None], 1)
        # As in bitsandbytes a moment keeps its sign: a small negative one is no 0.
        negative = 126 - tl.minimum(tl.maximum(cell1, 0), 126)
        code1 = tl.where(moment1 < 0.0, negative, 128 + cell1)
        cell2 = _cell(moment2 * inverse2[:, None], 2)
        tl.store(C1 + place, code1.to(tl.uint8), inside)
        tl.store(C2 + place, (1 + cell2).to(tl.uint8), inside)


def step(
    weight: Tensor, grad: Tensor, moments: list[Tensor], number: int, group: dict[str, Any], seed: int, first: int
) -> None:
    """Does the same as `adamw.plain`, on contiguous CUDA tensors."""
    beta1, beta2 = group["betas"]
    root = (1 - beta2**number) ** 0.5
    rate = group["lr"] * root / (1 - beta1**number)
    count = weight.numel()
    with torch.cuda.device_of(weight):
        _adamw[(triton.cdiv(count, BLOCK),)](
            weight, grad, *moments, count, 1 - group["lr"] * group["weight_decay"], beta1, beta2,
            group["eps"] * root, rate, seed, first // 8, LANE=LANE, QUANTISED=QUANTISED, num_warps=4,
        )  # fmt: skip
