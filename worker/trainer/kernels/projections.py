"""Computes several adapted products of one input in one autograd function: query, key and value; gate and up.

y_i = x W_i' + s_i (x A_i') B_i'. The A_i are concatenated, so that x is read once for all of them, forward and
backward, and x's gradient is computed in one buffer, to which each product adds: autograd would allocate one for each
product and sum them. A frozen weight is in bf16 or in 4 bits. `plain` is the definition of each.

The adapter's update is computed first, and the product with W added to it: a large product reads its summand while it
computes, where an update that is added last would read and write the whole output once more. It is also more exact, as
the smaller summand is rounded before the sum.
"""

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import bitsandbytes
import torch
from torch import Tensor

from worker.trainer.kernels import accumulation, casts, elementwise, fp8


@dataclass(frozen=True)
class Layer:
    """One adapted product: the frozen layer, its adapter's A [r, in] and B [out, r], and its scale.

    `narrow`: the frozen weight in eight bits, if the product is computed in these. `cast`: A and B as the pass has cast
    them; without, each pass through the layer casts them.
    """

    base: Any
    a: Tensor
    b: Tensor
    scale: float
    narrow: fp8.Weight | None = None
    cast: casts.Cast | None = None


def plain(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Computes LoRA by its definition: Hu et al. 2021, equation 3."""
    return x @ weight.t() + scale * (x @ a.t()) @ b.t()


def dense(base: Any) -> Tensor:
    """Returns the frozen weight [out, in] as numbers. Four bits are unpacked for each product, unless the layer keeps
    them as numbers: these take four times the memory.
    """
    kept: Tensor | None = getattr(base, "unpacked", None)
    if kept is not None:
        return kept
    state = quant_state(base)
    if state is None:
        return cast(Tensor, base.weight.detach())
    return _unpack(base.weight.detach().view(torch.uint8), state, product_dtype(base))


def unpacked_bytes(base: Any) -> int:
    """Returns the bytes of a layer's 4-bit weight as numbers."""
    return int(torch.Size(quant_state(base).shape).numel()) * product_dtype(base).itemsize


def quant_state(base: Any) -> Any:
    """Returns the quantisation state of a layer's 4-bit weight; None for others. A gathered one is on its layer."""
    return getattr(base.weight, "quant_state", None) or getattr(base, "quant_state", None)


def product_dtype(base: Any) -> torch.dtype:
    """Returns the type in which a frozen layer's product is computed."""
    state = quant_state(base)
    return cast(torch.dtype, base.weight.dtype if state is None else base.compute_dtype or state.dtype)


def _unpack(packed: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
    whole_blocks = torch.Size(state.shape).numel() % state.blocksize == 0
    usual_scales = not state.nested or state.state2.blocksize == 256
    if packed.is_cuda and state.quant_type == "nf4" and whole_blocks and usual_scales and dtype == state.dtype:
        from worker.trainer.kernels import triton_ops  # a CPU build of torch has no Triton

        return triton_ops.unpack_nf4(packed, state)
    # Directly, without the weights' former type: bitsandbytes' own product does not round to that either.
    read_as = copy.copy(state)
    read_as.dtype = dtype
    return bitsandbytes.functional.dequantize_4bit(packed, read_as)


def frozen(x: Tensor, base: Any, narrow: fp8.Weight | None = None) -> Tensor:
    """Returns the product of `x` [..., in] with a frozen weight alone; a gradient for x only, and nothing of x is kept.

    `narrow`: the weight in eight bits, where the product is made in these.
    """
    return cast(Tensor, _Frozen.apply(x, base, narrow))  # type: ignore[no-untyped-call]


def project(x: Tensor, layers: Sequence[Layer]) -> tuple[Tensor, ...]:
    """Returns each layer's product with `x` [..., in]: [..., out_i], in x's type."""
    flat = [part for layer in layers for part in (layer.a, layer.b)]
    return cast(tuple[Tensor, ...], _Project.apply(x, _fixed(layers), *flat))  # type: ignore[no-untyped-call]


def gated(x: Tensor, gate: Layer, up: Layer, down: Layer, *, is_wanted: bool = True) -> Tensor:
    """down(silu(gate(x)) * up(x)): a feed-forward block in one function, which keeps gate(x) and up(x) only.

    If the output is not wanted, only what is kept is computed, and the output has undefined values.
    """
    layers = (gate, up, down)
    flat = [part for layer in layers for part in (layer.a, layer.b)]
    return cast(Tensor, _Gated.apply(x, _fixed(layers), is_wanted, *flat))  # type: ignore[no-untyped-call]


_Fixed = Sequence[tuple[Any, float, fp8.Weight | None, casts.Cast | None]]
"""What a function keeps of layers besides the tensors whose gradient it computes."""


def _fixed(layers: Sequence[Layer]) -> _Fixed:
    return tuple((layer.base, layer.scale, layer.narrow, layer.cast) for layer in layers)


def _layers(fixed: _Fixed, flat: Sequence[Tensor]) -> list[Layer]:
    pairs = zip(flat[::2], flat[1::2], strict=True)
    return [
        Layer(base, a, b, scale, narrow, cast) for (a, b), (base, scale, narrow, cast) in zip(pairs, fixed, strict=True)
    ]


def _stacked(layers: Sequence[Layer], dtype: torch.dtype) -> Tensor:
    """Returns all A, concatenated [sum of ranks, in]: a view where the pass has cast them."""
    parts = [layer.cast.a for layer in layers if layer.cast is not None and layer.cast.a.dtype == dtype]
    view = casts.joined(parts) if len(parts) == len(layers) else None
    if view is not None:
        return view
    return layers[0].a.to(dtype) if len(layers) == 1 else torch.cat([layer.a for layer in layers]).to(dtype)


def _b(layer: Layer, dtype: torch.dtype) -> Tensor:
    """Returns a layer's B [out, r]."""
    made = layer.cast
    return made.b if made is not None and made.b.dtype == dtype else layer.b.to(dtype)


def _places(layers: Sequence[Layer]) -> list[slice]:
    ends = [0]
    for layer in layers:
        ends.append(ends[-1] + layer.a.shape[0])
    return [slice(start, end) for start, end in itertools.pairwise(ends)]


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None, lead: torch.Size) -> Tensor:
    """Returns `rows` [n, in] times `weight`' [out, in], of shape [*lead, out]."""
    # Why not `linear(rows).view(...)`: autograd forbids a model to change a view that a Function returned, and some
    # models scale a layer's output in place.
    out = rows.new_empty(*lead, weight.shape[0])
    flat = out.view(-1, weight.shape[0])
    if bias is None:
        torch.mm(rows, weight.t(), out=flat)
    else:
        torch.addmm(bias.to(rows.dtype), rows, weight.t(), out=flat)
    return out


def _forward(x: Tensor, layers: Sequence[Layer]) -> tuple[list[Tensor], Tensor, Tensor]:
    """Returns the products [..., out_i], `x` as rows [n, in] in the frozen weights' type, and rows times all A' [n,
    ranks], scaled.
    """
    dtype = product_dtype(layers[0].base)
    rows = x.reshape(-1, x.shape[-1]).to(dtype)
    lora_hidden = _scaled(rows, _stacked(layers, dtype).t(), layers)
    quantised = fp8.quantise_rows(rows) if any(layer.narrow for layer in layers) else None
    outs = [
        _adapted(rows, quantised, lora_hidden[:, place], layer, x.shape[:-1]).to(x.dtype)
        for layer, place in zip(layers, _places(layers), strict=True)
    ]
    return outs, rows, lora_hidden


def _lora_hidden(x: Tensor, layer: Layer) -> Tensor:
    """Returns `x` as rows times one layer's A', scaled: [n, rank]."""
    dtype = product_dtype(layer.base)
    return _scaled(x.reshape(-1, x.shape[-1]).to(dtype), _stacked([layer], dtype).t(), [layer])


def _scaled(rows: Tensor, factor: Tensor, layers: Sequence[Layer]) -> Tensor:
    """Returns `rows` times `factor` [in, ranks], with each layer's columns scaled inside of the product."""
    out = rows.new_empty(rows.shape[0], factor.shape[1])
    if len({layer.scale for layer in layers}) == 1:
        return torch.addmm(out, rows, factor, beta=0, alpha=layers[0].scale, out=out)
    for layer, place in zip(layers, _places(layers), strict=True):
        torch.addmm(out[:, place], rows, factor[:, place], beta=0, alpha=layer.scale, out=out[:, place])
    return out


def _adapted(rows: Tensor, quantised: fp8.Quantised | None, hidden: Tensor, layer: Layer, lead: torch.Size) -> Tensor:
    """Returns one layer's product of `rows`, of shape [*lead, out]. `hidden`: rows times A', scaled."""
    base, b = layer.base, _b(layer, rows.dtype)
    if layer.narrow is not None and quantised is not None:
        out = _narrow_product(rows, quantised, base, layer.narrow, lead)
        out.view(-1, out.shape[-1]).addmm_(hidden, b.t())
    else:
        out = _product(hidden, b, base.bias, lead)
        out.view(-1, out.shape[-1]).addmm_(rows, dense(base).t())
    return out


def _narrow_product(
    rows: Tensor, quantised: tuple[Tensor, Tensor], base: Any, narrow: fp8.Weight, lead: torch.Size
) -> Tensor:
    """Returns the frozen weight's product of `rows` [n, in], in eight bits, of shape [*lead, out]."""
    out = fp8.product(quantised, narrow.rows(), rows.dtype)
    if (watch := fp8.watch()) is not None:
        watch.compare(base, "forward", out, rows @ dense(base).t())
    if base.bias is not None:
        out += base.bias
    return out.view(*lead, -1)


def _narrow_gradient(grad: Tensor, base: Any, narrow: fp8.Weight) -> Tensor:
    """Returns the gradient of x, of `grad` [n, out], in eight bits: [n, in]."""
    found = fp8.product(fp8.quantise_rows(grad), narrow.columns(), grad.dtype)
    if (watch := fp8.watch()) is not None:
        watch.compare(base, "gradient", found, grad @ dense(base))
    return found


def _add_gradient(total: Tensor | None, grad: Tensor, layer: Layer) -> Tensor:
    """Returns `total` plus the gradient `grad` [n, out] through the frozen weight: [n, in]."""
    if layer.narrow is None:
        weight = dense(layer.base)
        return grad @ weight if total is None else total.addmm_(grad, weight)
    found = _narrow_gradient(grad, layer.base, layer.narrow)
    return found if total is None else total.add_(found)


def _gradient_of_rows(grads: Sequence[Tensor], grad_lora_hidden: Tensor, layers: Sequence[Layer]) -> Tensor:
    """Returns the gradient of the layers' input [n, in], from those of their outputs and of the input times all A'."""
    a = _stacked(layers, grad_lora_hidden.dtype)
    narrow = any(layer.narrow is not None for layer in layers)
    total = None if narrow else grad_lora_hidden @ a
    for grad, layer in zip(grads, layers, strict=True):
        total = _add_gradient(total, grad, layer)
    assert total is not None
    return total.addmm_(grad_lora_hidden, a) if narrow else total


def _gradient_of_hidden(grads: Sequence[Tensor], lora_hidden: Tensor, layers: Sequence[Layer]) -> Tensor:
    """Returns the gradient of the layers' input times all A' [n, ranks], from those of their outputs."""
    out = torch.empty_like(lora_hidden)
    for grad, layer, place in zip(grads, layers, _places(layers), strict=True):
        part = out[:, place]
        torch.addmm(part, grad, _b(layer, out.dtype), beta=0, alpha=layer.scale, out=part)
    return out


def _factor_gradient(grad: Tensor, rows: Tensor, factor: Tensor) -> Tensor:
    """Returns `grad`' `rows`, the gradient of a factor, in the factor's type."""
    if grad.is_cuda and grad.dtype != factor.dtype == torch.float32:
        return torch.mm(grad.t(), rows, out_dtype=factor.dtype)  # neither rounded nor cast between
    return (grad.t() @ rows).to(factor.dtype)


def _backward(
    grads: Sequence[Tensor], rows: Tensor, lora_hidden: Tensor, layers: Sequence[Layer], wants_rows: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """Returns the gradient of `rows`, and those of each layer's A and B in turn."""
    grad_lora_hidden = _gradient_of_hidden(grads, lora_hidden, layers)
    places = _places(layers)
    grads_b = [
        _factor_gradient(grad, lora_hidden[:, place], layer.b)
        for grad, layer, place in zip(grads, layers, places, strict=True)
    ]
    grads_a = _factor_gradient(grad_lora_hidden, rows.to(lora_hidden.dtype), layers[0].a)
    grad_rows = _gradient_of_rows(grads, grad_lora_hidden, layers) if wants_rows else None
    return grad_rows, [part for place, grad_b in zip(places, grads_b, strict=True) for part in (grads_a[place], grad_b)]


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, base: Any, narrow: fp8.Weight | None) -> Tensor:
        ctx.base, ctx.narrow = base, narrow
        rows, lead = x.reshape(-1, x.shape[-1]).to(product_dtype(base)), x.shape[:-1]
        if narrow is not None:
            return _narrow_product(rows, fp8.quantise_rows(rows), base, narrow, lead).to(x.dtype)
        return _product(rows, dense(base), base.bias, lead).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        [grad] = grads
        if ctx.narrow is not None:
            rows = grad.reshape(-1, grad.shape[-1]).to(product_dtype(ctx.base))
            return _narrow_gradient(rows, ctx.base, ctx.narrow).view(*grad.shape[:-1], -1).to(grad.dtype), None, None
        weight = dense(ctx.base)
        return (grad.to(weight.dtype) @ weight).to(grad.dtype), None, None


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, fixed: Any, *flat: Tensor) -> tuple[Tensor, ...]:
        outs, rows, lora_hidden = _forward(x, _layers(fixed, flat))
        ctx.save_for_backward(rows, lora_hidden, *flat)
        ctx.fixed, ctx.shape, ctx.dtype = fixed, x.shape, x.dtype
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, lora_hidden, *flat = ctx.saved_tensors
        flats = [grad.reshape(-1, grad.shape[-1]).to(lora_hidden.dtype) for grad in grads]
        grad_rows, learnt = _backward(flats, rows, lora_hidden, _layers(ctx.fixed, flat), ctx.needs_input_grad[0])
        return _shaped(grad_rows, ctx), None, *map(accumulation.of, flat, learnt)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, fixed: Any, is_wanted: bool, *flat: Tensor) -> Tensor:
        *gate_up, down = _layers(fixed, flat)
        (gate, up), rows, lora_hidden = _forward(x, gate_up)
        inner = elementwise.swiglu_forward(gate, up)
        if is_wanted:
            [out], _, down_hidden = _forward(inner, [down])
        else:
            out, down_hidden = x.new_empty(*x.shape[:-1], down.b.shape[0]), _lora_hidden(inner, down)
        ctx.save_for_backward(rows, gate, up, lora_hidden, down_hidden, *flat)
        ctx.fixed, ctx.shape, ctx.dtype = fixed, x.shape, x.dtype
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, gate, up, lora_hidden, down_hidden, *flat = ctx.saved_tensors
        *gate_up, down = _layers(ctx.fixed, flat)
        grad = grads[0].reshape(-1, grads[0].shape[-1]).to(down_hidden.dtype)
        grad_down_hidden = _gradient_of_hidden([grad], down_hidden, [down])
        grad_inner = _gradient_of_rows([grad], grad_down_hidden, [down])
        inner, *both = elementwise.swiglu_backward(grad_inner.to(gate.dtype).view(gate.shape), gate, up)
        inner = inner.reshape(-1, inner.shape[-1]).to(down_hidden.dtype)
        grad_a = _factor_gradient(grad_down_hidden, inner, down.a)
        grad_b = _factor_gradient(grad, down_hidden, down.b)
        del inner
        flats = [part.reshape(-1, part.shape[-1]).to(lora_hidden.dtype) for part in both]
        grad_rows, learnt = _backward(flats, rows, lora_hidden, gate_up, ctx.needs_input_grad[0])
        return _shaped(grad_rows, ctx), None, None, *map(accumulation.of, flat, [*learnt, grad_a, grad_b])


def _shaped(grad_rows: Tensor | None, ctx: Any) -> Tensor | None:
    return None if grad_rows is None else grad_rows.view(ctx.shape).to(ctx.dtype)
