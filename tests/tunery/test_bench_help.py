"""What benches say of their arguments, without measuring anything."""

import os
import subprocess
import sys

import pytest

CALLS = {
    "report": "FREE.jsonl [SEEDS] [SPEED_ROWS] [FIRST_SEED] [BASE]",
    "report_page": "[SCREENSHOT.png]",
    "hostile": "",
    "quotes": "OUT.json [SHAPE]",
}


@pytest.mark.parametrize("bench", CALLS)
def test_help_says_how_a_bench_is_called(bench: str) -> None:
    command = [sys.executable, "-m", f"bench.{bench}", "--help"]
    done = subprocess.run(command, env=os.environ | {"COLUMNS": "120"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {bench}.py [-h] {CALLS[bench]}".rstrip() + "\n")
