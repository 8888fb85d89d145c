"""Triton kernels that add adapters to a pass in which each row reads one token, each row with its own adapter.

Batched products need rows in the adapters' order and temporary results in fp32: nine launches a layer. These kernels
look up each row's adapter: two launches a layer, which read the factors once and write nothing but the output.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_INPUTS = 1024
_TILE = 8192
"""Numbers of B that a program reads."""


def add(x: Tensor, a: Tensor, b: Tensor, adapters: Tensor, out: Tensor, *, rounds_twice: bool) -> None:
    """Adds to `out` [rows, 1, outputs] each row of x [rows, 1, inputs] times its A and B, computed in fp32.

    `a`: adapters x inputs x rank, each adapter's inputs adjacent. `b`: adapters x rank x outputs. `adapters`: the
    adapter of each row, int32; -1: none, the row stays as it is. `rounds_twice`: the product is rounded to the output's
    type before it is added.
    """
    rows, inputs, rank, outputs = x.shape[0], a.shape[1], a.shape[2], b.shape[2]
    hidden = torch.empty(rows, rank, dtype=torch.float32, device=x.device)
    wide = triton.next_power_of_2(rank)
    block = max(_TILE // wide, 32)
    options = {"RANK": wide, "BLOCK": block, "ROUND": rounds_twice, "num_warps": 4}
    with torch.cuda.device_of(x):
        _shrink[(rows, rank)](x, a, adapters, hidden, inputs, x.stride(0), a.stride(0), BLOCK=_INPUTS, num_warps=4)
        _expand[(rows, triton.cdiv(outputs, block))](hidden, b, adapters, out, rank, outputs, b.stride(0), **options)


# The offset of an adapter may pass 2^31: 64 adapters of an 8B model at rank 64 have 10^10 numbers.
@triton.jit  # type: ignore[untyped-decorator]
def _shrink(x, a, adapters, hidden, inputs, x_stride, a_stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803 (Triton's spelling)
    row, number = tl.program_id(0), tl.program_id(1)
    adapter = tl.load(adapters + row).to(tl.int64)
    if adapter >= 0:
        factors = a + adapter * a_stride + number * inputs
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, inputs, BLOCK):
            place = start + tl.arange(0, BLOCK)
            inside = place < inputs
            one = tl.load(x + row * x_stride + place, inside, 0.0).to(tl.float32)
            total += one * tl.load(factors + place, inside, 0.0)
        tl.store(hidden + row * tl.num_programs(1) + number, tl.sum(total))


@triton.jit  # type: ignore[untyped-decorator]
def _expand(  # type: ignore[no-untyped-def]
    hidden, b, adapters, out, rank, outputs, b_stride,
    RANK: tl.constexpr, BLOCK: tl.constexpr, ROUND: tl.constexpr,  # noqa: N803 (Triton's spelling)
):  # fmt: skip
    row = tl.program_id(0)
    adapter = tl.load(adapters + row).to(tl.int64)
    if adapter >= 0:
        number = tl.arange(0, RANK)
        place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = place < outputs
        found = tl.load(hidden + row * rank + number, number < rank, 0.0)
        factors = b + adapter * b_stride + number[:, None] * outputs + place[None, :]
        tile = tl.load(factors, (number < rank)[:, None] & inside[None, :], 0.0)
        delta = tl.sum(found[:, None] * tile, 0)
        if ROUND:
            delta = delta.to(out.dtype.element_ty).to(tl.float32)
        sums = tl.load(out + row * outputs + place, inside, 0.0).to(tl.float32) + delta
        tl.store(out + row * outputs + place, sums.to(out.dtype.element_ty), inside)
