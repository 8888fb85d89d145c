"""Speed and memory of a run through the trainer's own process, as a job runs it, on rows of uneven lengths.

`python -m bench.job_speed MODEL OUT.json [--technique lora] [--lengths long|real] [--batch 4] [--steps 50] [--skip 10]
[--packing] [--preloaded] [--runs 3]`: MODEL as `bench/make_model.py` writes it. `long`: 1,900 to 1,906 tokens a row.
`real`: those of instruction data, log-normal with a median of 190 tokens, at most 2,048. Nearly all have labels.
Tokens a second count the rows' own tokens, after SKIP steps of warming up; the median of RUNS counts. With
`--preloaded` the process has imported everything and waits, as a worker keeps one, and time is counted from the moment
that it gets its run. Needs a GPU.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from bench.train_side_by_side import hardware
from tunery.spec import Full, Lora, Plan, Qlora, Run, Schedule

TECHNIQUES = {
    "full": Full(),
    "lora": Lora(),
    "lora-fp8": Lora(precision="fp8"),
    "qlora": Qlora(),
    "qlora-fp8": Qlora(precision="fp8"),
}
LONGEST = 2048
SHOWN = ("failed", "tok_s", "step_ms", "tokens_a_step", "peak_gib", "seconds", "plan", "log")
AROUND = 23  # tokens of a row beside its answer


def lengths(kind: str, count: int) -> list[int]:
    numbers = random.Random(0)
    if kind == "long":
        return [numbers.randrange(1900, 1907) for _ in range(count)]
    return [min(LONGEST, max(AROUND + 8, int(numbers.lognormvariate(5.25, 0.75)))) for _ in range(count)]


def write_rows(path: Path, wanted: list[int]) -> None:
    """Chat rows whose answers are letters that the small tokenizer of `make_model` never joins."""
    numbers = random.Random(1)
    with path.open("w") as file:
        for length in wanted:
            answer = "".join(numbers.choice("JQXZ") for _ in range(length - AROUND))
            row = {"messages": [{"role": "user", "content": "QXJZ"}, {"role": "assistant", "content": answer}]}
            file.write(json.dumps(row) + "\n")


def lay_out(folder: Path, a: argparse.Namespace) -> None:
    (folder / "data").mkdir(parents=True)
    (folder / "base").symlink_to(a.model.resolve())
    write_rows(folder / "data/train.jsonl", lengths(a.lengths, a.steps * a.batch))
    plan = Plan(
        technique=TECHNIQUES[a.technique], n_epochs=1, batch_size=a.batch, seed=7, learning_rate_multiplier=1,
        learning_rate=1e-4, schedule=Schedule(type="constant", warmup_ratio=0), packing=a.packing,
    )  # fmt: skip
    run = Run(job="bench", base_model=a.model.name, plan=plan, public_checkpoints=0, snapshot_seconds=3600)
    (folder / "spec.json").write_text(run.model_dump_json())


def await_imports(process: psutil.Process) -> None:
    """Returns when the process has been idle for a second."""
    before = None
    while (now := process.cpu_times()) != before:
        before = now
        time.sleep(1)


def train(folder: Path, *, preloaded: bool) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The trainer's messages, and the seconds from its start, or from its run's, to its first step done and its end."""
    began, first = time.monotonic(), 0.0
    said = []
    command = [sys.executable, "-m", "worker.trainer", "--wait" if preloaded else str(folder)]
    pipe = subprocess.PIPE
    with (folder / "log.txt").open("ab") as log, subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log) as run:
        assert run.stdout is not None
        assert run.stdin is not None
        if preloaded:
            await_imports(psutil.Process(run.pid))
            began = time.monotonic()
            run.stdin.write(f"{folder}\n".encode())
        run.stdin.close()
        for line in run.stdout:
            said.append(json.loads(line))
            if said[-1]["type"] == "step" and not first:
                first = time.monotonic() - began
    return said, {"first_step": round(first, 1), "whole": round(time.monotonic() - began, 1)}


def measure(a: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as holder:
        folder = Path(holder) / "run"
        lay_out(folder, a)
        said, seconds = train(folder, preloaded=a.preloaded)
        log = (folder / "log.txt").read_text().splitlines()
    steps = [message for message in said if message["type"] == "step"]
    if not said or said[-1]["type"] != "finished":
        return {"failed": said[-1:], "log": log[-5:]}
    measured = steps[a.skip :]
    tokens = measured[-1]["tokens"] - steps[a.skip - 1]["tokens"]
    training = sum(step["seconds"] for step in measured)
    return {
        "tok_s": round(tokens / training),
        "step_ms": round(1000 * statistics.median(step["seconds"] for step in measured), 1),
        "tokens_a_step": round(tokens / len(measured)),
        "peak_gib": round((said[-1]["peak_memory_bytes"] or 0) / 2**30, 2),
        "seconds": seconds | {"around_the_steps": round(seconds["whole"] - sum(s["seconds"] for s in steps), 1)},
        "losses": [round(step["train_loss"], 4) for step in steps],
        "grad_norms": [round(step["grad_norm"], 4) for step in steps],
        "plan": [line.partition("plan: ")[2] for line in log if "memory plan: " in line][-1:],
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--technique", choices=list(TECHNIQUES), default="lora")
    parser.add_argument("--lengths", choices=["long", "real"], default="long")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--skip", type=int, default=10)
    parser.add_argument("--packing", action="store_true")
    parser.add_argument("--preloaded", action="store_true")
    parser.add_argument("--runs", type=int, default=3)
    return parser.parse_args()


def main() -> None:
    a = parse()
    runs = sorted((measure(a) for _ in range(a.runs)), key=lambda run: run.get("tok_s", 0))
    what = {
        name: getattr(a, name) for name in ("technique", "lengths", "batch", "steps", "skip", "packing", "preloaded")
    }
    a.out.write_text(json.dumps({"model": a.model.name, **what, **hardware(), "runs": runs}, indent=1) + "\n")
    median = runs[len(runs) // 2]
    shown = {k: median.get(k) for k in SHOWN}
    lost = {k: median.get(k, [])[:2] + median.get(k, [])[-1:] for k in ("losses", "grad_norms")}
    print("RESULT " + json.dumps(what | shown | lost), flush=True)


if __name__ == "__main__":
    main()
