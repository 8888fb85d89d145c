"""Makes the memory plan before the first step, by trying the largest work of the run.

The optimizer's state is created first, by a step that changes nothing, so that no later step can run out of memory for
it half-way. On a GPU a pass over the longest sequence and the evaluation of the longest validation row are measured.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from tunery.failures import DoesNotFit
from tunery.planning.expected import CPU_MICRO_BATCH, GPU_TOKENS, LEAST_TOKENS, tokens_in
from tunery.spec import Qlora, Technique
from worker.trainer import sharding
from worker.trainer.cuda_graphs import worthwhile
from worker.trainer.data import Example, Row, collate
from worker.trainer.memory import MemoryPlan
from worker.trainer.objective import Objective
from worker.trainer.parallel import Ranks

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Work:
    """The largest work of a run; lengths in tokens."""

    technique: Technique
    rows_a_step: int
    row: int  # the longest training example
    sequence: int  # the longest sequence: several examples when packing
    packs: bool
    validation: Example | None = None  # the longest validation example
    rows_an_example: int = 1


def fit_micro_batch(
    objective: Objective, optimizer: torch.optim.Optimizer, rows: Sequence[Row], work: Work, ranks: Ranks | None = None
) -> MemoryPlan:
    """Returns the memory plan that fits, with its gradient checkpointing turned on. Raises DoesNotFit.

    `ranks`: those over which the model is sharded, which use the same plan.
    """
    device = next(objective.parameters()).device
    try:
        make_state(optimizer)
    except torch.OutOfMemoryError:
        raise _does_not_fit(work, "The optimizer's state", device) from None
    if device.type != "cuda":
        plan = MemoryPlan(max(CPU_MICRO_BATCH, work.sequence))
    else:
        plan = _measured(objective, rows, work, device) if ranks is None else _cut(objective, rows, work, ranks)
    if objective.knows_borders:
        plan = replace(plan, packed_tokens=plan.max_tokens)
    elif work.packs:
        plan = replace(plan, packed_tokens=min(work.sequence, plan.max_tokens))
    return replace(plan, graphs=worthwhile(objective, min(plan.max_tokens, work.rows_a_step * work.sequence)))


def make_state(optimizer: torch.optim.Optimizer) -> None:
    """Creates the optimizer's state by a step at rate 0 on gradients of 0, which changes no weights or moments.

    The step is not counted. Raises torch.OutOfMemoryError.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    try:
        for group in optimizer.param_groups:
            group["lr"] = 0.0
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    finally:
        optimizer.zero_grad(set_to_none=True)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
    for state in optimizer.state.values():
        state["step"] = torch.zeros_like(state["step"]) if isinstance(state["step"], torch.Tensor) else 0


def _measured(objective: Objective, rows: Sequence[Row], work: Work, device: torch.device) -> MemoryPlan:
    wanted = min(work.rows_a_step * work.sequence, GPU_TOKENS)
    for recomputes in (False, True):
        if recomputes:
            objective.recompute()
        for length in dict.fromkeys((work.sequence, work.row)):  # a packed sequence may be shorter, a row may not
            fits = _tokens_that_fit(objective, _example(rows, length, work.rows_an_example), work.validation, device)
            log.info("%d tokens fit at once %s recomputing activations", fits, "when" if recomputes else "without")
            if fits >= (length if recomputes else max(length, min(wanted, LEAST_TOKENS))):
                return MemoryPlan(max(length, min(wanted, fits)), recompute=recomputes)
    raise _does_not_fit(work, f"A {work.technique.type} step on a row of {work.row} tokens", device)


def _cut(objective: Objective, rows: Sequence[Row], work: Work, ranks: Ranks) -> MemoryPlan:
    """Returns the plan of a sharded model: with recomputation, which saves most of the memory that can be saved.

    Why not try without it: if one rank ran out of memory, the others would wait in the middle of a pass.
    """
    wanted, device = min(work.rows_a_step * work.sequence, GPU_TOKENS), ranks.device
    longest, what = max(work.sequence, work.row), f"A {work.technique.type} step on a row of {work.row} tokens"
    objective.recompute()
    try:
        mine = _tokens_that_fit(objective, _example(rows, longest, work.rows_an_example), work.validation, device)
    except torch.OutOfMemoryError:
        raise _does_not_fit(work, what, device) from None
    fits = -ranks.most(-mine)
    log.info("%d tokens fit at once beside a shard of the model", fits)
    if fits < longest:
        raise _does_not_fit(work, what, device)
    return MemoryPlan(max(longest, min(wanted, fits)), recompute=True)


def _does_not_fit(work: Work, what: str, device: torch.device) -> DoesNotFit:
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    return DoesNotFit(
        what=what,
        needed="more memory than the model leaves free",
        device="GPU",
        capacity=f"{total / 2**30:.0f} GiB",
        instead="Lower max_seq_length, or use a smaller base or a larger GPU."
        if isinstance(work.technique, Qlora)
        else "Lower max_seq_length, or use technique 'qlora'.",
    )


def _tokens_that_fit(objective: Objective, longest: Example, validation: Example | None, device: torch.device) -> int:
    """Returns how many tokens a micro-batch may have, by the peaks of both kinds of pass; 0 if one does not fit.

    Raises torch.OutOfMemoryError if the model is sharded, as the other ranks cannot continue.
    """
    random, random_gpu = torch.get_rng_state(), torch.cuda.get_rng_state(device)
    try:
        gathered = sharding.gathered_bytes(objective.causal) if objective.is_sharded else 0
        peak = _peak(objective, longest, device)
        bytes_a_token = max(peak - gathered, peak / 4) / len(longest)
        if validation is not None:
            bytes_a_token = max(bytes_a_token, _peak_of_evaluation(objective, validation, device) / len(validation))
    except torch.OutOfMemoryError:
        if objective.is_sharded:
            raise
        bytes_a_token = None
    objective.train()
    objective.rest()
    objective.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    torch.set_rng_state(random)
    torch.cuda.set_rng_state(random_gpu, device)
    if bytes_a_token is None:
        return 0
    free, _ = torch.cuda.mem_get_info(device)
    gradients = sum(sharding.bytes_here(p) for p in objective.parameters() if p.requires_grad)
    return tokens_in(free, bytes_a_token, gradients + gathered)


def _peak(objective: Objective, example: Example, device: torch.device) -> int:
    """Returns the peak bytes of a forward and a backward pass, without the gradients of the trained weights.

    Those exist for the whole run, however many tokens a micro-batch has, so they are allocated before measuring.
    """
    objective.train()
    objective.rest()
    for parameter in objective.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    batch = collate([example], [[0]], device, borders=objective.knows_borders)
    resting = _reset_peak(device)
    objective.sums(batch, 1.0 / len(example))["loss"].backward()
    return _peak_since(device) - resting


@torch.no_grad()
def _peak_of_evaluation(objective: Objective, example: Example, device: torch.device) -> int:
    """Returns the peak bytes of evaluating an example."""
    objective.eval()
    objective.rest()
    batch = collate([example], [[0]], device, borders=objective.knows_borders)
    resting = _reset_peak(device)
    objective.sums(batch, 1.0)
    return _peak_since(device) - resting


def _reset_peak(device: torch.device) -> int:
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak_since(device: torch.device) -> int:
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def _example(rows: Sequence[Row], length: int, count: int) -> Example:
    """Returns an example of `length` tokens of the data in `count` rows, all labelled: the most expensive one."""
    ids = [token for row in rows[: length + 1] for token in row.input_ids]
    ids = (ids * (length // len(ids) + 1))[:length]
    cuts = [length * number // count for number in range(count + 1)]
    return Example(tuple(Row(ids[start:end], ids[start:end]) for start, end in pairwise(cuts)))
