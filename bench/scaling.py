"""Compares a job on one GPU with the same on two: `python -m bench.scaling OUT.json [--kinds "lora 8b"] [--steps 48]
[--skip 10] [--models FOLDER]`.

Weak scaling: each GPU has four rows of 1,900 to 1,906 tokens a step, however many there are. Strong scaling: all of
them together have eight rows of a step, of the lengths of instruction data. Every run is the trainer's own process, as
a worker preloads it. `all_steps` counts the seconds of every step, with the compilation of the first ones, and
those in which passes are recorded before them; `steady` those after `--skip` steps. OUT.json is written after every
kind. The checkpoints are random. Needs two GPUs.
"""

import argparse
import json
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench import make_model
from bench.job_speed import Work, measure
from bench.train_side_by_side import hardware

LIMIT = 200.0
"""Seconds after which a run is killed: a rank that hangs must not take the others' time."""


@dataclass(frozen=True)
class Kind:
    """`grows`: whether two GPUs have twice the rows of a step."""

    shape: str
    work: Work
    grows: bool = True

    def on_two(self) -> Work:
        return replace(self.work, gpus=2, batch=self.work.batch * (2 if self.grows else 1))


KINDS = {
    "lora 1b": Kind("llama3-1b", Work("lora")),
    "full 1b": Kind("llama3-1b", Work("full")),
    "lora 8b": Kind("llama3-8b", Work("lora")),
    "lora 1b, uneven rows": Kind("llama3-1b", Work("lora", lengths="real", batch=8), grows=False),
}


def compare(one: dict[str, Any], two: dict[str, Any]) -> dict[str, Any]:
    """Returns the figures of two runs and how much faster two GPUs are."""
    if "failed" in one or "failed" in two:
        return {"one": one, "two": two}
    ratios = {
        "all_steps": round(two["all_steps_tok_s"] / one["all_steps_tok_s"], 3),
        "steady": round(two["tok_s"] / one["tok_s"], 3),
    }
    return {"scaling": ratios, "one": one, "two": two}


def shown(name: str, found: dict[str, Any]) -> str:
    """Returns a kind's line of the table."""
    one, two = found["one"], found["two"]
    if "scaling" not in found:
        return f"{name}: failed {[run['failed'] for run in (one, two) if 'failed' in run]}"
    around = [run["seconds"].get("around_the_steps") for run in (one, two)]
    return f"{name}: {one['tok_s']} and {two['tok_s']} tokens/s, {found['scaling']}, seconds around the steps {around}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--skip", type=int, default=10)
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "models")
    a = parser.parse_args()
    kinds = {name: KINDS[name] for name in a.kinds}
    began = time.monotonic()
    results: dict[str, Any] = {}
    shapes = {kind.shape for kind in kinds.values()}
    bases = {shape: make_model.ready(a.models, shape) for shape in shapes}

    def run(name: str, gpus: str) -> dict[str, Any]:
        kind = kinds[name]
        work = kind.on_two() if "," in gpus else kind.work
        work = replace(work, steps=a.steps, skip=a.skip)
        return measure(bases[kind.shape], work, preloaded=True, limit=LIMIT, gpus=gpus)

    # One GPU's runs go side by side, one on each: they share nothing that their steps wait for.
    with ThreadPoolExecutor(2) as pool:
        ones = dict(zip(kinds, pool.map(run, kinds, ("0", "1") * len(kinds)), strict=False))
    for name in kinds:
        results[name] = compare(ones[name], run(name, "0,1"))
        print(f"{time.monotonic() - began:.0f} s  {shown(name, results[name])}", flush=True)
        a.out.write_text(json.dumps({**hardware(), "steps": a.steps, "skip": a.skip, "kinds": results}, indent=1))


if __name__ == "__main__":
    main()
