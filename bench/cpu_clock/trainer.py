"""Replaces the clock of the trainer's modules that measure a run by the processor time of all its threads."""

import time
from types import SimpleNamespace

from worker.trainer import loop, run, step_timer

for module in (loop, run, step_timer):
    vars(module)["time"] = SimpleNamespace(monotonic=time.process_time)
