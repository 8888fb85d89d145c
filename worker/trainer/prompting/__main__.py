"""`python -m worker.trainer.prompting FOLDER`: a model's answers to prompts, scored, without training.

FOLDER is a run directory (`tunery.spec.Run`) with an AnswerOrder in answer_order.json and a file of chats for each
variant in `prompts/`. Into `out/` go scores.json and answers.jsonl, and meanwhile the share that is done into
`progress`. What the user can change is one line on standard error and exit code 65.
"""

import logging
import sys
from pathlib import Path

from tunery import plugins
from tunery.planning.prompting import AnswerOrder
from worker.trainer import commands
from worker.trainer.prompting import measure


def answer(folder: Path) -> None:
    """Writes `out/` from the folder's order."""
    logging.basicConfig(level=logging.INFO)
    plugins.load(plugins.names(), "trainer")
    order = AnswerOrder.model_validate_json((folder / "answer_order.json").read_text())
    found = measure.given(folder, order) if order.given else measure.answered(folder, order)
    measure.write(found, folder / "out")


if __name__ == "__main__":
    sys.exit(commands.run("prompting", answer))
