"""Products with a frozen weight in eight bits: e4m3 numbers, with a scale for each row of both factors.

y = x W' and, in the backward pass, the gradient of x, g W. Both factors are quantised along the axis that is summed
over, so W is needed by rows and by columns. A weight in bf16 is kept twice; one in four bits is unpacked to e4m3 for
each product, as it would be to bf16, with scales that are kept. `plain` is the definition; CUDA devices of compute
capability 8.9 and above have the product in hardware, at about twice the rate of bf16 (the format: Micikevicius et al.
2022, arXiv:2209.05433).
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import bitsandbytes
import torch
from torch import Tensor

Direction = Literal["forward", "gradient"]
LARGEST = 448.0
"""The largest number of e4m3."""
_LEAST = 1e-12
_TINY = 1e-30
"""In place of the length of a product that is all zero."""
_PART = 2**22
"""Numbers that are compared at once."""
_SIDE = 16
"""The hardware's product requires widths that are a multiple of this."""
LEAST_SIDE = 1024
"""For smaller products, quantising the input costs more than it saves."""


Quantised = tuple[Tensor, Tensor]
"""Numbers in e4m3 and the scales of their rows."""


class Weight(Protocol):
    """A frozen weight [out, in] in eight bits."""

    def rows(self) -> Quantised:
        """Returns the factor for x W': numbers [out, in] and scales [1, out]."""

    def columns(self) -> Quantised:
        """Returns the factor for g W: numbers [in, out] and scales [1, in]."""


@dataclass(frozen=True)
class Kept:
    """A weight kept both by rows and by columns."""

    by_rows: Quantised
    by_columns: Quantised

    def rows(self) -> Quantised:
        return self.by_rows

    def columns(self) -> Quantised:
        return self.by_columns


@dataclass(frozen=True)
class Unpacked:
    """A weight in bitsandbytes' NF4, unpacked for each product with the e4m3 scales of its rows and columns."""

    layer: Any
    row_scales: Tensor
    column_scales: Tensor

    def rows(self) -> Quantised:
        return self._unpack(self.row_scales, by_columns=False), self.row_scales

    def columns(self) -> Quantised:
        return self._unpack(self.column_scales, by_columns=True), self.column_scales

    def _unpack(self, scales: Tensor, *, by_columns: bool) -> Tensor:
        packed, state = self.layer.weight.detach(), self.layer.weight.quant_state
        if not packed.is_cuda:
            wide = _numbers(packed, state)
            return _to_e4m3((wide.t() if by_columns else wide) / scales.view(-1, 1))
        from worker.trainer.kernels import triton_ops  # a CPU build of torch has no Triton

        return triton_ops.unpack_nf4_to_e4m3(packed, state, scales, by_columns=by_columns)


@dataclass
class Watch:
    """How far narrow products differ from wide ones of the same factors, by layer and direction.

    `found`: the cosine of the two and the ratio of their norms. Gradients that are all zero are left out.
    """

    found: dict[tuple[Any, Direction], tuple[float, float]] = field(default_factory=dict)

    def compare(self, base: Any, direction: Direction, narrow: Tensor, wide: Tensor) -> None:
        """Records a product of the layer `base`."""
        product, one, other = _products(narrow, wide)
        if other:
            self.found[base, direction] = (product / max(math.sqrt(one * other), _TINY), math.sqrt(one / other))


def _products(one: Tensor, other: Tensor) -> list[float]:
    """Returns the inner products of `one` with `other`, of `one` with itself, and of `other` with itself."""
    total = torch.zeros(3, dtype=torch.float64, device=one.device)
    # In parts: copies of both in fp32 would need more memory than the products, where none is left.
    for a, b in zip(one.flatten().split(_PART), other.flatten().split(_PART), strict=True):
        a, b = a.float(), b.float()
        total += torch.stack([a @ b, a @ a, b @ b])
    found: list[float] = total.tolist()
    return found


_open: list[Watch] = []


@contextmanager
def watched() -> Iterator[Watch]:
    """Compares every narrow product inside the block. It computes a wide product for each, and waits for the device."""
    # Why not a context variable: the backward pass runs in another thread.
    _open.append(Watch())
    try:
        yield _open[-1]
    finally:
        _open.pop()


def watch() -> Watch | None:
    """Returns the watch of the open block, if there is one."""
    return _open[-1] if _open else None


def available(device: torch.device) -> bool:
    """Whether a device multiplies e4m3 numbers in hardware."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def pack(layer: Any) -> Weight | None:
    """Returns a linear layer's weight in eight bits; None if the hardware does not support it or gains nothing."""
    state = getattr(layer.weight, "quant_state", None)
    shape = layer.weight.shape if state is None else state.shape
    if any(side % _SIDE or side < LEAST_SIDE for side in shape):
        return None
    if state is not None:
        return _unpacked(layer, state) if _is_plain_nf4(state) else None
    if not layer.weight.is_floating_point():
        return None
    weight = layer.weight.detach()
    (rows, row_scales), (columns, column_scales) = quantise_rows(weight), quantise_rows(weight.t().contiguous())
    return Kept((rows, row_scales.view(1, -1)), (columns, column_scales.view(1, -1)))


def _is_plain_nf4(state: Any) -> bool:
    """Whether rows are whole blocks of NF4, with scales in bitsandbytes' default form."""
    usual_scales = not state.nested or state.state2.blocksize == 256
    return state.quant_type == "nf4" and state.blocksize == 64 and state.shape[1] % 64 == 0 and usual_scales


def _unpacked(layer: Any, state: Any) -> Unpacked:
    highest = _numbers(layer.weight.detach(), state).abs()
    rows, columns = (highest.amax(axis).clamp_min(_LEAST).view(1, -1) / LARGEST for axis in (1, 0))
    return Unpacked(layer, rows, columns)


def _numbers(packed: Tensor, state: Any) -> Tensor:
    """Returns a weight in four bits as fp32 [out, in]."""
    read_as = copy.copy(state)
    read_as.dtype = torch.float32
    return bitsandbytes.functional.dequantize_4bit(packed, read_as)


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns `x` [rows, width] in e4m3, each row scaled by its largest number, and the scales [rows, 1] in fp32."""
    if not x.is_cuda:
        return plain_quantise_rows(x)
    from worker.trainer.kernels import triton_ops  # only where a CUDA device is: a CPU build of torch has no Triton

    return triton_ops.quantise_rows(x)


def plain_quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Computes `quantise_rows` by its definition."""
    wide = x.float()
    highest = wide.abs().amax(1, keepdim=True).clamp_min(_LEAST)
    return _to_e4m3(wide * (LARGEST / highest)), highest / LARGEST


def _to_e4m3(x: Tensor) -> Tensor:
    return x.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def product(x: Quantised, factor: Quantised, dtype: torch.dtype) -> Tensor:
    """Returns `x` [n, in], from `quantise_rows`, times `factor`' [out, in], whose scales are [1, out]: [n, out]."""
    (numbers, row_scales), (weight, scales) = x, factor
    if not numbers.is_cuda:
        return plain(x, factor).to(dtype)
    return torch._scaled_mm(
        numbers, weight.t(), scale_a=row_scales, scale_b=scales, out_dtype=dtype, use_fast_accum=True
    )


def plain(x: Quantised, factor: Quantised) -> Tensor:
    """Computes `product` by its definition, in fp32."""
    (numbers, row_scales), (weight, scales) = x, factor
    return (numbers.float() @ weight.float().t()) * row_scales * scales
