"""`python -m worker.trainer.prompting FOLDER`: a model's answers to prompts, scored, without training.

FOLDER is a run directory (`tunery.spec.Run`) with an AnswerOrder in answer_order.json and a file of chats for each
variant in `prompts/`. Into `out/` go scores.json and answers.jsonl, and meanwhile the share that is done into
`progress`. What the user can change is one line on standard error and exit code 65.
"""

import logging
import sys
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from tunery import plugins
from tunery.failures import JobFailure
from tunery.planning.prompting import AnswerOrder
from tunery.wire import EXIT_USER_ERROR
from worker.trainer.prompting import measure


def main() -> int:
    if len(sys.argv) != 2:
        sys.stderr.write("usage: python -m worker.trainer.prompting FOLDER\n")
        return 2
    logging.basicConfig(level=logging.INFO)
    disable_progress_bar()
    plugins.load(plugins.names(), "trainer")
    folder = Path(sys.argv[1])
    order = AnswerOrder.model_validate_json((folder / "answer_order.json").read_text())
    try:
        found = measure.given(folder, order) if order.given else measure.answered(folder, order)
    except JobFailure as error:
        sys.stderr.write(error.message.replace("\n", " ") + "\n")
        return EXIT_USER_ERROR
    measure.write(found, folder / "out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
