"""A mixture's adapted experts in one autograd function: each product is one of all experts, on rows sorted by expert.

out_t = sum over a token's experts e of w_te D_e (silu(G_e x_t) * U_e x_t), where every weight W_e stands for
W_e + s B_e A_e. Why not PEFT's own forward: it adds the update to the weights of all experts in each pass, which takes
a copy of them, and computes the gradient of that copy, which costs as much as the product itself. Here the rows go
through A and B, and the weights have no gradient. The routing weight multiplies the narrow activation in place of the
wide output, which therefore need not be kept.

Nothing waits for the device: rows are sorted by expert, and each expert's end is found in the sorted list. `bincount`
would read the largest index back. PEFT still owns the modules, their saving and loading; `install` replaces `forward`
alone, and leaves experts of another form, or with biases, to PEFT, as well as any variant of adapters.
"""

from dataclasses import dataclass
from types import MethodType
from typing import Any, cast

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.nn import functional

from worker.trainer.kernels import adapters

_ALIGNED = 8
"""Grouped products need rows of a multiple of 16 bytes, eight numbers in bf16. Other ranks are filled up with zeros."""
_FORM = {
    "has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True,
    "has_post_expert_norm": False, "_is_expert_parallel": False,
}  # fmt: skip
"""How transformers describes experts of the form above."""


@dataclass(frozen=True)
class Adapter:
    """All experts' adapters of one weight, as PEFT keeps them: A [experts * r, in], B [out, r * experts]."""

    a: Tensor
    b: Tensor
    scale: float


def install(model: nn.Module) -> int:
    """Replaces the forward of every layer's adapted experts that have the known form; returns how many there are."""
    wrappers = [module for module in model.modules() if _parts(module) is not None]
    for wrapper in cast(list[Any], wrappers):
        for module in (wrapper, wrapper.base_layer):  # the inner one passes on, and is named in the run's record
            module.forward = MethodType(_adapted, module)
    return len(wrappers)


def weights_taken(model: nn.Module) -> int:
    """Returns how many weights the experts have whose forward `install` replaces."""
    found = [parts[0] for module in model.modules() if (parts := _parts(module)) is not None]
    return sum(experts.gate_up_proj.numel() + experts.down_proj.numel() for experts in found)


def products(model: nn.Module) -> dict[str, str] | None:
    """Returns how the experts' products are computed, and why if not by the device's own kernel; None without any."""
    found = [parts for module in model.modules() if _is_installed(module) and (parts := _parts(module))]
    if not found:
        return None
    reason = reason_against(found[0][0].gate_up_proj) or reason_against(found[0][0].down_proj)
    return {"path": "grouped"} if reason is None else {"path": "one by one", "why": reason}


def _is_installed(module: nn.Module) -> bool:
    return getattr(vars(module).get("forward"), "__func__", None) is _adapted


def reason_against(weight: Tensor) -> str | None:
    """Returns why products with a weight [experts, out, in] are computed expert by expert; None if they are not."""
    if not weight.is_cuda:
        return "not on a GPU"
    if torch.cuda.get_device_capability(weight.device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    if weight.dtype != torch.bfloat16:
        return "the weights are not in bfloat16"
    return "a width is no multiple of 8" if any(size % _ALIGNED for size in weight.shape[1:]) else None


def _parts(module: Any) -> tuple[Any, dict[str, Any]] | None:
    """Returns the experts inside of a wrapper and the wrapper of each of their two weights; None for another form."""
    wrappers: dict[str, Any] = {}
    while isinstance(module, ParamWrapper):
        wrappers[module.parameter_name] = module
        module = module.base_layer
    if wrappers.keys() != {"gate_up_proj", "down_proj"} or not hasattr(module, "has_gate"):
        return None
    described = all(getattr(module, name, value) is value for name, value in _FORM.items())
    gates = getattr(type(module)._apply_gate, "__name__", "") == "_default_apply_gate"
    is_silu = type(getattr(module, "act_fn", None)).__name__ in {"SiLU", "SiLUActivation"}
    return (module, wrappers) if described and gates and is_silu else None


def _adapted(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The new forward, bound to PEFT's wrapper."""
    found = _parts(self)
    if found is None or len(args) != 2 or kwargs:
        return cast(Tensor, type(self).forward(self, x, *args, **kwargs))
    experts, wrappers = found
    names = {name: adapters.only_adapter(wrapper) for name, wrapper in wrappers.items()}
    if not all(names.values()):
        return cast(Tensor, type(self).forward(self, x, *args))
    both = {name: _adapter(wrappers[name], cast(str, adapter)) for name, adapter in names.items()}
    return mixture(x, *args, experts.gate_up_proj, experts.down_proj, both["gate_up_proj"], both["down_proj"])


def _adapter(wrapper: Any, name: str) -> Adapter:
    return Adapter(wrapper.lora_A[name].weight, wrapper.lora_B[name].weight, wrapper.scaling[name])


def mixture(
    x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, first: Adapter, second: Adapter
) -> Tensor:
    """Returns the mixture's output [tokens, width], in x's type.

    `chosen`, `weights` [tokens, k]: each token's experts and their weights; `gate_up` [experts, 2 * inner, width] and
    `down` [experts, width, inner] are frozen; `first`, `second`: their adapters.
    """
    fixed = (gate_up.detach(), down.detach(), first.scale, second.scale)
    out = _Mixture.apply(x, chosen, weights, fixed, first.a, first.b, second.a, second.b)  # type: ignore[no-untyped-call]
    return cast(Tensor, out)


@dataclass(frozen=True)
class _Route:
    """Rows sorted by expert. `tokens` [rows]: each row's token; `places` [tokens, k]: a token's rows; `ends` [experts]:
    where each expert's rows end. `order` [rows]: each row's place in the routing."""

    tokens: Tensor
    places: Tensor
    ends: Tensor
    order: Tensor

    @classmethod
    def of(cls, chosen: Tensor, experts: int) -> "_Route":
        found, order = chosen.reshape(-1).sort(stable=True)
        ends = torch.searchsorted(found, torch.arange(experts, device=found.device), right=True, out_int32=True)
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order), device=order.device)
        return cls(order // chosen.shape[1], places.view(chosen.shape), ends, order)


def _factors(a: Tensor, b: Tensor, experts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns an adapter's A [experts, r, in] and B [experts, out, r], with r filled up to a multiple of eight."""
    first = a.view(experts, -1, a.shape[1])
    second = b.view(b.shape[0], -1, experts).permute(2, 0, 1)
    missing = -first.shape[1] % _ALIGNED
    if missing:
        first, second = functional.pad(first, (0, 0, 0, missing)), functional.pad(second, (0, missing))
    return first.to(dtype).contiguous(), second.to(dtype, memory_format=torch.contiguous_format).contiguous()


def _product(rows: Tensor, weight: Tensor, ends: Tensor, *, grouped: bool) -> Tensor:
    """Returns each expert's `rows` [rows, in] times its weight [experts, in, out]: [rows, out]."""
    if grouped:
        return functional.grouped_mm(rows, weight, offs=ends)
    out = rows.new_empty(rows.shape[0], weight.shape[2])
    for expert, part in enumerate(_slices(ends)):
        torch.mm(rows[part], weight[expert], out=out[part])
    return out


def _gradient(left: Tensor, right: Tensor, ends: Tensor, *, grouped: bool) -> Tensor:
    """Returns each expert's `left`' [n, rows] times `right` [rows, m]: [experts, n, m], 0 for one without rows."""
    if not grouped:
        return torch.stack([left[part].t() @ right[part] for part in _slices(ends)])
    out = functional.grouped_mm(left.t(), right, offs=ends)
    # A product of no rows may be left unwritten, and then holds whatever was in its memory.
    return out.masked_fill_((ends.diff(prepend=ends.new_zeros(1)) == 0)[:, None, None], 0)


def _slices(ends: Tensor) -> list[slice]:
    stops = ends.tolist()
    return [slice(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]


def _gate(both: Tensor, weights: Tensor) -> Tensor:
    """Returns silu(gate) * up * weight [rows, inner] of gate and up [rows, 2 * inner]."""
    if both.is_cuda:
        from worker.trainer.kernels import triton_ops  # a CPU build of torch has no Triton

        return triton_ops.weighted_swiglu(both, weights)
    gate, up = both.chunk(2, dim=-1)
    return (functional.silu(gate) * up * weights[:, None]).to(both.dtype)


def _gate_gradient(grad: Tensor, both: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns `_gate`'s value, and the gradients of gate and up together and of the weights. `grad` and `both` are
    overwritten.
    """
    if both.is_cuda:
        from worker.trainer.kernels import triton_ops

        return triton_ops.weighted_swiglu_backward(grad, both, weights)
    gate, up = both.chunk(2, dim=-1)
    active = functional.silu(gate)
    grad_weights = (grad * active * up).sum(-1).to(weights.dtype)
    scaled = (grad * weights[:, None]).to(grad.dtype)
    grads = torch.cat([torch.ops.aten.silu_backward(scaled * up, gate), scaled * active], dim=-1)
    return (active * up * weights[:, None]).to(both.dtype), grads, grad_weights


def _sum_rows(rows: Tensor, update: Tensor, places: Tensor) -> Tensor:
    """Returns the sum of each token's rows [tokens, width] of `rows` and `update` [rows, width], at `places` [tokens,
    k].
    """
    if rows.is_cuda:
        from worker.trainer.kernels import triton_ops

        return triton_ops.sum_rows(rows, update, places)
    return (rows + update)[places].sum(1)


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, chosen: Tensor, weights: Tensor, fixed: Any, *flat: Tensor) -> Tensor:
        gate_up, down, scale1, scale2 = fixed
        experts, dtype, grouped = len(down), down.dtype, not (reason_against(gate_up) or reason_against(down))
        route = _Route.of(chosen, experts)
        (a1, b1), (a2, b2) = (_factors(a, b, experts, dtype) for a, b in (flat[:2], flat[2:]))
        kept = x.to(dtype)
        rows, sorted_weights = kept.index_select(0, route.tokens), weights.reshape(-1)[route.order]
        hidden1 = _product(rows, a1.mT, route.ends, grouped=grouped).mul_(scale1)
        both = _product(hidden1, b1.mT, route.ends, grouped=grouped)
        both += _product(rows, gate_up.mT, route.ends, grouped=grouped)
        del rows
        inner = _gate(both, sorted_weights)
        hidden2 = _product(inner, a2.mT, route.ends, grouped=grouped).mul_(scale2)
        update = _product(hidden2, b2.mT, route.ends, grouped=grouped)
        out = _product(inner, down.mT, route.ends, grouped=grouped)
        saved = (route.tokens, route.places, route.ends)
        ctx.save_for_backward(kept, sorted_weights, hidden1, both, hidden2, *saved, *flat)
        ctx.fixed, ctx.grouped, ctx.dtypes = fixed, grouped, (x.dtype, weights.dtype)
        return _sum_rows(out, update, route.places).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kept, weights, hidden1, both, hidden2, tokens, places, ends, *flat = ctx.saved_tensors
        gate_up, down, scale1, scale2 = ctx.fixed
        (a1, b1), (a2, b2) = (_factors(a, b, len(down), down.dtype) for a, b in (flat[:2], flat[2:]))
        fast: dict[str, Any] = {"ends": ends, "grouped": ctx.grouped}
        grad = grads[0].to(kept.dtype).index_select(0, tokens)
        grad_hidden2 = _product(grad, b2, **fast).mul_(scale2)
        grad_b2 = _gradient(grad, hidden2, **fast)
        grad_inner = _product(grad_hidden2, a2, **fast)
        grad_inner += _product(grad, down, **fast)
        del grad
        inner, grad_both, grad_weights = _gate_gradient(grad_inner, both, weights)
        grad_a2 = _gradient(grad_hidden2, inner, **fast)
        del inner
        grad_hidden1 = _product(grad_both, b1, **fast).mul_(scale1)
        grad_b1 = _gradient(grad_both, hidden1, **fast)
        grad_a1 = _gradient(grad_hidden1, kept.index_select(0, tokens), **fast)
        grad_x = None
        if ctx.needs_input_grad[0]:
            update = _product(grad_hidden1, a1, **fast)
            grad_x = _sum_rows(_product(grad_both, gate_up, **fast), update, places).to(ctx.dtypes[0])
        learnt = _as_peft_keeps(flat[:2], grad_a1, grad_b1) + _as_peft_keeps(flat[2:], grad_a2, grad_b2)
        return grad_x, None, grad_weights[places].to(ctx.dtypes[1]), None, *learnt


def _as_peft_keeps(pair: Any, grad_a: Tensor, grad_b: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the gradients of an adapter's A and B in the shape and type of the parameters `pair`."""
    a, b = pair
    rank = a.shape[0] // len(grad_a)
    found_a, found_b = grad_a[:, :rank].reshape(a.shape), grad_b[:, :, :rank].permute(1, 2, 0).reshape(b.shape)
    return found_a.to(a.dtype), found_b.to(b.dtype)
