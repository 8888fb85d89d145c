"""Compares a job on one GPU with the same on two: `python -m bench.scaling OUT.json [--kinds "lora 8b"] [--runs 3]
[--steps 48] [--skip 10] [--models FOLDER]`.

Weak scaling: each GPU has four rows of 1,900 to 1,906 tokens a step, however many there are. Strong scaling: all of
them together have eight rows of a step, of the lengths of instruction data. One GPU's run is made on each of the two
at once, and the mean of both counts: GPUs of one kind differ by a few percent, and two together are as fast as the
slower one. Every run is the trainer's own process, as a worker preloads it. `all_steps` counts the seconds of every
step, with the compilation of the first ones, and those in which passes are recorded before them; `steady` those after
`--skip` steps. The medians of RUNS comparisons count. OUT.json is written after every comparison. The checkpoints are
random. Needs two GPUs.
"""

import argparse
import json
import statistics
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


def compare(ones: list[dict[str, Any]], two: dict[str, Any]) -> dict[str, Any]:
    """Returns the figures of a run on each GPU and of one on both, and how much faster both are than the mean."""
    found: dict[str, Any] = {"ones": ones, "two": two}
    if any("failed" in run for run in (*ones, two)):
        return found
    ratios = {
        name: round(two[of] / statistics.fmean(one[of] for one in ones), 3)
        for name, of in {"all_steps": "all_steps_tok_s", "steady": "tok_s"}.items()
    }
    return {"scaling": ratios} | found


def median(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the medians of what comparisons found, of those in which no run failed, and all of them."""
    whole = [each["scaling"] for each in found if "scaling" in each]
    ratios = {name: statistics.median(each[name] for each in whole) for name in (whole[0] if whole else ())}
    return {"scaling": ratios, "runs": found}


def shown(name: str, found: dict[str, Any]) -> str:
    """Returns a kind's line of the table."""
    runs = [*found["ones"], found["two"]]
    if "scaling" not in found:
        return f"{name}: failed {[run['failed'] for run in runs if 'failed' in run]}"
    speeds, around = [run["tok_s"] for run in runs], [run["seconds"].get("around_the_steps") for run in runs]
    return f"{name}: {speeds} tokens/s, {found['scaling']}, seconds around the steps {around}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--runs", type=int, default=3)
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

    found: dict[str, list[dict[str, Any]]] = {name: [] for name in kinds}
    for name in list(kinds) * a.runs:
        with ThreadPoolExecutor(2) as pool:
            ones = list(pool.map(run, (name, name), ("0", "1")))
        found[name].append(compare(ones, run(name, "0,1")))
        results[name] = median(found[name])
        print(f"{time.monotonic() - began:.0f} s  {shown(name, found[name][-1])}", flush=True)
        a.out.write_text(json.dumps({**hardware(), "steps": a.steps, "skip": a.skip, "kinds": results}, indent=1))


if __name__ == "__main__":
    main()
