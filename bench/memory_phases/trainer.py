"""Logs the peak memory whenever a measured part of the run has raised it; never resets it, as the run measures it too.

On a GPU it is the allocator's peak, on a CPU the process's.
"""

import logging

import torch

from bench.memory_phases import MARK
from bench.process_memory import host_bytes
from worker.trainer.step_timer import Part, StepTimer

log = logging.getLogger(__name__)
_note, _end_preparation = StepTimer.note, StepTimer.end_preparation
_seen = [0]


def _peak() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return host_bytes()


def _log_growth(part: str) -> None:
    if (peak := _peak()) > _seen[0]:
        log.info("%s%s: %d", MARK, part, peak)
    _seen[0] = peak  # lower than before where the trainer has reset the counter


def _noted(timer: StepTimer, part: Part, seconds: float, count: int = 1) -> None:
    _note(timer, part, seconds, count)
    _log_growth(part)


def _prepared(timer: StepTimer, seconds: float) -> None:
    _end_preparation(timer, seconds)
    _log_growth("prepare")


for name, wrapped in (("note", _noted), ("end_preparation", _prepared)):
    setattr(StepTimer, name, wrapped)
