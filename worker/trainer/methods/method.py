"""What the trainer requires of a method: the objective over its examples. Its `RowEncoder` makes examples of rows."""

from typing import TYPE_CHECKING, NamedTuple, Protocol

from torch import Tensor

from worker.trainer.data import Batch, Example

if TYPE_CHECKING:
    from worker.trainer.objective import Objective


class Shown(NamedTuple):
    """What messages and metrics show of a step or of a validation file.

    `accuracy`: the fraction of labelled tokens whose likeliest prediction is right; None if a method has none.
    `metrics`: its other measures, by name.
    """

    loss: float
    accuracy: float | None
    metrics: dict[str, float] = {}


class Method(Protocol):
    """A training method, created for one run.

    A step minimises the sum of its examples' losses divided by the sum of their weights, however many micro-batches and
    GPUs it is spread over, so an objective itself divides by nothing.
    """

    sums: tuple[str, ...]
    """The names of the sums that `objective` returns; "loss" is one of them."""
    recordable: bool
    """Whether its passes can be CUDA graphs: the same kernels for every batch of a shape, and no value read by the
    host.
    """
    reads_reference: bool
    """Whether its objective needs `batch.reference`, measured once before the first step."""
    looks_up_rows_only: bool
    """Whether its passes are over tokens of the batch's rows alone. Otherwise GPUs exchange the gradient of the whole
    embedding, not only of these tokens; also if a method does not say.
    """

    def weight(self, example: Example) -> float:
        """Returns the example's weight in the divisor of the sums."""

    def objective(self, model: "Objective", batch: Batch, scale: float) -> dict[str, Tensor]:
        """Returns the sums over the batch's examples; "loss", whose gradient is taken, is `scale` times its sum."""

    def shown(self, means: dict[str, float]) -> Shown:
        """Returns what to show, given the sums over some examples divided by their weights."""
