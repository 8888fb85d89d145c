"""Triton kernels that add adapters to a pass in which each row reads one token, each row with its own adapter.

Batched products need rows in the adapters' order and temporary results in fp32: nine launches a layer. These kernels
look up each row's adapter by its address: two launches a layer, which read the factors once and write nothing but the
output. A CUDA graph of them serves any adapters of one shape, wherever these are.

From compute capability 9.0 on the second kernel starts while the first one runs, and reads B meanwhile
("programmatic dependent launch" in NVIDIA's CUDA C++ Programming Guide).
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_INPUTS = 4096
"""Numbers of a row of A that a program reads at once."""
_TILE = 8192
"""Numbers of B that a program reads."""


def add(
    x: Tensor, addresses: Tensor, out: Tensor, *,
    start: int, rank: int, inputs: int, outputs: int, is_aligned: bool, rounds_twice: bool,
) -> None:  # fmt: skip
    """Adds to `out` [rows, 1, outputs] each row of x [rows, 1, inputs] times its A and B, computed in fp32.

    `addresses`: of each row's adapter in memory, int64; 0: none, the row stays as it is. An adapter is fp32 numbers, of
    which those from `start` on are this layer's: A, rank x inputs, followed by B, rank x outputs. `is_aligned`: all
    adapters' addresses are multiples of 16. `rounds_twice`: the product is rounded to the output's type before it is
    added.
    """
    rows, b_start = x.shape[0], start + rank * inputs
    hidden = torch.empty(rows, rank, dtype=torch.float32, device=x.device)
    wide = triton.next_power_of_2(rank)
    block = max(_TILE // wide, 32)
    early = starts_early(x.device)
    options = {"ALIGNED": is_aligned, "EARLY": early}
    launch = {"launch_pdl": True} if early else {}  # not an option of every GPU's compiler
    with torch.cuda.device_of(x):
        _shrink[(rows, rank)](
            x, addresses, hidden, start, inputs, x.stride(0),
            BLOCK=min(_INPUTS, triton.next_power_of_2(inputs)), num_warps=8, **options,
        )  # fmt: skip
        _expand[(rows, triton.cdiv(outputs, block))](
            hidden, addresses, out, b_start, rank, outputs,
            RANK=wide, BLOCK=block, ROUND=rounds_twice, num_warps=4, **options, **launch,
        )  # fmt: skip


@cache
def starts_early(device: torch.device) -> bool:
    """Whether a kernel can start on this device before the one that it depends on has ended."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit  # type: ignore[untyped-decorator]
def _numbers(address, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803 (Triton's spelling)
    numbers = address.to(tl.pointer_type(tl.float32))
    if ALIGNED:
        numbers = tl.multiple_of(numbers, 16)  # four numbers are read at once; a hint on the integer would be lost
    return numbers


@triton.jit  # type: ignore[untyped-decorator]
def _shrink(  # type: ignore[no-untyped-def]
    x, addresses, hidden, start, inputs, x_stride,
    BLOCK: tl.constexpr, ALIGNED: tl.constexpr, EARLY: tl.constexpr,  # noqa: N803 (Triton's spelling)
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
    row, number = tl.program_id(0), tl.program_id(1)
    address = tl.load(addresses + row)
    if address != 0:
        factors = _numbers(address, ALIGNED) + start + number * inputs
        total = tl.zeros([BLOCK], tl.float32)
        for first in range(0, inputs, BLOCK):
            place = first + tl.arange(0, BLOCK)
            inside = place < inputs
            one = tl.load(x + row * x_stride + place, inside, 0.0).to(tl.float32)
            total += one * tl.load(factors + place, inside, 0.0)
        tl.store(hidden + row * tl.num_programs(1) + number, tl.sum(total))


@triton.jit  # type: ignore[untyped-decorator]
def _expand(  # type: ignore[no-untyped-def]
    hidden, addresses, out, start, rank, outputs,
    RANK: tl.constexpr, BLOCK: tl.constexpr, ROUND: tl.constexpr,  # noqa: N803 (Triton's spelling)
    ALIGNED: tl.constexpr, EARLY: tl.constexpr,  # noqa: N803 (Triton's spelling)
):  # fmt: skip
    row = tl.program_id(0)
    address = tl.load(addresses + row)
    if address != 0:
        number = tl.arange(0, RANK)
        place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = place < outputs
        factors = _numbers(address, ALIGNED) + start + number[:, None] * outputs + place[None, :]
        tile = tl.load(factors, (number < rank)[:, None] & inside[None, :], 0.0)
        if EARLY:
            gdc_wait()  # until the other kernel has ended
        found = tl.load(hidden + row * rank + number, number < rank, 0.0)
        delta = tl.sum(found[:, None] * tile, 0)
        if ROUND:
            delta = delta.to(out.dtype.element_ty).to(tl.float32)
        sums = tl.load(out + row * outputs + place, inside, 0.0).to(tl.float32) + delta
        tl.store(out + row * outputs + place, sums.to(out.dtype.element_ty), inside)
    elif EARLY:
        gdc_wait()  # a grid that ends before the one that it depends on lets the next one start too early
