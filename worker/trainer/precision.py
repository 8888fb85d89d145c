"""A run's precision in torch's terms."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import bitsandbytes
import torch
from torch import Tensor, nn

from tunery.planning.precision import Precision


def dtype(name: str) -> torch.dtype:
    """Returns the torch type of a name in a `Precision`."""
    found: torch.dtype = getattr(torch, name)
    return found


def autocast(precision: Precision | None, device: torch.device) -> AbstractContextManager[object]:
    """Computes products in the compute type if the weights have a wider one; else does nothing.

    Without autocast's cache of cast weights: a CUDA graph may not hold it, and each weight is used once per pass.
    """
    if precision is None or not precision.autocast:
        return nullcontext()
    return torch.autocast(device.type, dtype(precision.compute), cache_enabled=False)


@contextmanager
def in_fp32(model: nn.Module, read_as: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """Makes the model compute in fp32 inside the block, with each weight from `read_as(name, weight)`.

    Four-bit weights stay packed and are multiplied in fp32. It needs room for an fp32 copy of the others.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    kept = [(tensor, tensor.data) for _, tensor in tensors if tensor.is_floating_point()]
    layers = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    computes = [layer.compute_dtype for layer in layers]
    try:
        for name, tensor in tensors:
            if tensor.is_floating_point():
                tensor.data = read_as(name, tensor.data).float()
        for layer in layers:
            layer.compute_dtype = torch.float32
        yield
    finally:
        for tensor, data in kept:
            tensor.data = data
        for layer, compute in zip(layers, computes, strict=True):
            layer.compute_dtype = compute
