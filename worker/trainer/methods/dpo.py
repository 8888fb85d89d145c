"""Direct preference optimisation: learns to prefer one of two answers while staying near the initial model.

Rafailov et al. 2023, arXiv:2305.18290, equation 7; IPO: Azar et al. 2023, arXiv:2310.12036, equation 17; with
log-probabilities divided by the answer's length (`dpo_norm`): Lambert et al. 2024, arXiv:2411.15124, section 5.
"""

from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional

from tunery.spec import Dpo
from worker.trainer.data import Batch, Example
from worker.trainer.methods.method import Shown

if TYPE_CHECKING:
    from worker.trainer.objective import Objective


class DirectPreferenceOptimization:
    """Learns pairs of rows, the preferred answer first. A step's loss is the mean over its pairs.

    An answer's reward is beta times the log of its probability over that by the reference. The loss drives the
    preferred answer's reward above the other's: without limit (sigmoid, dpo_norm), or by one half (ipo).
    """

    sums: tuple[str, ...] = ("loss", "rewards_chosen", "rewards_rejected", "rewards_margin", "rewards_accuracy")
    recordable = False  # how losses are divided among the rows differs from batch to batch
    reads_reference = True
    looks_up_rows_only = True

    def __init__(self, options: Dpo) -> None:
        decided = options.decided()
        assert decided.beta != "auto"
        self._beta, self._loss = decided.beta, decided.loss

    def weight(self, example: Example) -> float:  # noqa: ARG002 (of the protocol)
        """Returns one: pairs count equally, however long they are."""
        return 1

    def objective(self, model: "Objective", batch: Batch, scale: float) -> dict[str, Tensor]:
        """Returns the sums of losses and rewards, and how often the preferred answer's reward is higher."""
        gained = -model.row_losses(batch)
        if batch.reference is not None:  # there is none while the memory plan is tried
            gained = gained - batch.reference
        if self._loss != "sigmoid":
            # Also for IPO: its authors and TRL divide by the length, or long answers would weigh more.
            gained = gained / gained.new_tensor(batch.labelled)
        chosen, rejected = gained.view(-1, 2).unbind(1)
        lead = chosen - rejected
        rewards = (self._beta * chosen.detach(), self._beta * rejected.detach())
        return {
            "loss": self._losses(lead).sum() * scale,
            "rewards_chosen": rewards[0].sum(),
            "rewards_rejected": rewards[1].sum(),
            "rewards_margin": (rewards[0] - rewards[1]).sum(),
            "rewards_accuracy": (rewards[0] > rewards[1]).sum(),
        }

    def _losses(self, lead: Tensor) -> Tensor:
        if self._loss == "ipo":
            return (lead - 1 / (2 * self._beta)) ** 2
        return functional.softplus(-self._beta * lead)

    def shown(self, means: dict[str, float]) -> Shown:
        return Shown(means["loss"], None, {name: means[name] for name in self.sums if name != "loss"})
