"""The state of one run in memory: what the loop works on, and how far it is."""

import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator

from tunery.planning.precision import Precision
from tunery.rows.template import ChatTemplate
from tunery.spec import Plan, Run
from worker.trainer.data import Batch, MicroBatch, Row, Rows, collate, micro_batches, steps_per_epoch
from worker.trainer.memory import MemoryPlan
from worker.trainer.objective import Objective
from worker.trainer.parallel import Ranks
from worker.trainer.recipes.recipe import Recipe
from worker.trainer.replays import Replays
from worker.trainer.report import Voice
from worker.trainer.wish import Wish

log = logging.getLogger(__name__)


@dataclass
class Progress:
    """How far a run is. Together with the weights, the optimizer and the random state this is all of its state."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_step: int | None = None
    best_loss: float | None = None
    gained_loss: float | None = None  # the loss that patience measures the next ones by
    stale: int = 0  # evaluations since then
    stopped_early: bool = False


def one_group(_row: Row) -> Hashable:
    """The group of every row of a model whose rows do not depend on their batch mates."""
    return None


@dataclass
class Training:
    """Everything that a run needs, put together by `run.py`."""

    run: Run
    folder: Path
    recipe: Recipe
    precision: Precision
    accelerator: Accelerator
    objective: Objective
    optimizer: torch.optim.Optimizer
    parameters: dict[str, torch.nn.Parameter]
    template: ChatTemplate
    rows: Rows
    valid: Rows | None
    voice: Voice
    wish: Wish
    memory: MemoryPlan
    warnings: list[str] = field(default_factory=list)
    replays: Replays | None = None  # where the host would set the pace
    group_of: Callable[[Row], Hashable] = one_group  # rows of different groups never share a micro-batch

    def __post_init__(self) -> None:
        self.lengths = [len(row) for row in self.rows.rows]
        self.labelled = [row.labelled for row in self.rows.rows]
        self.groups = [self.group_of(row) for row in self.rows.rows]

    @property
    def ranks(self) -> Ranks:
        return Ranks(self.accelerator)

    @property
    def plan(self) -> Plan:
        return self.run.plan

    @property
    def device(self) -> torch.device:
        device: torch.device = self.accelerator.device
        return device

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(len(self.rows.rows), self.plan.batch_size)

    @property
    def total_steps(self) -> int:
        return self.plan.n_epochs * self.steps_per_epoch

    @property
    def keeps_best(self) -> bool:
        """Whether the step with the lowest validation loss becomes the model, instead of the last."""
        return self.plan.select == "best" or self.plan.early_stopping is not None

    def take(self, plan: MemoryPlan) -> None:
        """Goes over to another memory plan."""
        if plan.recompute and not self.memory.recompute:
            self.objective.recompute()
        if not plan.graphs:
            self.replays = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if plan != self.memory:
            log.warning("the memory plan from here on: %s", plan)
        self.memory = plan

    def share(self, rows: list[int]) -> list[MicroBatch]:
        """This rank's micro-batches of a step: every world-th row by length, so that the ranks have like work."""
        ordered = sorted(rows, key=lambda i: self.lengths[i], reverse=True)
        mine = ordered[self.ranks.index :: self.ranks.count]
        plan = self.memory
        return micro_batches(mine, self.lengths, plan.max_tokens, packed_tokens=plan.packed_tokens, groups=self.groups)

    def collate(self, part: MicroBatch, grain: tuple[int, int] = (1, 1)) -> Batch:
        """A micro-batch of the training rows on the device."""
        return collate(self.rows.rows, part, self.device, grain, borders=self.objective.knows_borders)
