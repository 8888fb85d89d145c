"""`python -m worker.trainer RUN_DIR`: one run in a fresh process, by a supervisor or by hand.

Standard output carries wire messages and nothing else; standard error is the log. SIGTERM: save and exit 75.
"""

import os
import sys
from pathlib import Path

from worker.trainer.wish import Wish


def main() -> int:
    if len(sys.argv) != 2:
        sys.stderr.write("usage: python -m worker.trainer RUN_DIR\n")
        return 2
    wish = Wish()
    wish.listen()
    # Whatever a library prints, from Python or from C, goes to the log: the pipe is kept under another number.
    pipe = os.dup(1)
    os.dup2(2, 1)
    os.environ["HF_HUB_OFFLINE"] = "1"  # a run directory holds all that a run may read; read when the hub is imported
    # Only now: these imports take seconds, and may print.
    from worker.trainer.process import carry_out_and_tell

    return carry_out_and_tell(Path(sys.argv[1]), pipe, wish)


if __name__ == "__main__":
    sys.exit(main())
