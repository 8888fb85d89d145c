"""Takes optimizer steps: splits a step's rows to fit the device, and retries a step that runs out of memory."""

import logging
import time
from array import array
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from worker.trainer import cuda_graphs, lookups, pieces, recorded_update
from worker.trainer.cuda_graphs import CudaGraphs, forward_backward
from worker.trainer.data import Batch, Example, MicroBatch, Rows, collate, micro_batches, share
from worker.trainer.decoding.graphs import CudaRecorder
from worker.trainer.lookups import Lookups
from worker.trainer.memory import MemoryPlan, next_after, release
from worker.trainer.objective import Objective
from worker.trainer.parallel import Ranks
from worker.trainer.recorded_update import RecordedUpdate
from worker.trainer.reducer import Reducer
from worker.trainer.sharding import Shards

log = logging.getLogger(__name__)


def one_group(_example: Example) -> Hashable:
    """Returns the same group for every example: for models whose rows do not depend on the others in a batch."""
    return None


T = TypeVar("T", bound=Hashable)
R = TypeVar("R")


@dataclass(frozen=True)
class _Ready:
    """A step's examples, the memory plan by which they were split, the micro-batches on the device, and `looked_up` as
    `Lookups` returns it.
    """

    drawn: list[int]
    memory: MemoryPlan
    parts: list[MicroBatch]
    batches: list[Batch]
    looked_up: Tensor | None


def _shared(values: Iterable[T]) -> list[T]:
    """Returns a list in which equal values are one object: a large file has few groups and shapes."""
    seen: dict[T, T] = {}
    return [seen.setdefault(value, value) for value in values]


class Stepper:
    """Takes the optimizer steps of a run.

    Only it changes `memory`, the plan for splitting rows, and `graphs`, the recorded passes. A step is
    `accumulate`, `clip`, `update`. If it runs out of memory, it is retried with the next memory plan.
    """

    def __init__(
        self,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[torch.nn.Parameter],
        rows: Rows,
        ranks: Ranks,
        memory: MemoryPlan,
        group_of: Callable[[Example], Hashable] = one_group,
        shards: Shards | None = None,
    ) -> None:
        """`parameters`: the trained ones. `group_of`: examples of different groups never share a micro-batch.

        `shards`: the model's pieces, if it is sharded over the ranks.
        """
        self.objective, self.ranks, self.group_of = objective, ranks, group_of
        self.memory, self.shards = memory, shards
        self.graphs = CudaGraphs(objective) if memory.graphs else None
        self._is_loss = torch.tensor([name == "loss" for name in objective.method.sums], device=ranks.device)
        self._optimizer, self._parameters, self._rows = optimizer, list(parameters), rows
        self._recorded = None
        if memory.graphs and recorded_update.can_record(optimizer):
            self._recorded = RecordedUpdate(optimizer, CudaRecorder())
        embedding = lookups.embedding_of(objective) if ranks.count > 1 else None
        self._lookups = None if embedding is None else Lookups(embedding, rows)
        self._reducer = Reducer(ranks, [p for p in self._parameters if pieces.of(p) is None], embedding)
        self._groups = _shared(map(group_of, rows.examples))
        self._shapes = _shared(example.shape for example in rows.examples)
        self._ready: _Ready | None = None
        # Computed once, here, or the first step of a large file would take seconds longer.
        self._weights = array("d", map(objective.method.weight, rows.examples))

    @property
    def device(self) -> torch.device:
        """The device of this rank."""
        return self.ranks.device

    def weight(self, drawn: list[int]) -> float:
        """Returns the divisor of the method's sums over these examples."""
        return sum(self._weights[i] for i in drawn)

    def accumulate(self, drawn: list[int], weight: float) -> Tensor:
        """Computes the step's gradient, summed over the ranks, in `.grad`; returns this rank's sums of the method.

        "loss" is divided by the `weight` of all drawn examples. If it runs out of memory, it retries with the next
        memory plan, which gives the same gradient; but not for a sharded model, as other ranks wait in this pass.
        """
        while True:
            parts, batches, looked_up = self._split(drawn)
            self._reducer.expect(looked_up)
            try:
                idle = self._idle_passes(parts)  # agreed before the first pass, in which the ranks wait
                sums = self._forward_backward(batches, len(parts), weight)
                self._pass_idly(idle)
                break
            except torch.OutOfMemoryError:
                plan = next_after(self.memory, parts, self.objective.layers)
                if plan is None or self.shards is not None:
                    raise
            self._reducer.set_aside()
            self._optimizer.zero_grad(set_to_none=True)
            self.adopt(plan)
        if self.shards is not None:
            self.shards.take_gradients()
        self._reducer.finish()
        return sums

    def record_ahead(self, steps: Iterable[list[int]]) -> None:
        """Records the passes of these steps, each given by its examples, if passes are recorded at all.

        Why not each in the step that first needs it: there the other ranks wait for it, here all record at once.
        """
        if self.graphs is None:
            return
        began = time.monotonic()
        parts = (part for drawn in steps for part in self.micro_batches(drawn))
        self.objective.train()
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            try:
                self.graphs.record_ahead(map(self._collate, parts))
            except torch.OutOfMemoryError:  # the step that needs this pass finds a plan for it
                log.info("the passes of later steps are recorded in these: there is not enough memory for all at once")
        self._optimizer.zero_grad(set_to_none=False)  # recorded passes add to the same tensors
        log.info("recorded %d passes in %.2f s", self.graphs.count, time.monotonic() - began)

    def prepare(self, drawn: list[int]) -> None:
        """Builds the micro-batches of the next step, while the GPU still computes this one."""
        parts = self.micro_batches(drawn)
        batches = [self._collate(part) for part in parts]
        self._ready = _Ready(drawn, self.memory, parts, batches, self._looked_up(drawn))

    def _split(self, drawn: list[int]) -> tuple[list[MicroBatch], Iterable[Batch], Tensor | None]:
        """Returns a step's micro-batches, the same on the device, and the rows of the embedding that all ranks' look up
        (None: all rows), from `prepare` if it has built them.
        """
        ready = self._ready
        if ready is not None and (ready.drawn, ready.memory) == (drawn, self.memory):
            return ready.parts, ready.batches, ready.looked_up
        parts = self.micro_batches(drawn)
        return parts, map(self._collate, parts), self._looked_up(drawn)

    def _looked_up(self, drawn: list[int]) -> Tensor | None:
        return None if self._lookups is None else self._lookups.of_step(drawn)

    def _idle_passes(self, parts: list[MicroBatch]) -> int:
        """Returns how many passes fewer than the busiest rank this rank has; each pass gathers the model's pieces."""
        return 0 if self.shards is None else self.ranks.most(len(parts)) - len(parts)

    def _pass_idly(self, count: int) -> None:
        """Runs passes of weight 0."""
        shortest = min(range(len(self._shapes)), key=lambda i: self._rows.lengths[i])
        for _ in range(count):
            forward_backward(self.objective, self._collate([[shortest]]), 0.0)

    def clip(self, max_norm: float) -> Tensor:
        """Scales the gradient down to the norm `max_norm` if it is larger; returns the norm before."""
        if self.shards is None:
            return torch.nn.utils.clip_grad_norm_(self._parameters, max_norm)
        norm = self.ranks.norm(self._parameters)
        torch.nn.utils.clip_grads_with_norm_(self._parameters, max_norm, norm)
        return norm

    def update(self, step: int, rate: float) -> None:
        """Updates the weights at a learning rate, and clears the gradient. `step` is counted from 1."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group.get("rate_factor", 1.0)
        self._move(step)

    def _move(self, step: int) -> None:
        """Steps the optimizer and clears the gradient. If it runs out of memory before a weight has changed, it retries
        without anything recorded.
        """
        try:
            self._step()
            return
        except torch.OutOfMemoryError as error:
            # The optimizer counts a parameter's step when it begins it. A second step on some parameters would change
            # the training, so the attempt ends here, and the next one resumes from the last snapshot.
            if any(state.get("step", step) >= step for state in self._optimizer.state.values()):
                raise RuntimeError(f"out of memory in the middle of the optimizer's step {step}") from error
        self.adopt(replace(self.memory, graphs=False))
        self._step()

    def _step(self) -> None:
        if self._recorded is not None:
            self._recorded.run()
            return
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=self.graphs is None)  # recorded passes add to the same tensors

    def adopt(self, plan: MemoryPlan) -> None:
        """Uses `plan` as the memory plan from now on."""
        if (plan.recompute, plan.offload) != (self.memory.recompute, self.memory.offload):
            self.record_again()  # recordings recompute as before, and copy to buffers that may be gone
            self.objective.recompute(plan.recompute, offload=plan.offload)
        if not plan.graphs:
            self.graphs = self._recorded = None
        release(self.device)
        if plan != self.memory:
            log.warning("the memory plan from here on: %s", plan)
        self.memory = plan

    def between_steps(self, run: Callable[[], R]) -> R:
        """Returns what `run` returns. If it runs out of memory, it runs again without what only steps need."""
        try:
            return run()
        except torch.OutOfMemoryError:
            if self.graphs is None:
                raise
        self.rest()
        return run()

    def make_room(self) -> None:
        """Frees what only steps need, where memory is so short that layers are recomputed."""
        if self.memory.recompute:
            self.rest()

    def rest(self) -> None:
        """Frees the memory that only steps need: gradients and recordings. Later steps record again."""
        self._ready = None
        self._optimizer.zero_grad(set_to_none=True)
        for recorded in (self.graphs, self._recorded):
            if recorded is not None:
                recorded.forget()
        release(self.device)

    def record_again(self) -> None:
        """Drops the recorded passes, which run the model as it was when they were recorded."""
        if self.graphs is not None:
            self.graphs = CudaGraphs(self.objective)

    def micro_batches(self, drawn: list[int]) -> list[MicroBatch]:
        """Returns this rank's micro-batches of a step."""
        lengths, plan = self._rows.lengths, self.memory
        mine = share(drawn, lengths, self.ranks.count)[self.ranks.index]
        return micro_batches(
            mine,
            lengths,
            plan.max_tokens,
            packed_tokens=plan.packed_tokens,
            groups=self._groups,
            shapes=self._shapes,
        )

    def _forward_backward(self, batches: Iterable[Batch], count: int, weight: float) -> Tensor:
        # Why not the mean of each micro-batch: a mean of means gives short rows more weight than their tokens.
        if self.graphs is None:
            return self._sum(self._passes(batches, count, 1 / weight))
        # Recorded passes cannot know the step's weight: they use a constant, which is divided out here.
        sums = self._sum(map(self.graphs.run, batches))
        rescale = 1 / (weight * cuda_graphs.SCALE)
        torch._foreach_mul_([p.grad for p in self._parameters if p.grad is not None], rescale)
        return torch.where(self._is_loss, sums * rescale, sums)

    def _passes(self, batches: Iterable[Batch], count: int, scale: float) -> Iterator[Tensor]:
        """Yields the sums of each of `count` passes. While the last computes gradients, those it has are sent."""
        for number, batch in enumerate(batches, 1):
            overlaps = number == count and self.shards is None
            with self._reducer.overlapping() if overlaps else nullcontext():
                sums = forward_backward(self.objective, batch, scale)
            yield sums

    def _sum(self, parts: Iterable[Tensor]) -> Tensor:
        nothing = torch.zeros(len(self.objective.method.sums), dtype=torch.float64, device=self.device)
        return sum(parts, start=nothing)

    def _collate(self, part: MicroBatch) -> Batch:
        pad_to = self.objective.pad_to if self.graphs is None else cuda_graphs.PAD_TO
        return collate(self._rows.examples, part, self.device, pad_to, borders=self.objective.knows_borders)
