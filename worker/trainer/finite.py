"""Detects NaN or infinite weights before a save, and builds the error that ends a run with such a loss or weight."""

import logging
from collections.abc import Sequence

import torch

from tunery.failures import NotFinite
from worker.trainer.training import Training

log = logging.getLogger(__name__)

_SHOWN = 300
"""How many characters of a row are logged."""


def failure(t: Training, *, what: str, step: int, rate: float, drawn: Sequence[int] = ()) -> NotFinite:
    """Returns the error for a step that ends the run, and logs the rows that the step drew."""
    for number in drawn:
        for row in t.rows.examples[number].rows:
            text = t.template.tokenizer.decode(row.input_ids, skip_special_tokens=False)
            log.error("step %d drew example %d: %.*s", step, number + 1, _SHOWN, text)
    return NotFinite(what=what, step=step, rate=rate, kept=_kept(t, step))


def check_weights(t: Training, step: int, rate: float) -> None:
    """Raises NotFinite if a step with a finite loss has left a weight that is not finite.

    Call it before weights are saved, or the last checkpoint would be damaged.
    """
    whole = torch.stack([parameter.detach().isfinite().all() for parameter in t.parameters.values()])
    if t.ranks.any(not whole.all()):
        raise failure(t, what="A weight became NaN or infinite", step=step, rate=rate)


def _kept(t: Training, step: int) -> str:
    """Returns a sentence saying which checkpoint is kept: that of the last epoch which ended before the step."""
    last = (step - 1) // t.steps_per_epoch * t.steps_per_epoch
    if last and t.run.public_checkpoints:
        return f"The checkpoint of step {last} is intact and is kept."
    return "No checkpoint had been saved."
