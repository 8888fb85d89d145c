"""Records the optimizer's step of a run whose passes are recorded, too.

Adapters are hundreds of small tensors. The optimizer looks at each of them before it launches its first kernel, and
meanwhile the GPU, which has just sent the loss, does nothing. A recorded step is one launch.
"""

import logging
from collections.abc import Callable
from operator import is_

import torch
from torch import Tensor

from worker.trainer.decoding.graphs import Recorder
from worker.trainer.memory import shortage_noticed

log = logging.getLogger(__name__)


def can_record(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer's step can be recorded: its rate must be readable from a tensor, and no value leave the GPU.

    Other optimizers of `recipes` count their steps on the host.
    """
    fused = all(group.get("fused") for group in optimizer.param_groups)
    return type(optimizer) is torch.optim.AdamW and fused


class RecordedUpdate:
    """Steps an optimizer and sets the gradients to 0: the first time by its own code, which warms up its kernels.

    Gradients have to be in the same tensors each time; if they are in others, the step is recorded again.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, recorder: Recorder) -> None:
        self._optimizer, self._recorder = optimizer, recorder
        self._groups = optimizer.param_groups
        # Each step reads its rate from a tensor, recorded or not: both have to round it alike.
        self._rates = [torch.zeros((), device=group["params"][0].device) for group in self._groups]
        self._gradients: list[Tensor] = []
        self._replay: Callable[[], None] | None = None
        self._failed = False

    def run(self) -> None:
        """Does one step at the groups' rates."""
        for rate, group in zip(self._rates, self._groups, strict=True):
            rate.fill_(group["lr"])
        found = [p.grad for group in self._groups for p in group["params"] if p.grad is not None]
        if len(found) != len(self._gradients) or not all(map(is_, found, self._gradients)):
            self._gradients, self._replay = found, None
        elif self._replay is None and not self._failed:
            self._record()
        with shortage_noticed():
            if self._replay is None:
                self._step()
            else:
                self._replay()

    def forget(self) -> None:
        """Frees the memory of the recording; the next step but one is recorded again."""
        self._gradients, self._replay = [], None
        self._recorder.forget()

    def _record(self) -> None:
        try:
            _, self._replay = self._recorder.record(self._step)
        except RuntimeError as error:
            log.warning("the optimizer's step runs without a CUDA graph: %s", str(error).splitlines()[0])
            self._failed = True

    def _step(self) -> Tensor:
        kept = [(group["lr"], group["capturable"]) for group in self._groups]
        try:
            for group, rate in zip(self._groups, self._rates, strict=True):
                group["lr"], group["capturable"] = rate, True
            self._optimizer.step()
        finally:
            for group, (rate, capturable) in zip(self._groups, kept, strict=True):
                group["lr"], group["capturable"] = rate, capturable
        torch._foreach_zero_(self._gradients)
        return self._rates[0]
