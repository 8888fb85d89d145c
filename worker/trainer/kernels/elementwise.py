"""The elementwise work of Llama-like layers: norms with the residual's sum, rotary positions, the gated activation.

Each `plain_*` is the definition, and runs on a CPU; on a CUDA device a Triton kernel moves every number once, while
separate operations move it three to six times. Nothing is kept for the backward pass that is free to recompute.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional


def _triton() -> Any:
    from worker.trainer.kernels import triton_ops  # only with a CUDA device: a CPU build of torch has no Triton

    return triton_ops


def plain_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Computes RMSNorm by its definition (Zhang and Sennrich 2019, arXiv:1910.07467), in fp32 as in transformers."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def plain_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates `x` [batch, positions, heads, width] by definition (Su et al. 2021, arXiv:2104.09864), halves as pairs.

    `cos` and `sin` [batch or 1, positions, width], their two halves equal.
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(2) + torch.cat([-second, first], dim=-1) * sin.unsqueeze(2)


def plain_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Computes SwiGLU by its definition: Shazeer 2020, arXiv:2002.05202."""
    return functional.silu(gate) * up


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns the norm of `x` + `residual`, and that sum, which the next residual connection adds to."""
    mixed = residual is not None and residual.dtype != x.dtype  # under autocast; the sum has the wider type
    if not x.is_cuda or mixed:
        total = x if residual is None else x + residual
        return plain_rms_norm(total, weight, eps), total
    if residual is None:
        return cast(tuple[Tensor, Tensor], _RmsNorm.apply(x.contiguous(), weight, eps))  # type: ignore[no-untyped-call]
    both = _AddRmsNorm.apply(x.contiguous(), residual.contiguous(), weight, eps)  # type: ignore[no-untyped-call]
    return cast(tuple[Tensor, Tensor], both)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Computes `plain_rotate`, in one pass on a CUDA device."""
    if not x.is_cuda:
        return plain_rotate(x, cos, sin)
    return cast(Tensor, _Rotate.apply(x, cos, sin))  # type: ignore[no-untyped-call]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Computes `plain_swiglu`; its backward pass keeps `gate` and `up` only."""
    if not gate.is_cuda:
        return plain_swiglu(gate, up)
    return cast(Tensor, _Swiglu.apply(gate.contiguous(), up.contiguous()))  # type: ignore[no-untyped-call]


def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """Computes `plain_swiglu` without a gradient, for functions that have their own."""
    return cast(Tensor, _triton().swiglu(gate, up)) if gate.is_cuda else plain_swiglu(gate, up)


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the recomputed activation and the gradients of `gate` and `up`. All three arguments are overwritten."""
    if gate.is_cuda:
        return cast(tuple[Tensor, Tensor, Tensor], _triton().swiglu_backward(grad, gate, up))
    active = functional.silu(gate)
    inner = active * up
    grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
    return inner, grad_gate, grad * active


class _RmsNorm(torch.autograd.Function):
    """Returns (norm of x, x); x is returned so that the gradient of its other use is added in the same pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        out, _, rstd = _triton().add_rms_norm(x, None, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        ctx.set_materialize_grads(False)
        return out, x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad_x, grad_weight = _norm_gradients(ctx, *grads)
        return grad_x, grad_weight, None


class _AddRmsNorm(torch.autograd.Function):
    """Returns (norm of x + residual, x + residual)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        out, total, rstd = _triton().add_rms_norm(x, residual, weight, eps)
        ctx.save_for_backward(total, weight, rstd)
        ctx.set_materialize_grads(False)
        return out, total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        grad, grad_weight = _norm_gradients(ctx, *grads)
        return grad, grad, grad_weight, None


def _norm_gradients(ctx: Any, grad: Tensor | None, grad_total: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    total, weight, rstd = ctx.saved_tensors
    if grad is None:
        return grad_total, None
    learns = weight.requires_grad
    grad_total = None if grad_total is None else grad_total.contiguous()
    out, grad_weight = _triton().add_rms_norm_backward(
        grad.contiguous(), grad_total, total, weight, rstd, learns=learns
    )
    return out, None if grad_weight is None else grad_weight.to(weight.dtype)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return cast(Tensor, _triton().rotate(x, cos, sin, 1.0))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        grad = grads[0] if grads[0].stride(-1) == 1 else grads[0].contiguous()
        return _triton().rotate(grad, cos, sin, -1.0), None, None


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return swiglu_forward(gate, up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        _, grad_gate, grad_up = swiglu_backward(grads[0].contiguous(), gate, up)
        return grad_gate, grad_up
