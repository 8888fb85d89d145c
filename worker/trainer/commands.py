"""Runs the command lines `python -m worker.trainer.NAME FOLDER` of several programs."""

import sys
from collections.abc import Callable
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from tunery.errors import TuneryError
from tunery.failures import JobFailure
from tunery.trainer_protocol import EXIT_USER_ERROR


def run(name: str, work: Callable[[Path], object], fault: type[TuneryError] = JobFailure) -> int:
    """Does `work` in the folder that the command line names; returns the exit status.

    A `fault` is the user's to correct: its message is one line on standard error, and the status is EXIT_USER_ERROR.
    """
    if len(sys.argv) != 2:
        sys.stderr.write(f"usage: python -m worker.trainer.{name} FOLDER\n")
        return 2
    disable_progress_bar()
    try:
        work(Path(sys.argv[1]))
    except fault as error:
        sys.stderr.write(error.message.replace("\n", " ") + "\n")
        return EXIT_USER_ERROR
    return 0
