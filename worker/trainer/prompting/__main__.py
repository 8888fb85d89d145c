"""`python -m worker.trainer.prompting FOLDER`: scores a model's answers to prompts, without training.

FOLDER is a run directory (`tunery.spec.Run`) with an AnswerOrder in answer_order.json and a file of chats for each
variant in `prompts/`. It writes scores.json and answers.jsonl to `out/`, and meanwhile the fraction done to `progress`.
An error that the user can correct is one line on standard error and exit code 65.
"""

import logging
import sys
from pathlib import Path

from tunery import plugins
from tunery.planning.prompting import AnswerOrder
from worker.trainer import commands
from worker.trainer.prompting import measure


def answer(folder: Path) -> None:
    """Writes `out/` by the folder's order."""
    logging.basicConfig(level=logging.INFO)
    plugins.load(plugins.names(), "trainer")
    order = AnswerOrder.model_validate_json((folder / "answer_order.json").read_text())
    found = measure.given(folder, order) if order.given else measure.answered(folder, order)
    measure.write(found, folder / "out")


if __name__ == "__main__":
    sys.exit(commands.run("prompting", answer))
