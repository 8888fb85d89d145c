"""Cleans one file: `python -m tunery.datasets.cleaning FOLDER`.

FOLDER holds the file `rows`, `against` where it is compared, and a Cleaning in order.json. clean.jsonl, held-out.jsonl
and cleaning.json are written there. A file that cannot be cleaned ends it with EXIT_USER_ERROR and the reason.
"""

import json
import sys
from pathlib import Path

from tunery import plugins
from tunery.datasets.cleaning.order import Cleaning
from tunery.errors import TuneryError
from tunery.wire import EXIT_USER_ERROR


def main(folder: Path) -> int:
    """Returns the exit status."""
    plugins.load(plugins.names(), "worker")
    from tunery.datasets.cleaning import cleaner  # what it imports may be missing, which is to be said

    order = Cleaning.model_validate_json((folder / "order.json").read_text())
    against = folder / "against"
    done = cleaner.clean(
        folder / "rows",
        folder / "clean.jsonl",
        order,
        held_out=folder / "held-out.jsonl" if order.held_out else None,
        against=against if against.exists() else None,
    )
    (folder / "cleaning.json").write_text(json.dumps(done.as_dict()))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(Path(sys.argv[1])))
    except TuneryError as error:
        sys.stderr.write(f"{error.message}\n")
        sys.exit(EXIT_USER_ERROR)
