"""What must be settled before the first step: how many tokens fit at once, and that the longest row does."""

import logging

import torch
from transformers import PreTrainedModel

from tunery.errors import DoesNotFit
from worker.trainer.data import Row, collate
from worker.trainer.objective import Objective

log = logging.getLogger(__name__)

CPU_BUDGET = 1024
"""Tokens of a CPU micro-batch. Larger ones are no faster: the products fill the cores, and padding grows."""
GPU_BUDGET = 32_768
"""Most tokens of a GPU micro-batch. A GPU is busy from a few thousand on."""
LEAST_BUDGET = 2_048
"""Below this many tokens a micro-batch wastes a GPU; then activations are recomputed instead (about 1.3 times the work,
a tenth of the memory)."""
HEADROOM = 0.9
"""Share of the free memory to plan with: the allocator's blocks never fit together perfectly."""


def settle(objective: Objective, model: PreTrainedModel, rows: list[Row], units_a_step: int, capacity: int) -> int:
    """Tokens of a micro-batch, padding included; turns gradient checkpointing on where memory is short.

    `capacity` is the longest sequence that the run will see. On a GPU it is tried: one forward and backward pass over
    such a sequence, measured. Raises DoesNotFit, before any time was spent on training.
    """
    device = next(objective.parameters()).device
    if device.type != "cuda":
        return max(CPU_BUDGET, capacity)
    wanted = min(units_a_step * capacity, GPU_BUDGET)
    for recompute in (False, True):
        if recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        fits = _tokens_that_fit(objective, rows, capacity, device)
        log.info("%d tokens fit at once %s recomputing activations", fits, "when" if recompute else "without")
        if fits >= min(wanted, LEAST_BUDGET) and fits >= capacity:
            return max(capacity, min(wanted, fits))
    raise DoesNotFit(
        what=f"A row of {capacity} tokens",
        needed="more memory than is left beside the model",
        device="GPU",
        capacity=f"{torch.cuda.get_device_properties(device).total_memory / 2**30:.0f} GiB",
        instead="Lower max_seq_length, or choose qlora.",
    )


def _tokens_that_fit(objective: Objective, rows: list[Row], capacity: int, device: torch.device) -> int:
    """How many tokens a micro-batch may have, by the peak of a pass over `capacity` of them; 0 if those do not fit."""
    random, random_gpu = torch.get_rng_state(), torch.cuda.get_rng_state(device)
    try:
        resting, peak = _try(objective, _sequence(rows, capacity), device)
    except torch.OutOfMemoryError:
        peak = None
    objective.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    torch.set_rng_state(random)
    torch.cuda.set_rng_state(random_gpu, device)
    if peak is None:
        return 0
    free, _ = torch.cuda.mem_get_info(device)
    room = HEADROOM * free - _optimizer_bytes(objective)
    return int(room / max(1, peak - resting) * capacity)


def _try(objective: Objective, row: Row, device: torch.device) -> tuple[int, int]:
    """Bytes allocated before and at the peak of a forward and backward pass."""
    objective.train()
    batch = collate([row], [[0]], device)
    torch.cuda.reset_peak_memory_stats(device)
    resting = torch.cuda.memory_allocated(device)
    total, _ = objective(batch, 1.0 / len(row))
    total.backward()
    torch.cuda.synchronize(device)
    return resting, torch.cuda.max_memory_allocated(device)


def _sequence(rows: list[Row], length: int) -> Row:
    """`length` tokens of the data's own, every one labelled: the most that a sequence can cost."""
    ids = [token for row in rows[: length + 1] for token in row.input_ids]
    ids = (ids * (length // len(ids) + 1))[:length]
    return Row(ids, ids)


def _optimizer_bytes(objective: Objective) -> int:
    """Gradients and two moments of what learns: an upper bound, as 8-bit moments are smaller."""
    return sum(p.numel() * (p.element_size() + 8) for p in objective.parameters() if p.requires_grad)
