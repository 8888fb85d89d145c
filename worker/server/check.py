"""`python -m worker.server.check RUN_DIR ROWS TOKENS`: checks that the model server gives the scorecard's answers.

It is a separate process: nothing of the run is in its memory, and the run's GPU is free. Writes `served.json` to the
artifact, and a section of its README. With `--wait` it imports what it needs, then reads its arguments, a JSON array,
from standard input; until then the trainer is running, and this process uses neither its GPU nor its files.
"""

import gc
import json
import os
import sys
from pathlib import Path

from tunery import plugins
from worker.supervisor import served_note
from worker.trainer import imports


def main() -> int:
    arguments = sys.argv[1:]
    if len(arguments) != 3 and arguments != ["--wait"]:
        sys.stderr.write("usage: python -m worker.server.check (RUN_DIR ROWS TOKENS | --wait)\n")
        return 2
    os.environ["HF_HUB_OFFLINE"] = "1"
    with imports.quickly():  # as the model server does
        import torch
        from transformers.utils.logging import disable_progress_bar

        from worker.server import parity
    disable_progress_bar()
    plugins.load(plugins.names(), "server")
    gc.freeze()  # else Python looks for garbage in all that was imported when it ends, which takes 2 s
    if arguments == ["--wait"]:
        line = sys.stdin.readline()
        if not line.endswith("\n"):  # the worker has ended
            return 0
        arguments = json.loads(line)
    run_dir, rows, tokens = Path(arguments[0]), int(arguments[1]), int(arguments[2])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    served_note.write(parity.check(run_dir, rows, tokens, device), run_dir / "out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
