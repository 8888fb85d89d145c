"""`python -m worker.trainer.scoring FOLDER`: an adapter and its base on test rows, without training.

FOLDER is a run directory (`tunery.spec.Run`) with an adapter. Into `out/` go `scorecard.json` and `answers.jsonl`. What
the user can change is one line on standard error and exit code 65.
"""

import logging
import sys
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from tunery import plugins
from tunery.failures import JobFailure
from tunery.wire import EXIT_USER_ERROR
from worker.trainer import run
from worker.trainer.report import Voice
from worker.trainer.scoring import comparison
from worker.trainer.wish import Wish


def main() -> int:
    if len(sys.argv) != 2:
        sys.stderr.write("usage: python -m worker.trainer.scoring FOLDER\n")
        return 2
    logging.basicConfig(level=logging.INFO)
    disable_progress_bar()
    plugins.load(plugins.names(), "trainer")
    folder = Path(sys.argv[1])
    try:
        scored = run.score(folder, Voice(None), Wish())
    except JobFailure as error:
        sys.stderr.write(error.message.replace("\n", " ") + "\n")
        return EXIT_USER_ERROR
    (folder / "out").mkdir()
    comparison.write(scored, folder / "out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
