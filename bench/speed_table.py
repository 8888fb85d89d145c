"""Measures the rows of the speed table: Tunery's job path and Unsloth or TRL with Liger, all in one call on one card.

`python -m bench.speed_table OUT.json [--rows "qlora 8b" "lora 1b" ...] [--seconds 540] [--runs 3] [--steps 50] [--skip
10] [--models FOLDER] [--stacks tunery]`. Without `--rows` every row is measured, in the order of ROWS, and all of them
RUNS times as far as the seconds allow: each run of Tunery in a process of its own, as that of a job, and those of a
peer behind each other in one, which spares it all starts but the first. OUT.json is written after every measurement, so
that a run that is cut off keeps its results. The checkpoints are random and made here. All stacks have the same
checkpoint, the same rows in the same order and an adapter of the same rank on the same layers; the peers' packages must
be importable. The next process imports its packages while the one before it loads its model, so `seconds` are those of
a preloaded process, with all its `runs`. Needs a GPU.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from bench import make_model
from bench.job_speed import DeviceMemory, Trainer, Work, measure
from bench.train_side_by_side import hardware

MOST_SECONDS = 240
"""The limit of one process, however much time is left: a stack that hangs must not take the others' time."""
_ALL_RUNS_IN_ONE = {"unsloth", "trl-liger"}
"""The stacks whose runs are those of one process."""
LEAST_SECONDS = 30
"""No measurement begins with less time left."""


@dataclass(frozen=True)
class Row:
    """A row of the table. `leave`, `peer_leave`: the card's memory that is left free for Tunery and the others, in GiB.

    `stacks`: what is measured, Tunery first. `recompute`: whether the peers recompute activations. `optimizer`: of
    Tunery; the peers' is 8-bit AdamW.
    """

    shape: str
    technique: str
    lengths: str = "long"
    batch: int = 4
    peer_batch: int = 4
    packing: bool = False
    recompute: bool = False
    leave: float | None = None
    peer_leave: float | None = None
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    stacks: tuple[str, ...] = ("tunery", "unsloth")


ROWS = {
    "qlora 8b": Row("llama3-8b", "qlora"),
    "lora 1b": Row("llama3-1b", "lora"),
    "qlora 8b real": Row("llama3-8b", "qlora", lengths="real", batch=32, packing=True),
    "full 1b": Row("llama3-1b", "full", recompute=True, stacks=("tunery", "unsloth", "trl-liger")),
    "generation 8b": Row("llama3-8b", "lora", stacks=("generation",)),
    "qlora 7b small": Row(
        "llama2-7b", "qlora", batch=1, peer_batch=1, recompute=True, leave=5.75, peer_leave=8.0, optimizer="adamw_8bit"
    ),
    "lora 0.6b": Row("qwen3-0.6b", "lora"),
    "lora 8b": Row("llama3-8b", "lora"),
    "qlora 8b fp8": Row("llama3-8b", "qlora-fp8"),
    "lora moe": Row("qwen3-30b-a3b", "lora", stacks=("tunery", "unsloth", "trl-liger")),
    "qlora 8b small": Row("llama3-8b", "qlora", recompute=True, leave=8.4, peer_leave=11.5, optimizer="adamw_8bit"),
    "qlora 8b small fp8": Row(
        "llama3-8b", "qlora-fp8", recompute=True, leave=8.4, peer_leave=11.5, optimizer="adamw_8bit"
    ),
    "full 1b small": Row("llama3-1b", "full", recompute=True, leave=11.6, peer_leave=14.0),
}
"""The rows in the order in which they are measured. A short job's figure is `around_the_steps` of "lora 1b"."""


@dataclass
class Bench:
    """The state that all measurements share. `over`: when the time is up."""

    models: Path
    over: float
    steps: int
    skip: int
    runs: int
    logs: Path
    ballast: list[torch.Tensor] = field(default_factory=list)

    @property
    def left(self) -> float:
        return self.over - time.monotonic()

    @property
    def limit(self) -> float:
        return min(MOST_SECONDS, self.left)

    def checkpoint(self, shape: str) -> Path:
        """Returns the folder of a shape's checkpoint; writes it if it is missing."""
        return make_model.ready(self.models, shape)

    @contextmanager
    def small_card(self, leave: float | None) -> Iterator[None]:
        """Occupies all but `leave` GiB of the card's free memory."""
        if leave is None:
            yield
            return
        free, _ = torch.cuda.mem_get_info()
        self.ballast.append(torch.empty(max(0, free - int(leave * 2**30)), dtype=torch.uint8, device="cuda"))
        try:
            yield
        finally:
            self.ballast.clear()
            torch.cuda.empty_cache()


class Measurement(Protocol):
    """A process that has begun to import; `run` lets it train and returns the figures of its runs, one at least."""

    def run(self, bench: Bench, row: Row) -> list[dict[str, Any]]: ...

    def drop(self) -> None:
        """Ends a waiting process."""


class Tunery:
    def __init__(self, bench: Bench, _row: Row) -> None:
        self._trainer = Trainer(bench.logs / "tunery.txt")

    def run(self, bench: Bench, row: Row) -> list[dict[str, Any]]:
        work = Work(row.technique, row.lengths, row.batch, bench.steps, bench.skip, row.packing, 1, row.optimizer)
        return [measure(bench.checkpoint(row.shape), work, self._trainer, limit=bench.limit)]

    def drop(self) -> None:
        self._trainer.process.kill()
        self._trainer.process.wait()


class Peer:
    """One of `train_trl.py`'s stacks, or `generation_speed.py`: it waits for a line and prints a RESULT of each run."""

    def __init__(self, command: list[str], log: Path, runs: int = 1) -> None:
        self._log, self._out, self._runs = log, log.with_suffix(".out"), runs
        with self._log.open("w") as errors, self._out.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *command, "--wait"], stdin=subprocess.PIPE, stdout=out, stderr=errors, text=True
            )

    def run(self, bench: Bench, row: Row) -> list[dict[str, Any]]:
        bench.checkpoint(row.shape)
        memory, began = DeviceMemory(self.process.pid), time.monotonic()
        ended: Any = "cut off"
        try:
            self.process.communicate("\n", timeout=bench.limit)
            ended = self.process.returncode
        except subprocess.TimeoutExpired:
            self.drop()
        seconds = {"whole": round(time.monotonic() - began, 1), "runs": self._runs}
        spent = {"seconds": seconds, "process_gib": memory.gib()}
        said = self._out.read_text().splitlines()
        found = [json.loads(line.removeprefix("RESULT ")) | spent for line in said if line.startswith("RESULT ")]
        if len(found) < self._runs:
            found.append({"failed": ended, "log": self._log.read_text().splitlines()[-15:]})
        return found

    def drop(self) -> None:
        self.process.kill()
        self.process.wait()


def command(stack: str, bench: Bench, row: Row) -> list[str]:
    """Returns the module and arguments of a peer."""
    model = ["--model", str(bench.models / row.shape)]
    if stack == "generation":
        return ["bench.generation_speed", *model]
    settings: dict[str, Any] = {
        "method": row.technique.removesuffix("-fp8"), "ckpt": int(row.recompute), "lengths": row.lengths,
        "bs": row.peer_batch, "rows": bench.steps * row.batch, "steps": bench.steps, "skip": bench.skip,
        "runs": bench.runs,
    }  # fmt: skip
    if stack == "trl-liger":
        settings |= {"liger": 1, "ckpt": 0}
    given = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    switches = ["--unsloth"] * (stack == "unsloth") + ["--packing"] * row.packing
    return ["bench.train_trl", *model, *given, *switches, "--job-rows"]


def begin(name: str, stack: str, bench: Bench) -> Measurement:
    row = ROWS[name]
    log = bench.logs / f"{stack} {name}.txt".replace(" ", "-")
    if stack == "tunery":
        return Tunery(bench, row)
    return Peer(command(stack, bench, row), log, bench.runs if stack in _ALL_RUNS_IN_ONE else 1)


def measure_all(names: list[str], bench: Bench) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yields a row's name, the stack and its figures, for all rows once, then again, until the time is up."""
    wanted = _measurements(names, bench)
    upcoming: list[Measurement] = []
    try:
        for number, (of, stack) in enumerate(wanted):
            if bench.left < LEAST_SECONDS:
                return
            row = ROWS[of[0]]
            current = upcoming.pop() if upcoming else begin(of[0], stack, bench)
            bench.checkpoint(row.shape)
            leave = row.leave if stack == "tunery" else row.peer_leave
            if number + 1 < len(wanted) and leave is None:  # a process that waits has some of the card's memory
                following, next_stack = wanted[number + 1]
                upcoming.append(begin(following[0], next_stack, bench))
            with bench.small_card(leave):
                found = current.run(bench, row)
            yield from ((name, stack, run) for name in of for run in found)
    finally:
        for measurement in upcoming:
            measurement.drop()


def _measurements(names: list[str], bench: Bench) -> list[tuple[list[str], str]]:
    """Returns the rows and the stack of each measurement, in order. Rows in which a peer does the same, as it has no
    eight bits, share its measurement.
    """
    of: dict[Any, tuple[list[str], str]] = {}
    for name, stack in ((each, stack) for each in names for stack in ROWS[each].stacks):
        row = ROWS[name]
        key = name if stack == "tunery" else (*command(stack, bench, row), row.peer_leave)
        of.setdefault(key, ([], stack))[0].append(name)
    again = [measurement for measurement in of.values() if measurement[1] not in _ALL_RUNS_IN_ONE]
    return list(of.values()) + again * (bench.runs - 1)


def median(runs: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Returns the run with the median speed, of those that have one."""
    done = sorted((run for run in runs if run.get("tok_s")), key=lambda run: run["tok_s"])
    return done[len(done) // 2] if done else None


def ratio(found: dict[str, list[dict[str, Any]]]) -> float | None:
    """Returns Tunery's median speed over that of the fastest peer."""
    if (run := median(found.get("generation", []))) is not None:
        return round(run["tok_s"] / run["transformers"]["tok_s"], 3)
    speeds = {stack: found_run["tok_s"] for stack, runs in found.items() if (found_run := median(runs))}
    ours = speeds.pop("tunery", None)
    return round(ours / max(speeds.values()), 3) if ours and speeds else None


def lines(results: dict[str, dict[str, list[dict[str, Any]]]]) -> Iterator[str]:
    """Yields the table: medians of tokens a second, memory; losses and gradient norms of the first run, as those of a
    peer after it train the same model further.
    """
    yield "| row | stack | runs | tokens/s | ratio | GiB allocated, reserved, process | losses | norms | seconds |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for name, found in results.items():
        for stack, runs in found.items():
            run = median(runs)
            if run is None:
                yield f"| {name} | {stack} | {len(runs)} | failed: {runs[-1].get('failed')} | | | | | |"
                continue
            speeds = "/".join(str(one["tok_s"]) for one in runs if one.get("tok_s"))
            memory = ", ".join(str(run.get(key)) for key in ("peak_gib", "reserved_gib", "process_gib"))
            first = next((one for one in runs if one.get("losses")), run)
            losses, norms = (", ".join(map(str, _ends(first.get(key, [])))) for key in ("losses", "grad_norms"))
            shown = ratio(found) if stack in {"tunery", "generation"} else ""
            cells = (name, stack, speeds, run["tok_s"], shown, memory, losses, norms, json.dumps(run.get("seconds")))
            yield f"| {' | '.join(map(str, cells))} |"


def _ends(series: list[float]) -> list[float]:
    return series[:1] + series[-1:]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--skip", type=int, default=10)
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "speed_table")
    parser.add_argument("--stacks", nargs="+", help="only these of each row's stacks")
    a = parser.parse_args()
    for name in a.rows if a.stacks else ():
        ROWS[name] = replace(ROWS[name], stacks=tuple(stack for stack in ROWS[name].stacks if stack in a.stacks))
    results: dict[str, dict[str, list[dict[str, Any]]]] = {}
    with tempfile.TemporaryDirectory() as logs:
        bench = Bench(a.models, time.monotonic() + a.seconds, a.steps, a.skip, a.runs, Path(logs))
        for name, stack, result in measure_all(a.rows, bench):
            results.setdefault(name, {}).setdefault(stack, []).append(result)
            print(name, stack, *(result.get(key) for key in ("tok_s", "trainable", "failed", "log")), flush=True)
            rows = {
                name: asdict(ROWS[name]) | {"ratio": ratio(found), "runs": found} for name, found in results.items()
            }
            chosen = {"steps": a.steps, "skip": a.skip}
            a.out.write_text(json.dumps({**hardware(), **chosen, "rows": rows}, indent=1) + "\n")
    for line in lines(results):
        print(line)


if __name__ == "__main__":
    main()
