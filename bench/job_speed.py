"""Measures speed and memory of a run in the trainer's own process, as a job runs it, on rows of uneven lengths.

`python -m bench.job_speed MODEL OUT.json [--technique lora] [--lengths long|real] [--batch 4] [--steps 50] [--skip 10]
[--packing] [--preloaded] [--runs 3]`: MODEL as `bench/make_model.py` writes it. `long`: 1,900 to 1,906 tokens a row.
`real`: those of instruction data, log-normal with a median of 190 tokens, at most 2,048. Nearly all tokens have labels.
Tokens a second count the rows' own tokens, without padding, after SKIP steps of warming up; the result is the median of
RUNS. With `--preloaded` the process has imported everything and waits, as a worker keeps one, and time counts from the
moment at which it gets its run. Needs a GPU.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from bench.train_rows import SHUFFLED_BY, chats, lengths
from bench.train_side_by_side import hardware
from tunery.spec import Full, Lora, Plan, Qlora, Resources, Run, Schedule

TECHNIQUES = {
    "full": Full(),
    "lora": Lora(),
    "lora-fp8": Lora(precision="fp8"),
    "qlora": Qlora(),
    "qlora-fp8": Qlora(precision="fp8"),
}
SHOWN = ("failed", "tok_s", "step_ms", "tokens_a_step", "peak_gib", "reserved_gib", "process_gib", "seconds", "plan",
         "log")  # fmt: skip


@dataclass(frozen=True)
class Work:
    """The options of a measured run; `batch`: rows of a step on all GPUs, `skip`: steps of warming up."""

    technique: str = "lora"
    lengths: str = "long"
    batch: int = 4
    steps: int = 50
    skip: int = 10
    packing: bool = False
    gpus: int = 1
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"


def lay_out(folder: Path, model: Path, work: Work) -> None:
    (folder / "data").mkdir(parents=True)
    (folder / "base").symlink_to(model.resolve())
    lines = (json.dumps(row) + "\n" for row in chats(lengths(work.lengths, work.steps * work.batch)))
    (folder / "data/train.jsonl").write_text("".join(lines))
    plan = Plan(
        technique=TECHNIQUES[work.technique], n_epochs=1, batch_size=work.batch, seed=SHUFFLED_BY,
        learning_rate_multiplier=1, learning_rate=1e-4, schedule=Schedule(type="constant", warmup_ratio=0),
        packing=work.packing, optimizer=work.optimizer,
        resources=Resources(gpus=work.gpus),  # type: ignore[arg-type]
    )  # fmt: skip
    run = Run(job="bench", base_model=model.name, plan=plan, public_checkpoints=0, snapshot_seconds=3600)
    (folder / "spec.json").write_text(run.model_dump_json())


class DeviceMemory:
    """Samples the peak of one process's GPU memory, as the driver counts it, every half second."""

    def __init__(self, pid: int) -> None:
        self._pid, self._most, self._over = pid, 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        command = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
        while not self._over.wait(0.5):
            try:
                said = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
            except (OSError, subprocess.TimeoutExpired):
                return
            for pid, used in re.findall(r"(\d+), (\d+)", said):
                self._most = max(self._most, int(used) if int(pid) == self._pid else 0)

    def gib(self) -> float | None:
        """Ends the sampling; returns None if the driver did not say."""
        self._over.set()
        self._thread.join()
        return round(self._most / 2**10, 2) if self._most else None


def await_imports(process: psutil.Process) -> None:
    """Returns when the process and its children have been idle for a second."""
    before = None
    while (now := [each.cpu_times() for each in (process, *process.children(recursive=True))]) != before:
        before = now
        time.sleep(1)


class Trainer:
    """A trainer process, which begins at once if it gets a folder, and else imports everything and waits.

    `gpus`: those that it sees, as CUDA_VISIBLE_DEVICES.
    """

    def __init__(self, log: Path, folder: Path | None = None, gpus: str | None = None) -> None:
        self._folder, self.began = folder, time.monotonic()
        command = [sys.executable, "-m", "worker.trainer", str(folder) if folder else "--wait"]
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": gpus} if gpus else {})
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True, env=environment
            )

    def begin(self, folder: Path) -> None:
        """Gives a waiting process its folder."""
        assert self.process.stdin is not None
        await_imports(psutil.Process(self.process.pid))
        self.began, self._folder = time.monotonic(), folder
        self.process.stdin.write(f"{folder}\n")
        self.process.stdin.close()

    def messages(
        self, limit: float | None = None, tell: Callable[[dict[str, Any]], object] = lambda _: None
    ) -> tuple[list[dict[str, Any]], dict[str, float]]:
        """Returns the messages until the process ends, and the seconds to the end of its first step and to its own end.

        `at` of a message: the seconds until it was written. `tell` gets each as it comes. After `limit` seconds the
        process is killed.
        """
        assert self.process.stdout is not None
        said, first = [], 0.0
        timer = threading.Timer(limit if limit is not None else 1e6, self.process.kill)
        timer.daemon = True
        timer.start()
        with self.process.stdout as output:
            for line in output:
                said.append(json.loads(line) | {"at": round(time.monotonic() - self.began, 2)})
                tell(said[-1])
                if said[-1]["type"] == "step" and not first:
                    first = said[-1]["at"]
        self.process.wait()
        timer.cancel()
        return said, {"first_step": round(first, 1), "whole": round(time.monotonic() - self.began, 1)}


def measure(
    model: Path,
    work: Work,
    trainer: Trainer | None = None,
    *,
    preloaded: bool = False,
    limit: float | None = None,
    gpus: str | None = None,
) -> dict[str, Any]:
    """Measures one run, in a new process or in `trainer`, which waits. `limit`: the most seconds that it may take."""
    with tempfile.TemporaryDirectory() as holder:
        folder = Path(holder) / "run"
        lay_out(folder, model, work)
        if trainer is None and preloaded:
            trainer = Trainer(folder / "log.txt", gpus=gpus)
            trainer.begin(folder)
        elif trainer is None:
            trainer = Trainer(folder / "log.txt", folder, gpus)
        else:
            trainer.begin(folder)
        memory = DeviceMemory(trainer.process.pid)
        said, seconds = trainer.messages(limit)
        process_gib = memory.gib()
        log = (folder / "log.txt").read_text().splitlines()
    return {**figures(said, seconds, log, work.skip), "process_gib": process_gib}


def figures(said: list[dict[str, Any]], seconds: dict[str, float], log: list[str], skip: int) -> dict[str, Any]:
    """Returns the figures of a run from its messages and log; a run cut off after `skip` steps gives those it had."""
    steps = [message for message in said if message["type"] == "step"]
    done = bool(said) and said[-1]["type"] == "finished"
    if len(steps) < skip + 2:
        return {"failed": said[-1:], "log": log[-5:]}
    measured = steps[skip:]
    tokens = measured[-1]["tokens"] - steps[skip - 1]["tokens"]
    training = sum(step["seconds"] for step in measured)
    slowest = sorted(measured, key=lambda step: step["seconds"], reverse=True)[:5]
    peak = said[-1]["peak_memory_bytes"] if done else None
    reserved = [float(found[1]) for line in log if (found := re.search(r"([\d.]+) GiB reserved", line))]
    recording = next(
        (float(found[1]) for line in log if (found := re.search(r"recorded \d+ passes in ([\d.]+) s", line))), 0.0
    )
    around = seconds["whole"] - sum(s["seconds"] for s in steps)
    return {
        "tok_s": round(tokens / training),
        "all_steps_tok_s": round(steps[-1]["tokens"] / (recording + sum(step["seconds"] for step in steps))),
        "recording_s": recording,
        "step_ms": round(1000 * statistics.median(step["seconds"] for step in measured), 1),
        "slowest_ms": [round(1000 * step["seconds"]) for step in slowest],
        "slowest_steps": [step["step"] for step in slowest],
        "tokens_a_step": round(tokens / len(measured)),
        "peak_gib": peak and round(peak / 2**30, 2),
        "reserved_gib": reserved[-1] if reserved else None,
        "seconds": seconds | ({"around_the_steps": round(around, 1)} if done else {"cut_off": True}),
        "trainable": next((m["trainable_params"] for m in said if m["type"] == "started"), None),
        "losses": [round(step["train_loss"], 4) for step in steps],
        "grad_norms": [round(step["grad_norm"], 4) for step in steps],
        "plan": [line.partition("plan: ")[2] for line in log if "memory plan: " in line][-1:],
        "later_plans": [line.partition("from here on: ")[2] for line in log if "memory plan from here on" in line],
        "needs": [line.partition("INFO ")[2] or line for line in log if "MiB for activations" in line][-1:],
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--technique", choices=list(TECHNIQUES), default="lora")
    parser.add_argument("--lengths", choices=["full", "long", "real"], default="long")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--skip", type=int, default=10)
    parser.add_argument("--packing", action="store_true")
    parser.add_argument("--preloaded", action="store_true")
    parser.add_argument("--runs", type=int, default=3)
    return parser.parse_args()


def main() -> None:
    a = parse()
    work = Work(a.technique, a.lengths, a.batch, a.steps, a.skip, a.packing)
    made = (measure(a.model, work, preloaded=a.preloaded) for _ in range(a.runs))
    runs = sorted(made, key=lambda run: run.get("tok_s", 0))
    what = asdict(work) | {"preloaded": a.preloaded}
    a.out.write_text(json.dumps({"model": a.model.name, **what, **hardware(), "runs": runs}, indent=1) + "\n")
    median = runs[len(runs) // 2]
    shown = {k: median.get(k) for k in SHOWN}
    lost = {k: median.get(k, [])[:2] + median.get(k, [])[-1:] for k in ("losses", "grad_norms")}
    print("RESULT " + json.dumps(what | shown | lost), flush=True)


if __name__ == "__main__":
    main()
