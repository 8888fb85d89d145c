"""Keeps a frozen input embedding in the host's memory, from which the GPU reads the rows that it looks up.

The table of an 8B Llama takes 1 GiB of the GPU, and a step of 8,000 tokens reads 62 MB of it.
"""

import logging
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from worker.trainer.objective import Objective

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


def move_to_host(objective: Objective) -> int:
    """Moves the weight of a model's input embedding to the host, if it is frozen and on a GPU; returns how many bytes
    are free there now.

    The weight remains a tensor of the GPU to all that use it. What reads every row of it would read them from the host:
    a head that is tied to it, or trained rows, which are put into a copy. Such a weight stays, and so does one that is
    cut over GPUs, or for which the host has no room.
    """
    moved = 0
    movable = [] if objective.is_sharded else _movable(objective.causal)
    for weight in (each for each in movable if each.is_cuda):
        if weight.nbytes > psutil.virtual_memory().available:
            log.info("the host has no memory for the input embedding")
            break
        try:
            host = torch.empty(weight.nbytes, dtype=torch.uint8, pin_memory=True)
            host.view(weight.dtype).view(weight.shape).copy_(weight.data)
            former = weight.untyped_storage()
            weight.data = _on_gpu(host, weight)
            if former.resizable():
                former.resize_(0)  # free at once, whatever may still refer to the weight as it was loaded
        except RuntimeError as error:
            log.info("the input embedding stays on the GPU: %s", str(error).splitlines()[0])
            break
        weight.is_on_host = True  # type: ignore[attr-defined]
        moved += weight.nbytes
    if moved:
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        log.info(
            "the input embedding, %.2f GiB, is in the host's memory; %.2f GiB are free", moved / 2**30, free / 2**30
        )
    return moved


def are_on_host(causal: Any) -> bool:
    """Whether a model's input embedding has been moved."""
    return any(getattr(table.weight, "is_on_host", False) for table in _tables(causal))


def _tables(causal: Any) -> list[nn.Embedding]:
    return [each for each in causal.get_input_embeddings().modules() if isinstance(each, nn.Embedding)]


def _movable(causal: Any) -> list[Tensor]:
    """Returns the weights of the input embedding that may be moved, and have not been."""
    if not isinstance(causal.get_input_embeddings(), nn.Embedding):  # but one that trains some of its rows
        return []
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
