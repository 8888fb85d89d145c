"""Shared parts of the comparisons with TRL: a tiny base, TRL's run in another Python, the record of both runs."""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bench.train_side_by_side import PACKAGES, _version

ROOT = Path(__file__).parents[1]


def run(script: str, given: dict[str, Any], folder: Path, python: str) -> dict[str, Any]:
    """Runs a script of this folder with another Python on `given`; returns its result: `steps` and `versions`."""
    path = folder / "given.json"
    path.write_text(json.dumps(given))
    command = [python, str(ROOT / "bench" / script), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not found:
        raise RuntimeError(f"{script}: {done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(found[0].removeprefix("RESULT "))
    return result


def tiny(folder: Path) -> Path:
    """Writes a random model of two layers, the same each time; returns its folder."""
    sys.path.append(str(ROOT / "tests" / "fixtures"))
    import tiny_models

    return tiny_models.llama(folder)


def versions() -> dict[str, str]:
    """Returns the versions of the packages that this process computes with."""
    return {name: found for name in PACKAGES if (found := _version(name))}


def main(names: Iterable[str], steps: int, compare: Callable[[Path, str, str, int], dict[str, Any]]) -> None:
    """Runs the command line of a comparison: BASE OUT.json --trl PYTHON [--steps N] [--only RUN ...]."""
    parser = argparse.ArgumentParser()
    parser.add_argument("base")
    parser.add_argument("out", type=Path)
    parser.add_argument("--trl", required=True)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--only", choices=list(names), nargs="*", default=list(names))
    a = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        base = tiny(Path(scratch) / "base") if a.base == "tiny" else Path(a.base)
        results = [compare(base, name, a.trl, a.steps) for name in a.only]
    for result in results:
        print(result["run"], json.dumps(result["largest_difference"]), flush=True)
        for mine, theirs in zip(result["ours"], result["trl"], strict=True):
            print("   ", *(f"{each[key]:.6f}" for key in mine for each in (mine, theirs)))
    about = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "base": a.base if a.base == "tiny" else base.name}
    a.out.write_text(json.dumps({**about, "versions": versions(), "runs": results}, indent=1) + "\n")
