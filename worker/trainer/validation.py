"""Measures a model's loss on a validation file."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from worker.trainer.data import Example, MicroBatch, collate, micro_batches
from worker.trainer.memory import next_after, shortage_noticed
from worker.trainer.methods.method import Shown
from worker.trainer.objective import Objective
from worker.trainer.stepper import Stepper

T = TypeVar("T")


def loss(stepper: Stepper, examples: Sequence[Example]) -> Shown:
    """Returns the method's measures over all examples."""
    ranks, method = stepper.ranks, stepper.objective.method
    sums = over(stepper, examples, lambda parts: _sums(stepper.objective, examples, parts, stepper.device))
    weight = sum(map(method.weight, examples))
    totals = zip(method.sums, ranks.sum(sums).tolist(), strict=True)
    return method.shown({name: total / weight for name, total in totals})


def over(stepper: Stepper, examples: Sequence[Example], measure: Callable[[list[MicroBatch]], T]) -> T:
    """Calls `measure` on this rank's examples in micro-batches and returns its result. If it runs out of memory, it is
    called again with smaller ones.
    """
    ranks = stepper.ranks
    mine = list(range(len(examples)))[ranks.index :: ranks.count]
    lengths = [len(example) for example in examples]
    groups, shapes = [stepper.group_of(each) for each in examples], [each.shape for each in examples]
    while True:
        packed = stepper.memory.packed_tokens if stepper.objective.knows_borders else None
        parts = micro_batches(
            mine, lengths, stepper.memory.max_tokens, packed_tokens=packed, groups=groups, shapes=shapes
        )
        try:
            with ranks.lockstep():
                return measure(parts)
        except torch.OutOfMemoryError:
            then, plan = stepper.memory, next_after(stepper.memory, parts, stepper.objective.layers)
            helps = plan is not None and (plan.recompute, plan.offload) == (then.recompute, then.offload)
            if plan is None or not helps or stepper.shards is not None:
                raise
        stepper.adopt(plan)


def _sums(
    objective: Objective, examples: Sequence[Example], parts: list[MicroBatch], device: torch.device
) -> torch.Tensor:
    """Returns this rank's sums of the method."""
    names = objective.method.sums
    sums = torch.zeros(len(names), dtype=torch.float64, device=device)
    objective.eval()
    with torch.no_grad(), shortage_noticed():
        for part in parts:
            found = objective.sums(
                collate(examples, part, device, objective.pad_to, borders=objective.knows_borders), 1.0
            )
            sums += torch.stack([found[name].double() for name in names])
    objective.train()
    return sums
