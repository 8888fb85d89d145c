"""The process around a run: its environment, its other ranks, and how it ends.

With several GPUs this process is rank 0 and has started the others (`children.py`).
"""

import logging
import os
import sys
from pathlib import Path

import torch
from pydantic import ValidationError
from transformers.utils.logging import disable_progress_bar

from tunery import plugins
from tunery.errors import TuneryError, Unavailable
from tunery.failures import DiskFull, JobFailure, NotFinite
from tunery.spec import Run
from tunery.trainer_protocol import EXIT_PAUSED, Failed, Paused
from worker.trainer.children import Children, exit_code
from worker.trainer.report import MessageWriter
from worker.trainer.run import carry_out
from worker.trainer.stop_signal import Stopped, StopSignal

log = logging.getLogger(__name__)

ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",  # rows differ in length: fixed segments would fragment
}


def carry_out_and_report(folder: Path, pipe: int, stop_signal: StopSignal, children: Children | None = None) -> int:
    """Does the run, reports its end on `pipe` and returns the exit code. `children`: other ranks that wait for it."""
    rank = int(os.environ.get("RANK", "0"))
    children = children or Children(MessageWriter(pipe))  # a rank reports to rank 0 only why it failed
    writer = children.writer if rank == 0 else MessageWriter(None)
    _configure(rank)
    try:
        plugins.load(plugins.names(), "trainer")
        if rank == 0:
            children.start(folder, _world(folder))
        return 0 if carry_out(folder, writer, stop_signal) else EXIT_PAUSED
    except Stopped:
        writer.write(Paused(step=0, path=None))
        return EXIT_PAUSED
    except BrokenPipeError:
        return 1  # nobody reads any more, so there is nobody to report to
    except Exception as error:
        log.exception("the run failed")
        return exit_code(children.say_failed(describe(error)))


def _world(folder: Path) -> int:
    return int(Run.model_validate_json((folder / "spec.json").read_text()).plan.resources.gpus)


REPEATABLE = (AssertionError, AttributeError, ImportError, LookupError, NotImplementedError, TypeError, ValueError)
"""Errors about arguments ("this model does not support ..."), which another attempt would repeat. Not RuntimeError,
which torch also raises for a failing device.
"""


def describe(error: Exception) -> Failed:
    """Returns the message for an exception, by which the supervisor decides what to do."""
    if isinstance(error, NotFinite):
        return Failed(kind="nan_loss", code=error.code, message=error.message)
    if isinstance(error, DiskFull):  # another host may have room, or this one later
        return Failed(kind="crashed", code=error.code, message=error.message)
    if isinstance(error, JobFailure):
        kind = "gpu_oom" if error.code == "does_not_fit" else "user_error"
        return Failed(kind=kind, code=error.code, message=error.message, param=error.param)
    if isinstance(error, torch.OutOfMemoryError):
        message = (
            "The GPU runs out of memory even with one row at a time. Lower max_seq_length, use technique 'qlora' "
            "unless the job does, or take a GPU with more memory."
        )
        return Failed(kind="gpu_oom", code="does_not_fit", message=message)
    if isinstance(error, ValidationError | TuneryError) and not isinstance(error, Unavailable):
        return Failed(kind="user_error", code="invalid_spec", message=str(error))
    reason = (str(error).strip() or "no message").splitlines()[0]
    kind = "user_error" if isinstance(error, REPEATABLE) else "crashed"
    return Failed(kind=kind, code="training_crashed", message=f"{type(error).__name__}: {reason}")


def _configure(rank: int) -> None:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    disable_progress_bar()
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        stream=sys.stderr,
        format=f"%(asctime)s {f'[rank {rank}] ' if rank else ''}%(message)s",
    )
