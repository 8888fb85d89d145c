"""Preference tuning beside TRL's DPOTrainer: every step of three losses, of adapters and of all weights."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import other_clients
import pytest

pytestmark = pytest.mark.slow


def test_losses_are_those_of_trl(tmp_path: Path) -> None:
    """TRL stands on this project's own torch and transformers. fp32, so half a per cent is far more than rounding."""
    python = other_clients.install("trl") / "bin" / "python"
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "bench.preferences", "tiny", str(out), "--trl", str(python), "--steps", "12"]
    environment = {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib"), "CUDA_VISIBLE_DEVICES": ""}

    done = subprocess.run(command, cwd=other_clients.ROOT, env=environment, capture_output=True, text=True, timeout=600)

    assert done.returncode == 0, done.stderr[-2000:]
    runs = json.loads(out.read_text())["runs"]
    assert [run["run"] for run in runs] == ["lora sigmoid", "lora ipo", "lora dpo_norm", "full sigmoid"]
    for run in runs:
        losses = [step["loss"] for step in run["ours"]]
        assert len(set(losses)) == 12, "the losses move"
        assert losses == pytest.approx([step["loss"] for step in run["trl"]], rel=5e-3)
        assert run["largest_difference"].get("margin", 0) < 1e-3
