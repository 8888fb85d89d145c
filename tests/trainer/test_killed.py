"""A trainer that is killed at a random step and started again produces the same model."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from run_folders import chat, lay_out, plan, steps_of

from tunery.planning import expected
from tunery.spec import Full, Lora, Qlora, Replay

SEED = int(os.environ.get("TUNERY_TEST_SEED", random.SystemRandom().randrange(2**31)))
ROWS = [chat(i, words=5 + 37 * i % 40) for i in range(40)]
EPOCHS, STEPS = 20, 80


def _train(folder: Path, kill_after: int | None = None) -> int:
    """Runs a trainer process and returns its exit status; kills it once it has reported step `kill_after`."""
    command = [sys.executable, "-m", "worker.trainer", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        for line in iter(process.stdout.readline, ""):  # iterating over stdout would read ahead
            said = json.loads(line)
            if kill_after is not None and said["type"] == "step" and said["step"] >= kill_after:
                process.send_signal(signal.SIGKILL)
        return process.wait()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("technique", "replay"),
    [
        pytest.param(Lora(r=4, dropout=0.1), None, id="lora"),
        pytest.param(Qlora(r=4, dropout=0.1), None, id="qlora"),
        pytest.param(Full(), None, id="full"),
        pytest.param(Lora(r=4, dropout=0.1), Replay(share=0.2, max_new_tokens=64), id="replay"),
    ],
)
def test_killed_run_ends_with_the_weights_of_one_never_killed(
    tmp_path: Path, tiny: Path, technique: Any, replay: Replay | None
) -> None:
    """The run has shuffled, packed rows, several micro-batches a step and dropout; a kill may be within an epoch.

    TUNERY_TEST_SEED repeats the steps that were drawn.
    """
    chosen = random.Random(f"{SEED}{technique.type}").sample(range(1, STEPS // 2), 2)
    print(f"TUNERY_TEST_SEED={SEED}: killed after steps {sorted(chosen)}")
    settled = plan(
        technique=technique, n_epochs=EPOCHS, batch_size=10, packing=True, learning_rate=1e-3, max_seq_length=256,
        replay=replay,
    )  # fmt: skip
    whole, killed = (
        lay_out(tmp_path / name, tiny, settled, ROWS, snapshot_seconds=1e-9) for name in ("whole", "killed")
    )
    assert _train(whole) == 0

    for step in sorted(chosen):
        assert _train(killed, kill_after=step) == -signal.SIGKILL
    assert _train(killed) == 0

    name = "model.safetensors" if technique.type == "full" else "adapter_model.safetensors"
    first, second = (hashlib.sha256((folder / "out" / name).read_bytes()).hexdigest() for folder in (whole, killed))
    assert first == second
    assert steps_of(whole) == steps_of(killed)
    steps = [step for step in steps_of(killed) if step["type"] == "step"]
    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
    tokens = [0, *(step["tokens"] for step in steps)]
    assert max(b - a for a, b in pairwise(tokens)) > expected.CPU_MICRO_BATCH, "no step had two micro-batches"
