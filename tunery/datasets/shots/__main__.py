"""Makes the prompts of a baseline: `python -m tunery.datasets.shots FOLDER`.

FOLDER holds a ShotsOrder in shots_order.json, the eval file as `rows`, maybe `examples`, and `base` with a tokenizer.
Written are a file of chats for each variant in `prompts/`, and shots.json. What the user can change is one line on
standard error and exit code 65.
"""

import sys
from pathlib import Path

from tunery import plugins
from tunery.errors import TuneryError
from tunery.planning.prompting import ShotsOrder
from tunery.trainer_protocol import EXIT_USER_ERROR


def main(folder: Path) -> int:
    """Returns the exit status."""
    plugins.load(plugins.names(), "worker")
    from tunery.datasets.shots import maker  # what it imports may be missing, which is to be said

    order = ShotsOrder.model_validate_json((folder / "shots_order.json").read_text())
    (folder / "prompts").mkdir()
    made = maker.make(folder, order)
    (folder / "shots.json").write_text(made.model_dump_json())
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(Path(sys.argv[1])))
    except TuneryError as error:
        sys.stderr.write(error.message.replace("\n", " ") + "\n")
        sys.exit(EXIT_USER_ERROR)
