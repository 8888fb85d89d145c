"""Supervised fine-tuning: minimises the cross entropy of all labelled tokens, with equal weights."""

from typing import TYPE_CHECKING

from torch import Tensor

from worker.trainer.data import Batch, Example
from worker.trainer.methods.method import Shown

if TYPE_CHECKING:
    from worker.trainer.objective import Objective


class SupervisedFineTuning:
    """Learns labelled tokens. A step's loss is their mean."""

    sums: tuple[str, ...] = ("loss", "correct")
    recordable = True
    reads_reference = False
    looks_up_rows_only = True

    def weight(self, example: Example) -> float:
        """Returns the number of labelled tokens."""
        return example.labelled

    def objective(self, model: "Objective", batch: Batch, scale: float) -> dict[str, Tensor]:
        """Returns the sum of cross entropies, and how many likeliest predictions are right."""
        loss, correct = model(batch, scale)
        return {"loss": loss, "correct": correct}

    def shown(self, means: dict[str, float]) -> Shown:
        return Shown(means["loss"], means["correct"])
