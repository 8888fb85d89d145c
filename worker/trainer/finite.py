"""What ends a run whose numbers are none: what the error says, what the log shows, and what is never saved."""

import logging
from collections.abc import Sequence

import torch

from tunery.failures import NotFinite
from worker.trainer.training import Training

log = logging.getLogger(__name__)

_SHOWN = 300
"""Characters of a row in the log."""


def failure(t: Training, *, value: object, step: int, rate: float, drawn: Sequence[int] = ()) -> NotFinite:
    """Returns the error of a step that ends the run; the rows that it drew are written to the log."""
    for number in drawn:
        for row in t.rows.examples[number].rows:
            text = t.template.tokenizer.decode(row.input_ids, skip_special_tokens=False)
            log.error("step %d drew example %d: %.*s", step, number + 1, _SHOWN, text)
    return NotFinite(value=value, step=step, rate=rate, kept=_kept(t, step))


def check_weights(t: Training, step: int, rate: float) -> None:
    """Raises NotFinite where a step has left a weight that is no number: its loss was one, and its files would not be.

    To be called before weights are saved, or the last good checkpoint would not be good.
    """
    whole = torch.stack([parameter.detach().isfinite().all() for parameter in t.parameters.values()])
    if t.ranks.any(not whole.all()):
        raise failure(t, value="a number, and a weight NaN or infinite,", step=step, rate=rate)


def _kept(t: Training, step: int) -> str:
    """Returns the checkpoint that stays: that of the last epoch which ended before the step."""
    last = (step - 1) // t.steps_per_epoch * t.steps_per_epoch
    if last and t.run.public_checkpoints:
        return f"The checkpoint of step {last} is good and stays."
    return "No checkpoint had been saved before."
