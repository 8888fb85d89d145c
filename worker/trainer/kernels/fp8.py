"""Products with a frozen weight in eight bits: e4m3 numbers, a scale for each row of both factors.

y = x W' and, in the backward pass, the gradient of x, g W. Both factors are quantised along the axis that is summed
over, so W is kept twice, by rows and by columns, and what is quantised anew at each product is only x and g. `plain` is
the definition; a CUDA device from compute capability 8.9 on has the product in hardware, at about twice the rate of
bf16 (Micikevicius et al. 2022, arXiv:2209.05433: the format).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

Direction = Literal["forward", "gradient"]
LARGEST = 448.0
"""The largest number of e4m3."""
_LEAST = 1e-12
_SIDE = 16
"""The hardware's product takes widths that are a multiple of this."""
LEAST_SIDE = 1024
"""Smaller products are over before the quantisation of their input has paid off."""


@dataclass(frozen=True)
class Weight:
    """A frozen weight [out, in] quantised twice: `rows` [out, in] for x W', `columns` [in, out] for g W."""

    rows: Tensor
    row_scales: Tensor
    columns: Tensor
    column_scales: Tensor


@dataclass
class Watch:
    """How far narrow products were from wide ones of the same factors, by layer and direction.

    `found`: the cosine of the two and the ratio of their lengths. Gradients that are zero throughout are left out.
    """

    found: dict[tuple[Any, Direction], tuple[float, float]] = field(default_factory=dict)

    def compare(self, base: Any, direction: Direction, narrow: Tensor, wide: Tensor) -> None:
        """Notes a product of the layer `base`."""
        one, other = narrow.float().flatten(), wide.float().flatten()
        length = float(other.norm())
        if length:
            cosine = float(functional.cosine_similarity(one, other, dim=0))
            self.found[base, direction] = (cosine, float(one.norm()) / length)


_open: list[Watch] = []


@contextmanager
def watched() -> Iterator[Watch]:
    """Compares every narrow product that is made inside. It costs a wide product each, and waits for the device."""
    # Why not a context variable: the backward pass runs in a thread of its own.
    _open.append(Watch())
    try:
        yield _open[-1]
    finally:
        _open.pop()


def watch() -> Watch | None:
    """The watch that is open."""
    return _open[-1] if _open else None


def available(device: torch.device) -> bool:
    """Whether a device multiplies e4m3 numbers in hardware."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def fits(weight: Tensor) -> bool:
    """Whether the hardware's product takes a weight, and gains by it."""
    return all(side % _SIDE == 0 and side >= LEAST_SIDE for side in weight.shape)


def pack(weight: Tensor) -> Weight:
    """A weight [out, in] in eight bits."""
    rows, row_scales = quantise_rows(weight)
    columns, column_scales = quantise_rows(weight.t().contiguous())
    return Weight(rows, row_scales.view(1, -1), columns, column_scales.view(1, -1))


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x` [rows, width] in e4m3, each row by its own largest number, and the rows' scales [rows, 1] in fp32."""
    if not x.is_cuda:
        return plain_quantise_rows(x)
    from worker.trainer.kernels import triton_ops  # only where a CUDA device is: a CPU build of torch has no Triton

    return triton_ops.quantise_rows(x)


def plain_quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """The definition of `quantise_rows`."""
    wide = x.float()
    highest = wide.abs().amax(1, keepdim=True).clamp_min(_LEAST)
    return (wide * (LARGEST / highest)).to(torch.float8_e4m3fn), highest / LARGEST


def product(x: tuple[Tensor, Tensor], weight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` [n, in], as `quantise_rows` gives it, times `weight`' [out, in], whose `scales` are [1, out]: [n, out]."""
    numbers, row_scales = x
    if not numbers.is_cuda:
        return plain(x, weight, scales).to(dtype)
    return torch._scaled_mm(
        numbers, weight.t(), scale_a=row_scales, scale_b=scales, out_dtype=dtype, use_fast_accum=True
    )


def plain(x: tuple[Tensor, Tensor], weight: Tensor, scales: Tensor) -> Tensor:
    """The definition of `product`, in fp32."""
    numbers, row_scales = x
    return (numbers.float() @ weight.float().t()) * row_scales * scales
