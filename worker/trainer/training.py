"""The state of a run in memory: what the loop works on, and its progress."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator

from tunery.planning.precision import Precision
from tunery.rows.template import ChatTemplate
from tunery.spec import Plan, Run
from tunery.trainer_protocol import Replayed, Spent
from worker.trainer.data import Rows, steps_per_epoch
from worker.trainer.eight_bits import EightBits
from worker.trainer.objective import Objective
from worker.trainer.parallel import Ranks
from worker.trainer.recipes.recipe import Recipe
from worker.trainer.report import MessageWriter
from worker.trainer.sharding import Shards
from worker.trainer.step_timer import Part, StepTimer, Work
from worker.trainer.stepper import Stepper
from worker.trainer.stop_signal import StopSignal

if TYPE_CHECKING:
    from worker.trainer.scoring.answers import Question


@dataclass
class Progress:
    """A run's progress. With the weights, the optimizer and the random state, this is its whole state."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_step: int | None = None
    best_loss: float | None = None  # the validation loss, or 1 - the task's score if the best is chosen by that
    gained_loss: float | None = None  # the loss with which patience compares the next ones
    stale: int = 0  # evaluations since then
    stopped_early: bool = False
    wide: dict[str, str] = field(default_factory=dict)  # layers whose products are no longer in eight bits, and why


@dataclass(frozen=True)
class Training:
    """Everything that a run needs, assembled by `run.py`. Its `stepper` holds what changes during the run.

    `measured`: what took time while this was assembled, and grows with the files.
    """

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
    writer: MessageWriter
    stop_signal: StopSignal
    stepper: Stepper
    warnings: tuple[str, ...] = ()
    task_questions: list["Question"] = field(default_factory=list)
    eight_bits: EightBits | None = None
    replayed: Replayed | None = None
    measured: Mapping[Part, Spent] = field(default_factory=dict)

    @cached_property
    def timer(self) -> StepTimer:
        made = StepTimer(self._work())
        made.add(self.measured)
        return made

    def _work(self) -> Work:
        every = self.plan.evaluation.every_steps
        return Work(
            steps=self.total_steps,
            steps_per_epoch=self.steps_per_epoch,
            step_tokens=self.rows.tokens_a_step(self.plan.batch_size, self.ranks.count),
            layers=getattr(self.objective.causal.config.get_text_config(), "num_hidden_layers", 0),
            every=None if self.valid is None else self.steps_per_epoch if every == "auto" else every,
            valid_tokens=0 if self.valid is None else self.valid.tokens / self.ranks.count,
            keeps_checkpoints=self.run.public_checkpoints > 0,
            trained_bytes=sum(p.numel() * p.element_size() for p in self.parameters.values()),
        )

    @property
    def ranks(self) -> Ranks:
        return self.stepper.ranks

    @property
    def shards(self) -> Shards | None:
        """The model's pieces, if it is sharded over the ranks."""
        return self.stepper.shards

    @property
    def plan(self) -> Plan:
        return self.run.plan

    @property
    def device(self) -> torch.device:
        return self.ranks.device

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(self.rows.count, self.plan.batch_size)

    @property
    def total_steps(self) -> int:
        return self.plan.n_epochs * self.steps_per_epoch

    @property
    def chooses_by_task(self) -> bool:
        """Whether the best step is chosen by the task's score instead of the validation loss."""
        return self.plan.early_stopping is not None and self.plan.early_stopping.metric == "task"

    @property
    def keeps_best(self) -> bool:
        """Whether the best step, by loss or by task, becomes the model instead of the last."""
        return self.plan.select == "best" or self.plan.early_stopping is not None
