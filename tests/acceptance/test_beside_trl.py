"""Every step of preference and supervised tuning has the same loss as in TRL's own trainers.

TRL runs on this project's torch and transformers. Runs are in fp32, where half a per cent is far more than rounding.
"""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import other_clients
import pytest

pytestmark = pytest.mark.slow


def _runs(bench: str, out: Path) -> list[dict[str, Any]]:
    """Runs a comparison with TRL; returns what it recorded of its runs, which have twelve steps each."""
    python = other_clients.install("trl") / "bin" / "python"
    command = [sys.executable, "-m", f"bench.{bench}", "tiny", str(out), "--trl", str(python), "--steps", "12"]
    environment = {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib"), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=other_clients.ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found: list[dict[str, Any]] = json.loads(out.read_text())["runs"]
    return found


@pytest.mark.parametrize(
    ("bench", "names"),
    [
        ("preferences", ["lora sigmoid", "lora ipo", "lora dpo_norm", "full sigmoid"]),
        ("sft", ["lora padded", "lora packed", "full padded", "full packed"]),
    ],
)
def test_losses_are_those_of_trl(tmp_path: Path, bench: str, names: list[str]) -> None:
    runs = _runs(bench, tmp_path / "out.json")

    assert [run["run"] for run in runs] == names
    for run in runs:
        losses = [step["loss"] for step in run["ours"]]
        assert len(set(losses)) == 12, "the losses move"
        assert losses == pytest.approx([step["loss"] for step in run["trl"]], rel=5e-3)
        assert run["largest_difference"].get("margin", 0) < 1e-3
