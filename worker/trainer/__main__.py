"""`python -m worker.trainer RUN_DIR`: does one run in a fresh process, started by a supervisor or by hand.

Standard output carries only messages of `tunery.trainer_protocol`; standard error is the log. On SIGTERM it saves and
exits with 75. With `--wait` it imports what a run needs, then reads RUN_DIR from standard input; the log is then
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
    # Whatever a library prints, from Python or C, goes to the log: the pipe keeps another descriptor.
    pipe = os.dup(1)
    os.dup2(2, 1)
    os.environ["HF_HUB_OFFLINE"] = "1"  # all files of a run are local; set before the hub is imported
    # Only now: these imports take seconds, and may print.
    from worker.trainer.process import carry_out_and_report

    folder = _wait_for_folder() if sys.argv[1] == "--wait" else Path(sys.argv[1])
    return 0 if folder is None else carry_out_and_report(folder, pipe, stop_signal)


def _wait_for_folder() -> Path | None:
    """Returns the run directory, whose log this process uses from now on; None if standard input ends without one."""
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
