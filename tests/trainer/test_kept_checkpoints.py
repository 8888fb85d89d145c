"""A run keeps its best and its newest public checkpoints, and a full disk damages none of them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from run_folders import chat, lay_out, plan

from tunery.spec import Lora
from worker.trainer.report import MessageWriter
from worker.trainer.run import carry_out
from worker.trainer.stop_signal import StopSignal

ROWS = [chat(i) for i in range(8)]
FOREIGN = [{"messages": [row["messages"][0], {"role": "assistant", "content": "ZQX JVW KYB" * 2}]} for row in ROWS[:4]]
"""Answers of letters that never occur in ROWS, so they only become less likely after a step or two."""


def steps_kept(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").iterdir())


def test_best_checkpoint_and_the_newest_stay(tmp_path: Path, tiny: Path) -> None:
    settled = plan(technique=Lora(r=4), n_epochs=5, learning_rate=5e-2)
    folder = lay_out(tmp_path / "run", tiny, settled, ROWS, FOREIGN, public_checkpoints=2)
    writer = MessageWriter(None)

    assert carry_out(folder, writer, StopSignal())

    losses = {entry["step"]: entry["loss"] for entry in writer.metrics if entry["type"] == "evaluated"}
    best = min(losses, key=lambda step: losses[step])
    assert best == 2, "the best has to be none of the newest"
    assert steps_kept(folder) == [2, 8, 10]


def test_newest_checkpoints_stay_where_nothing_is_validated(tmp_path: Path, tiny: Path) -> None:
    folder = lay_out(tmp_path / "run", tiny, plan(n_epochs=4), ROWS, public_checkpoints=2)

    assert carry_out(folder, MessageWriter(None), StopSignal())

    assert steps_kept(folder) == [6, 8]


PROGRAM = """
import os, resource, signal, sys
from pathlib import Path
from worker.trainer.process import carry_out_and_report
from worker.trainer import checkpoints, whole_folders
from worker.trainer.stop_signal import StopSignal
folder, what, most = sys.argv[1:]
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
write = whole_folders.write_whole
def short_of_room(path, fill):  # from the third folder of the kind on
    if path.parent.name == what and len(list(path.parent.glob("step-*"))) >= 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(most), resource.RLIM_INFINITY))
    write(path, fill)
whole_folders.write_whole = short_of_room
sys.exit(carry_out_and_report(Path(folder), 1, StopSignal()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", ["checkpoints", "snapshots"])
def test_disk_that_fills_leaves_the_last_good_one_and_says_so(tmp_path: Path, tiny: Path, what: str) -> None:
    """A limit on file sizes stands for a full disk: no file of more than 2,000 bytes can be written."""
    settled = plan(technique=Lora(r=4), n_epochs=4, learning_rate=1e-3)
    seconds = 1e-9 if what == "snapshots" else 1e9
    folder = lay_out(tmp_path / "run", tiny, settled, ROWS, snapshot_seconds=seconds)

    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), what, "2000"], capture_output=True, text=True, check=False
    )

    last: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    steps = [2, 4, 6] if what == "checkpoints" else [1, 2, 3]
    assert (last["type"], last["kind"], last["code"]) == ("failed", "crashed", "disk_full"), done.stderr
    assert last["message"].startswith(
        f"The worker's disk is full: {what}/step-{steps[2]} could not be written. The state of step {steps[1]} is "
        "intact and is kept. Ask the operator to free disk space"
    )
    assert sorted(path.name for path in (folder / what).iterdir()) == [f"step-{step}" for step in steps[:2]]

    assert carry_out(folder, MessageWriter(None), StopSignal()), "with room again the run goes on"


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounts a small file system")
def test_full_file_system_leaves_the_last_good_one_and_says_so(tmp_path: Path, tiny: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(place)], check=False)
    if mounted.returncode:
        pytest.skip("may not mount")
    try:
        settled = plan(technique=Lora(r=16), n_epochs=4, learning_rate=1e-3)
        folder = lay_out(place / "run", tiny, settled, ROWS, snapshot_seconds=1e-9)
        done = subprocess.run(
            [sys.executable, "-m", "worker.trainer", str(folder)], capture_output=True, text=True, check=False
        )
        kept = list((folder / "snapshots").glob("*")) + list((folder / "checkpoints").glob("*"))
    finally:
        subprocess.run(["umount", str(place)], check=True)
    last = json.loads(done.stdout.splitlines()[-1])
    assert (last["type"], last["code"]) == ("failed", "disk_full"), done.stderr
    assert kept
    assert not [path for path in kept if "partial" in path.name]
