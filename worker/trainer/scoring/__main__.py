"""`python -m worker.trainer.scoring FOLDER`: scores an adapter and its base on test rows, without training.

FOLDER is a run directory (`tunery.spec.Run`) with an adapter. It writes `scorecard.json` and `answers.jsonl` to `out/`.
An error that the user can correct is one line on standard error and exit code 65.
"""

import logging
import sys
from pathlib import Path

from tunery import plugins
from worker.trainer import commands, run
from worker.trainer.report import MessageWriter
from worker.trainer.scoring import comparison
from worker.trainer.stop_signal import StopSignal


def score(folder: Path) -> None:
    """Writes `out/` from the folder's adapter and rows."""
    logging.basicConfig(level=logging.INFO)
    plugins.load(plugins.names(), "trainer")
    scored = run.score(folder, MessageWriter(None), StopSignal())
    (folder / "out").mkdir()
    comparison.write(scored, folder / "out")


if __name__ == "__main__":
    sys.exit(commands.run("scoring", score))
