"""`python -m worker.trainer RUN_DIR`: one run in a fresh process, by a supervisor or by hand.

Standard output carries messages of `tunery.trainer_protocol` and nothing else; standard error is the log. SIGTERM: save
and exit 75. With `--wait` it imports all that a run needs and then reads RUN_DIR from standard input; the log is
RUN_DIR/log.txt.
"""

import os
import sys
from pathlib import Path

from worker.trainer.stop_signal import StopSignal


def main() -> int:
    if len(sys.argv) != 2:
        sys.stderr.write("usage: python -m worker.trainer (RUN_DIR | --wait)\n")
        return 2
    stop_signal = StopSignal()
    stop_signal.listen()
    # Whatever a library prints, from Python or from C, goes to the log: the pipe is kept under another number.
    pipe = os.dup(1)
    os.dup2(2, 1)
    os.environ["HF_HUB_OFFLINE"] = "1"  # a run directory holds all that a run may read; read when the hub is imported
    # Only now: these imports take seconds, and may print.
    from worker.trainer.process import carry_out_and_report

    folder = _wait_for_folder() if sys.argv[1] == "--wait" else Path(sys.argv[1])
    return 0 if folder is None else carry_out_and_report(folder, pipe, stop_signal)


def _wait_for_folder() -> Path | None:
    """Returns the run directory, whose log is this process's from now on; None when nobody is left to name one."""
    line = sys.stdin.buffer.readline()
    if not line.endswith(b"\n"):
        return None
    folder = Path(os.fsdecode(line[:-1]))
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for end, descriptor in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(end, descriptor)
    os.close(log)
    os.close(nothing)
    return folder


if __name__ == "__main__":
    sys.exit(main())
