"""LoRA layers in one autograd function: y = x W' + s (x A') B', with W frozen, in bf16 or in 4 bits.

Why not PEFT's own forward: it casts the layer's whole input to the adapter's fp32 first, keeps that copy for the
backward pass, and adds the update as a second full-size tensor. Here A and B (small) are cast instead, the update is
added in place, and only x and the rank-r product x A' are kept. PEFT still owns the modules, their saving and loading;
`install` only replaces `forward` of plain LoRA layers, and leaves any variant (DoRA, merged, several active adapters)
to PEFT. `projections.plain` is the definition.
"""

from collections.abc import Collection
from types import MethodType
from typing import Any, cast

from peft.tuners.lora.layer import Linear, LoraLayer
from torch import Tensor, nn
from torch.nn import functional

from worker.trainer.kernels import casts, fp8, projections


def install(model: nn.Module) -> int:
    """Replaces the forward of every plain LoRA layer of `model`; returns how many there are."""
    layers = [module for module in model.modules() if is_plain(module)]
    for layer in layers:
        layer.forward = MethodType(_adapted, layer)
    return len(layers)


def narrow(model: nn.Module) -> list[str]:
    """Adds an eight-bit copy of every plain LoRA layer's frozen weight for training; returns the layers' names.

    Answers still use the original weight, as servers of the adapter do.
    """
    names = []
    for name, module in model.named_modules():
        packed = fp8.pack(module.base_layer) if is_plain(module) else None
        if packed is not None:
            cast(Any, module).base_layer.narrow = packed
            names.append(name)
    return names


def widen(model: nn.Module, names: Collection[str]) -> None:
    """Removes the eight-bit copies that `narrow` added to these layers."""
    for name in names:
        del cast(Any, model.get_submodule(name)).base_layer.narrow


def unpack(model: nn.Module, room: int) -> list[str]:
    """Keeps the four-bit weights of all plain LoRA layers as numbers, if `room` bytes are enough; returns the layers'
    names.

    Each pass unpacks them otherwise, which for 8B weights writes and reads 16 GB. The products are of the same numbers.
    """
    layers = {name: cast(Any, module).base_layer for name, module in model.named_modules() if is_plain(module)}
    packed = {name: base for name, base in layers.items() if projections.quant_state(base) is not None}
    if sum(projections.unpacked_bytes(base) for base in packed.values()) > room:
        return []
    for base in packed.values():
        base.unpacked = projections.dense(base)
    return list(packed)


def pack(model: nn.Module, names: Collection[str]) -> None:
    """Removes the numbers that `unpack` kept of these layers."""
    for name in names:
        del cast(Any, model.get_submodule(name)).base_layer.unpacked


def casts_of(model: nn.Module) -> casts.Casts:
    """Returns memory for the casts of all adapters of plain LoRA layers, except those with dropout: in training PEFT's
    own product casts these.
    """
    found = []
    for name, module in model.named_modules():
        layer: Any = module
        for adapter in layer.lora_A if is_plain(module) else ():
            if isinstance(layer.lora_dropout[adapter], nn.Dropout):
                continue
            a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            shared = (adapter, name.rpartition(".")[0], a.shape[1])
            found.append(casts.Adapter(a, b, projections.product_dtype(layer.base_layer), shared))
    return casts.Casts(found)


def is_plain(module: nn.Module) -> bool:
    """Whether a module is a plain LoRA layer, without a variant."""
    if not isinstance(module, LoraLayer) or not (isinstance(module, Linear) or type(module).__name__ == "Linear4bit"):
        return False
    biased = any(getattr(b, "bias", None) is not None for b in module.lora_B.values())
    return not (module.lora_variant or module.merged or biased or getattr(module, "fan_in_fan_out", False))


def only_adapter(layer: Any) -> str | None:
    """Returns the name of a layer's active adapter if it is the only one and has no dropout; else None."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return None
    name: str = layer.active_adapters[0]
    return None if layer.training and isinstance(layer.lora_dropout[name], nn.Dropout) else name


def layer_of(module: Any) -> projections.Layer | None:
    """Returns a module's frozen weight and adapter if it is a plain LoRA layer with one adapter and without dropout."""
    name = only_adapter(module) if is_plain(module) else None
    if name is None:
        return None
    a, b = module.lora_A[name].weight, module.lora_B[name].weight
    narrow_weight = getattr(module.base_layer, "narrow", None) if module.training else None
    running = casts.current()
    cast_by_pass = None if running is None else running.of(a, b)
    return projections.Layer(module.base_layer, a, b, module.scaling[name], narrow_weight, cast_by_pass)


def _adapted(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The new forward, bound to a PEFT LoRA layer."""
    if self.disable_adapters or not self.active_adapters:
        return projections.frozen(x, self.base_layer)
    if len(self.active_adapters) > 1 or self.merged:
        return cast(Tensor, type(self).forward(self, x, *args, **kwargs))
    layer = layer_of(self)
    if layer is not None:
        [out] = projections.project(x, [layer])
        return out
    name = self.active_adapters[0]
    a, b = self.lora_A[name].weight, self.lora_B[name].weight
    update = functional.linear(functional.linear(self.lora_dropout[name](x), a.to(x.dtype)), b.to(x.dtype))
    narrow_weight = getattr(self.base_layer, "narrow", None) if self.training else None
    return cast(Tensor, projections.frozen(x, self.base_layer, narrow_weight) + self.scaling[name] * update)
