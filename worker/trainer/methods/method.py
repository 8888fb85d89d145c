"""What a method is to the trainer: the objective over its examples. How rows become examples says its `RowEncoder`."""

from typing import TYPE_CHECKING, NamedTuple, Protocol

from torch import Tensor

from worker.trainer.data import Batch, Example

if TYPE_CHECKING:
    from worker.trainer.objective import Objective


class Shown(NamedTuple):
    """What messages and metrics say of a step or of a validation file.

    `accuracy`: the share of labelled tokens whose most likely prediction is right; None where a method has no such
    share. `metrics`: what it measures besides, by name.
    """

    loss: float
    accuracy: float | None
    metrics: dict[str, float] = {}


class Method(Protocol):
    """A training method, made for one run.

    A step minimises the sum of its examples' losses over the sum of their weights, however many micro-batches and GPUs
    it is spread over, so an objective divides by nothing itself.
    """

    sums: tuple[str, ...]
    """The names of what `objective` returns; "loss" is one of them."""
    recordable: bool
    """Whether its passes can be CUDA graphs: the same kernels for every batch of a shape, and no look at a value."""
    reads_reference: bool
    """Whether its objective needs `batch.reference`, which is measured once, before the first step."""

    def weight(self, example: Example) -> float:
        """Returns the example's part of what sums are divided by."""

    def objective(self, model: "Objective", batch: Batch, scale: float) -> dict[str, Tensor]:
        """Returns the sums over the batch's examples. "loss", which gradients are of, is `scale` times its sum."""

    def shown(self, means: dict[str, float]) -> Shown:
        """Returns what to show of the sums over some examples, divided by their weights."""
