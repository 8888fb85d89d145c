"""A run's precision in torch's terms."""

from contextlib import AbstractContextManager, nullcontext

import torch

from tunery.planning.precision import Precision


def dtype(name: str) -> torch.dtype:
    """The torch type of a name in a `Precision`."""
    found: torch.dtype = getattr(torch, name)
    return found


def autocast(precision: Precision | None, device: torch.device) -> AbstractContextManager[object]:
    """Makes products in the compute type where the weights are kept in a wider one; else does nothing.

    Without autocast's cache of cast weights: a CUDA graph may not hold it, and each weight is used once a pass anyway.
    """
    if precision is None or not precision.autocast:
        return nullcontext()
    return torch.autocast(device.type, dtype(precision.compute), cache_enabled=False)
