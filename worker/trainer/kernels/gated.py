"""The gated feed-forward block and RMS norm of Llama-like models, keeping less for the backward pass.

`down(silu(gate) * up)`: autograd keeps gate, silu(gate), up and their product, each as large as the widest activation
of the model. Here gate and up are kept and the rest is made again, which costs three cheap passes and halves the
memory of a block. `plain` is the definition that the tests compare with.
"""

from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from worker.trainer.kernels import adapters

BLOCKS = {"LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "SmolLM3MLP"}
NORMS = {"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "SmolLM3RMSNorm"}
"""Classes of transformers whose forward is the one of the docstring. Not by what a module looks like: Gemma's norm
looks the same and adds 1 to its weight."""


def install(model: nn.Module) -> None:
    """Exchanges the forward of the blocks whose last product is an adapted layer, and on a GPU of the norms."""
    for module in model.modules():
        name = type(module).__name__
        if name in BLOCKS and _is_silu(module) and adapters.is_plain(cast(nn.Module, module.down_proj)):
            module.forward = MethodType(_block, module)
        if name in NORMS and cast(Tensor, module.weight).is_cuda:
            module.forward = MethodType(_norm, module)


def plain(gate: Tensor, up: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """The definition: Shazeer 2020, arXiv:2002.05202, with an adapted last product."""
    return adapters.plain(functional.silu(gate) * up, weight, a, b, scale)


def _is_silu(module: Any) -> bool:
    return type(module.act_fn).__name__ in {"SiLU", "SiLUActivation"}


def _norm(self: Any, x: Tensor) -> Tensor:
    """One fused kernel instead of six; statistics in fp32 as in the original."""
    return functional.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)


def _block(self: Any, x: Tensor) -> Tensor:
    """The new forward, bound to a feed-forward block."""
    gate, up, down = self.gate_proj(x), self.up_proj(x), self.down_proj
    name = adapters.only_adapter(down)
    if name is None or not torch.is_grad_enabled():
        return cast(Tensor, down(functional.silu(gate) * up))
    a, b = down.lora_A[name].weight, down.lora_B[name].weight
    out = _GatedDown.apply(gate, up, down.base_layer, a, b, down.scaling[name])  # type: ignore[no-untyped-call]
    return cast(Tensor, out)


class _GatedDown(torch.autograd.Function):
    """`down(silu(gate) * up)` with an adapted `down`; gradients for gate, up, A and B."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, base: Any, a: Tensor, b: Tensor, scale: float) -> Tensor:
        out, low = adapters.product(functional.silu(gate) * up, base, a, b, scale)
        ctx.save_for_backward(gate, up, low, a, b)
        ctx.base, ctx.scale = base, scale
        return out.to(gate.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, Tensor, Tensor, None]:
        gate, up, low, a, b = ctx.saved_tensors
        activated = functional.silu(gate)
        # In this order and in place: four of these widest tensors are alive at once, not six.
        inner = (activated * up).reshape(-1, gate.shape[-1])
        grad_a, grad_b, slope_low = adapters.adapter_slopes(grads[0], inner, low, a, b, ctx.scale)
        del inner
        grad_inner = adapters.rows_slope(grads[0], slope_low, ctx.base, a).view(gate.shape).to(gate.dtype)
        grad_up = activated.mul_(grad_inner)
        grad_gate = grad_inner.mul_(up)
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        return grad_gate, grad_up, None, grad_a, grad_b, None
