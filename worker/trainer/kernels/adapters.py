"""LoRA layers in one autograd function: y = x W' + s (x A') B', with W frozen, in bf16 or in 4 bits.

Why not PEFT's own forward: it casts the layer's whole input to the adapter's fp32 first, keeps that copy for the
backward pass, and adds the update as a second full-size tensor. Here A and B (small) are cast instead, the update is
added in place, and only x and the rank-r product x A' are kept. PEFT still owns the modules, their saving and loading;
`install` only exchanges `forward` of the layers that are plain LoRA, and leaves any variant (DoRA, merged, several
active adapters) to PEFT. `plain` is the reference that the tests compare with.
"""

from types import MethodType
from typing import Any, cast

import bitsandbytes
import torch
from peft.tuners.lora.layer import Linear, LoraLayer
from torch import Tensor, nn
from torch.nn import functional


def install(model: nn.Module) -> int:
    """Exchanges the forward of every plain LoRA layer of `model`; returns how many there were."""
    layers = [module for module in model.modules() if is_plain(module)]
    for layer in layers:
        layer.forward = MethodType(_adapted, layer)
    return len(layers)


def plain(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """The definition: Hu et al. 2021, equation 3."""
    return x @ weight.t() + scale * (x @ a.t()) @ b.t()


def is_plain(module: nn.Module) -> bool:
    """Whether a module is a LoRA layer of the textbook's kind."""
    if not isinstance(module, LoraLayer) or not (isinstance(module, Linear) or type(module).__name__ == "Linear4bit"):
        return False
    biased = any(getattr(b, "bias", None) is not None for b in module.lora_B.values())
    return not (module.lora_variant or module.merged or biased or getattr(module, "fan_in_fan_out", False))


def only_adapter(layer: Any) -> str | None:
    """The name of the adapter that acts on a layer, when it is one alone and without dropout; else None."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return None
    name: str = layer.active_adapters[0]
    return None if layer.training and isinstance(layer.lora_dropout[name], nn.Dropout) else name


def product(x: Tensor, base: Any, a: Tensor | None, b: Tensor | None, scale: float) -> tuple[Tensor, Tensor | None]:
    """The adapted product of `x` [..., in] -> [..., out], in the frozen weight's type, and its rows times A' [n, r]."""
    dense = _dense(base)
    rows = x.reshape(-1, x.shape[-1]).to(dense.dtype)
    # Why not `linear(rows).view(...)`: autograd forbids a model to change a view that a Function returned, and some
    # models scale a layer's output in place.
    out = rows.new_empty(*x.shape[:-1], dense.shape[0])
    flat = out.view(-1, dense.shape[0])
    if base.bias is None:
        torch.mm(rows, dense.t(), out=flat)
    else:
        torch.addmm(base.bias.to(dense.dtype), rows, dense.t(), out=flat)
    if a is None or b is None:
        return out, None
    low = rows @ a.to(dense.dtype).t()
    flat.addmm_(low, b.to(dense.dtype).t(), alpha=scale)
    return out, low


def adapter_slopes(grad: Tensor, rows: Tensor, low: Tensor, a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, ...]:
    """The gradients of `product` for A and B, and that of `low`, which `rows_slope` needs."""
    slope = grad.reshape(-1, grad.shape[-1]).to(low.dtype)
    slope_low = (slope @ b.to(low.dtype)) * scale
    return (slope_low.t() @ rows.to(low.dtype)).to(a.dtype), (slope.t() @ low).to(b.dtype) * scale, slope_low


def rows_slope(grad: Tensor, slope_low: Tensor, base: Any, a: Tensor) -> Tensor:
    """The gradient of `product` for its rows."""
    slope = grad.reshape(-1, grad.shape[-1]).to(slope_low.dtype)
    return (slope @ _dense(base)).addmm_(slope_low, a.to(slope_low.dtype))


def _adapted(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The new forward, bound to a PEFT LoRA layer."""
    if self.disable_adapters or not self.active_adapters:
        return _frozen(x, self.base_layer)
    if len(self.active_adapters) > 1 or self.merged:
        return cast(Tensor, type(self).forward(self, x, *args, **kwargs))
    name = self.active_adapters[0]
    a, b, scale = self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
    if only_adapter(self) is None:
        update = functional.linear(functional.linear(self.lora_dropout[name](x), a.to(x.dtype)), b.to(x.dtype))
        out: Tensor = _frozen(x, self.base_layer) + scale * update
        return out
    return cast(Tensor, _Adapted.apply(x, self.base_layer, a, b, scale))  # type: ignore[no-untyped-call]


def _frozen(x: Tensor, base: Any) -> Tensor:
    return cast(Tensor, _Frozen.apply(x, base))  # type: ignore[no-untyped-call]


def _dense(base: Any) -> Tensor:
    """The frozen weight [out, in] as numbers. Four bits are unpacked for each product: kept, they were bf16."""
    state = getattr(base.weight, "quant_state", None)
    if state is None:
        return cast(Tensor, base.weight.detach())
    dense: Tensor = bitsandbytes.functional.dequantize_4bit(base.weight.detach(), state)
    return dense.to(base.compute_dtype or dense.dtype)


class _Frozen(torch.autograd.Function):
    """The product with a frozen weight alone; a gradient for x only, and nothing of x is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: Any) -> Tensor:
        ctx.base = base
        out, _ = product(x, base, None, None, 0.0)
        return out.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        dense = _dense(ctx.base)
        return (grads[0].to(dense.dtype) @ dense).to(grads[0].dtype), None


class _Adapted(torch.autograd.Function):
    """The adapted product; gradients for x, A and B."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: Any, a: Tensor, b: Tensor, scale: float) -> Tensor:
        out, low = product(x, base, a, b, scale)
        ctx.save_for_backward(x.reshape(-1, x.shape[-1]), low, a, b)
        ctx.base, ctx.scale, ctx.shape = base, scale, x.shape
        return out.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor, Tensor, None]:
        rows, low, a, b = ctx.saved_tensors
        grad_a, grad_b, slope_low = adapter_slopes(grads[0], rows, low, a, b, ctx.scale)
        return rows_slope(grads[0], slope_low, ctx.base, a).view(ctx.shape).to(rows.dtype), None, grad_a, grad_b, None
