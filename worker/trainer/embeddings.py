"""Keeps a frozen input embedding in the host's memory, from which the GPU reads the rows that it looks up.

The table of an 8B Llama takes 1 GiB of the GPU, and a step of 8,000 tokens reads 62 MB of it.
"""

import gc
import logging
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)


class _Pinned:
    """A pinned tensor as memory of the GPU: CUDA maps all pinned memory to the same addresses there."""

    def __init__(self, host: Tensor) -> None:
        self._host = host  # lives as long as what is made of this
        self.__cuda_array_interface__ = {
            "shape": (host.nbytes,),
            "typestr": "|u1",
            "data": (host.data_ptr(), False),
            "version": 3,
        }


def move_to_host(causal: Any) -> int:
    """Moves the weight of a model's input embedding to the host, if it is frozen and on a GPU; returns how many bytes
    are free there now.

    The weight remains a tensor of the GPU to all that use it. A head that is tied to it would read every row from the
    host, so such a weight stays. So it does if the host has no room.
    """
    moved = 0
    for weight in (each for each in _movable(causal) if each.is_cuda):
        try:
            host = torch.empty(weight.nbytes, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            log.info("the host has no memory for the input embedding: %s", str(error).splitlines()[0])
            break
        host.view(weight.dtype).view(weight.shape).copy_(weight.data)
        weight.data = _on_gpu(host, weight)
        weight.is_on_host = True  # type: ignore[attr-defined]
        moved += weight.nbytes
    if moved:
        gc.collect()  # what a pass that did not fit left behind may still refer to the weight's former memory
        torch.cuda.empty_cache()
        log.info("the input embedding, %.2f GiB, is in the host's memory", moved / 2**30)
    return moved


def are_on_host(causal: Any) -> bool:
    """Whether a model's input embedding has been moved."""
    return any(getattr(table.weight, "is_on_host", False) for table in _tables(causal))


def _tables(causal: Any) -> list[nn.Embedding]:
    return [each for each in causal.get_input_embeddings().modules() if isinstance(each, nn.Embedding)]


def _movable(causal: Any) -> list[Tensor]:
    """Returns the weights of the input embedding that may be moved, and have not been."""
    head = causal.get_output_embeddings()
    tied = set() if head is None else {id(parameter) for parameter in head.parameters()}
    weights = [table.weight for table in _tables(causal) if not getattr(table.weight, "is_on_host", False)]
    return [weight for weight in weights if not weight.requires_grad and id(weight) not in tied]


def _on_gpu(host: Tensor, like: Tensor) -> Tensor:
    """Returns the memory of `host` as a tensor of the GPU, of the type and shape of `like`."""
    found: Tensor = torch.as_tensor(_Pinned(host), device=like.device)
    if found.data_ptr() != host.data_ptr():  # a copy on the GPU, as torch makes of memory that is another GPU's
        raise RuntimeError("pinned memory is not the GPU's own here")
    return found.view(like.dtype).view(like.shape)
