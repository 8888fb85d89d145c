"""`python -m worker.trainer RUN_DIR`: does one run in a fresh process, started by a supervisor or by hand.

Standard output carries only messages of `tunery.trainer_protocol`; standard error is the log. On SIGTERM it saves and
exits with 75. With `--wait` it imports what a run needs, then reads RUN_DIR from standard input; the log is then
RUN_DIR/log.txt. With `--wait-as-rank` it does so for rank 0, which also says which rank it is.
"""

import gc
import json
import os
import sys
from contextlib import suppress
from pathlib import Path

from worker.trainer import children, imports
from worker.trainer.children import Children
from worker.trainer.report import MessageWriter
from worker.trainer.stop_signal import StopSignal

WAITING = ("--wait", children.AS_RANK)


def main() -> int:
    if len(sys.argv) != 2 or (sys.argv[1].startswith("--") and sys.argv[1] not in WAITING):
        sys.stderr.write("usage: python -m worker.trainer (RUN_DIR | --wait)\n")
        return 2
    how = sys.argv[1]
    stop_signal = StopSignal()
    stop_signal.listen()
    # Whatever a library prints, from Python or C, goes to the log: the pipe keeps another descriptor.
    pipe = os.dup(1)
    os.dup2(2, 1)
    os.environ["HF_HUB_OFFLINE"] = "1"  # all files of a run are local; set before the hub is imported
    others = Children(MessageWriter(pipe), log_in_folder=how == "--wait")
    if how != children.AS_RANK:
        world = children.devices_of(os.environ) if how == "--wait" else children.devices_asked(Path(how))
        with suppress(OSError):  # the run begins those that are missing, and reports why it cannot
            others.make_ready(world)
    # Only now: these imports take seconds, and may print.
    with imports.quickly():
        from worker.trainer.process import carry_out_and_report

    folder = _wait_for_folder(how) if how in WAITING else Path(how)
    try:
        return 0 if folder is None else carry_out_and_report(folder, pipe, stop_signal, others)
    finally:
        gc.freeze()  # else Python looks for garbage in all that a run has made before it ends, which takes 2 s


def _wait_for_folder(how: str) -> Path | None:
    """Returns the run directory, whose log this process uses from now on unless it is a rank of one that does not.

    None if standard input ends without one.
    """
    line = sys.stdin.buffer.readline()
    if not line.endswith(b"\n"):
        return None
    if how == children.AS_RANK:
        given = json.loads(line)
        os.environ.update(given["environment"])
        folder, logs = Path(given["run_dir"]), given["log_in_folder"]
    else:
        folder, logs = Path(os.fsdecode(line[:-1])), True
    if logs:
        _log_to(folder)
    return folder


def _log_to(folder: Path) -> None:
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for end, descriptor in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(end, descriptor)
    os.close(log)
    os.close(nothing)


if __name__ == "__main__":
    sys.exit(main())
