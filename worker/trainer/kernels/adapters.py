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
    layers = [module for module in model.modules() if _is_plain(module)]
    for layer in layers:
        layer.forward = MethodType(_adapted, layer)
    return len(layers)


def plain(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """The definition: Hu et al. 2021, equation 3."""
    return x @ weight.t() + scale * (x @ a.t()) @ b.t()


def _is_plain(module: nn.Module) -> bool:
    if not isinstance(module, LoraLayer) or not (isinstance(module, Linear) or type(module).__name__ == "Linear4bit"):
        return False
    biased = any(getattr(b, "bias", None) is not None for b in module.lora_B.values())
    return not (module.lora_variant or module.merged or biased or getattr(module, "fan_in_fan_out", False))


def _adapted(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The new forward, bound to a PEFT LoRA layer."""
    if self.disable_adapters or not self.active_adapters:
        return _frozen(x, self.base_layer)
    if len(self.active_adapters) > 1 or self.merged:
        return cast(Tensor, type(self).forward(self, x, *args, **kwargs))
    name = self.active_adapters[0]
    a, b, scale = self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
    dropout = self.lora_dropout[name]
    if self.training and isinstance(dropout, nn.Dropout):
        update = functional.linear(functional.linear(dropout(x), a.to(x.dtype)), b.to(x.dtype))
        return _frozen(x, self.base_layer) + scale * update
    return cast(Tensor, _Adapted.apply(x, self.base_layer, self.base_layer.weight, a, b, scale))


def _frozen(x: Tensor, base: Any) -> Tensor:
    return cast(Tensor, _Adapted.apply(x, base, base.weight, None, None, 0.0))


def _dense(base: Any, weight: Tensor) -> Tensor:
    """The frozen weight [out, in] as numbers. Four bits are unpacked for each product: kept, they were bf16."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight.detach()
    dense: Tensor = bitsandbytes.functional.dequantize_4bit(weight.detach(), state)
    return dense.to(base.compute_dtype or dense.dtype)


class _Adapted(torch.autograd.Function):
    """Gradients for x, A and B only. Products run in the frozen weight's type, on x flattened to rows."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, base: Any, weight: Tensor, a: Tensor | None, b: Tensor | None, scale: float
    ) -> Tensor:
        dense = _dense(base, weight)
        rows = x.reshape(-1, x.shape[-1]).to(dense.dtype)
        bias = None if base.bias is None else base.bias.to(dense.dtype)
        out = functional.linear(rows, dense, bias)
        low = None
        if a is not None and b is not None:
            low = rows @ a.to(dense.dtype).t()
            out.addmm_(low, b.to(dense.dtype).t(), alpha=scale)
        ctx.save_for_backward(rows if a is not None else None, low, a, b)
        ctx.base, ctx.weight, ctx.scale, ctx.shape, ctx.dtype = base, weight, scale, x.shape, x.dtype
        return out.view(*x.shape[:-1], -1).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, Tensor | None, None]:
        rows, low, a, b = ctx.saved_tensors
        dense = _dense(ctx.base, ctx.weight)
        slope = grads[0].reshape(-1, grads[0].shape[-1]).to(dense.dtype)
        grad_x = slope @ dense if ctx.needs_input_grad[0] else None
        del dense
        grad_a = grad_b = None
        if a is not None:
            slope_low = (slope @ b.to(slope.dtype)) * ctx.scale
            if grad_x is not None:
                grad_x.addmm_(slope_low, a.to(slope.dtype))
            grad_a = (slope_low.t() @ rows).to(a.dtype)
            grad_b = (slope.t() @ low).to(b.dtype) * ctx.scale
        if grad_x is not None:
            grad_x = grad_x.view(ctx.shape).to(ctx.dtype)
        return grad_x, None, None, grad_a, grad_b, None
