"""The memory plan of a run: how a step is split so that it fits its device.

It is made before the first step (`preflight.py`) and never changed: if it proves too large, `next_after` returns the
next one. A plan does not change gradients: a step's loss is one sum over its rows, however they are split.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from worker.trainer.data import MicroBatch


@contextmanager
def shortage_noticed() -> Iterator[None]:
    """Raises torch.OutOfMemoryError where a library of CUDA finds no memory beside what torch has reserved."""
    try:
        yield
    except RuntimeError as error:
        shortages = ("_STATUS_ALLOC_FAILED", "CUDA error: out of memory")
        if isinstance(error, torch.OutOfMemoryError) or not any(each in str(error) for each in shortages):
            raise
        raise torch.OutOfMemoryError(str(error)) from error


def device_ready(device: torch.device) -> None:
    """Makes CUDA's libraries take the memory that they keep, in the thread of backward passes too.

    Later there may be none: torch does not return what it has reserved to other libraries.
    """
    if device.type == "cuda":
        one = torch.ones(16, 16, device=device, requires_grad=True)
        (one @ one).sum().backward()


def release(device: torch.device) -> None:
    """Returns to the driver what torch has reserved and nothing uses, and what cuBLAS works in, in every stream.

    The next product in a stream allocates the latter again. What a recording works in is memory of that recording, and
    is freed with it.
    """
    if device.type == "cuda":
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class MemoryPlan:
    """Sizes in tokens, and what is kept in memory between passes."""

    max_tokens: int  # of a micro-batch, including padding
    packed_tokens: int | None = None  # of a sequence into which rows are packed; None: one row per sequence
    recompute: int = 0  # of so many first layers the backward pass recomputes the activations instead of keeping them
    offload: bool = False  # the inputs of these layers are kept in the host's memory
    graphs: bool = False  # passes are recorded, and the graphs keep the memory that they use
    host_embedding: bool = False  # the input embedding is in the host's memory


def next_after(plan: MemoryPlan, parts: list[MicroBatch], layers: int) -> MemoryPlan | None:
    """Returns the plan to use after `plan` ran out of memory on `parts`; None if there is none left.

    It records no passes any more; then it halves the tokens, down to one row; then it recomputes the activations of all
    `layers`; then it offloads.
    """
    if plan.graphs:
        return replace(plan, graphs=False)
    if any(len(part) > 1 or len(part[0]) > 1 for part in parts):
        half = max(1, plan.max_tokens // 2)
        packed = None if plan.packed_tokens is None else min(plan.packed_tokens, half)
        return replace(plan, max_tokens=half, packed_tokens=packed)
    if plan.recompute < layers:
        return replace(plan, recompute=layers)
    return None if plan.offload or not layers else replace(plan, offload=True)
