"""What must be settled before the first step: how many tokens fit at once, and that the longest row does."""

import logging
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from tunery.errors import DoesNotFit
from tunery.planning import memory
from tunery.spec import Qlora, Technique
from worker.trainer.data import Row, collate
from worker.trainer.memory import MemoryPlan
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
"""Share of the memory left for activations to plan with: the allocator's blocks never fit together perfectly."""


@dataclass(frozen=True)
class Work:
    """What a step will be: rows a step, tokens of the longest sequence that the run will see, how it learns."""

    rows_a_step: int
    longest: int
    technique: Technique


def settle(objective: Objective, model: PreTrainedModel, rows: list[Row], work: Work) -> MemoryPlan:
    """The plan that fits; turns gradient checkpointing on where memory is short.

    On a GPU the longest sequence is tried: one forward and backward pass over it, measured. Raises DoesNotFit, before
    any time was spent on training.
    """
    device = next(objective.parameters()).device
    if device.type != "cuda":
        return MemoryPlan(max(CPU_BUDGET, work.longest))
    wanted = min(work.rows_a_step * work.longest, GPU_BUDGET)
    for recompute in (False, True):
        if recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        fits = _tokens_that_fit(objective, rows, work, device)
        log.info("%d tokens fit at once %s recomputing activations", fits, "when" if recompute else "without")
        if fits >= min(wanted, LEAST_BUDGET) and fits >= work.longest:
            return MemoryPlan(max(work.longest, min(wanted, fits)), recompute=recompute)
    raise DoesNotFit(
        what=f"A {work.technique.type} step on a row of {work.longest} tokens",
        needed="more memory than is left beside the model",
        device="GPU",
        capacity=f"{torch.cuda.get_device_properties(device).total_memory / 2**30:.0f} GiB",
        instead=_instead(work.technique),
    )


def _instead(technique: Technique) -> str:
    if isinstance(technique, Qlora):
        return "Lower max_seq_length, or use a smaller base or a larger GPU."
    return "Lower max_seq_length, or choose qlora."


def _tokens_that_fit(objective: Objective, rows: list[Row], work: Work, device: torch.device) -> int:
    """How many tokens a micro-batch may have, by the peak of a pass over the longest; 0 if that does not fit."""
    random, random_gpu = torch.get_rng_state(), torch.cuda.get_rng_state(device)
    try:
        activations = _try(objective, _sequence(rows, work.longest), device)
    except torch.OutOfMemoryError:
        activations = None
    objective.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    torch.set_rng_state(random)
    torch.cuda.set_rng_state(random_gpu, device)
    if activations is None:
        return 0
    free, _ = torch.cuda.mem_get_info(device)
    return tokens_in(free, activations / work.longest, _kept_bytes(objective, memory.moment_bytes(work.technique)))


def tokens_in(free: int, bytes_a_token: float, kept: int) -> int:
    """Tokens whose activations fit into `free` bytes beside the `kept` ones of gradients and optimizer."""
    return max(0, int(HEADROOM * (free - kept) / max(1.0, bytes_a_token)))


def _try(objective: Objective, row: Row, device: torch.device) -> int:
    """Bytes that a forward and a backward pass take at their peak, the gradients of what learns apart.

    Those are there for the whole run, however many tokens a micro-batch has, so they are made before it is measured.
    """
    objective.train()
    for parameter in objective.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    batch = collate([row], [[0]], device)
    torch.cuda.reset_peak_memory_stats(device)
    resting = torch.cuda.memory_allocated(device)
    total, _ = objective(batch, 1.0 / len(row))
    total.backward()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - resting


def _sequence(rows: list[Row], length: int) -> Row:
    """`length` tokens of the data's own, every one labelled: the most that a sequence can cost."""
    ids = [token for row in rows[: length + 1] for token in row.input_ids]
    ids = (ids * (length // len(ids) + 1))[:length]
    return Row(ids, ids)


def _kept_bytes(objective: Objective, moment_bytes: int) -> int:
    """Gradients and moments of what learns."""
    return sum(p.numel() * (p.element_size() + moment_bytes) for p in objective.parameters() if p.requires_grad)
