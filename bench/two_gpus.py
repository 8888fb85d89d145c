"""Compares a run on one GPU and on two, and kills and resumes it on two: `python -m bench.two_gpus OUT.json [options]`.

Each run is `python -m worker.trainer RUN_DIR` in a process of its own. On two GPUs each optimizer step sees the same
rows as on one, so losses are equal within bf16's noise; a run that is killed with SIGKILL after a snapshot and resumed
has the losses of an uninterrupted run. Adapters are killed and resumed with dropout, drawn by each rank for itself.

Needs two GPUs. `--base` names a base folder; without it a random Llama of 1.5 billion weights is made. To try it
without GPUs: `--base` a tiny one, `--steps 6`.
"""

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench import make_model
from tunery import trainer_protocol as protocol
from tunery.spec import Full, Lora, Plan, Qlora, Resources, Run

ROOT = Path(__file__).parents[1]
BATCH, SEED = 8, 7
NOISE = 0.01
"""Relative difference of a step's loss that another order of summation may cause in bf16 over a run."""
TECHNIQUES = {
    "full": (Full(), Full(), 2e-5),
    "lora": (Lora(), Lora(dropout=0.1), 2e-4),
    "qlora": (Qlora(), Qlora(dropout=0.1), 2e-4),
}
PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")


def rows(count: int) -> list[dict[str, Any]]:
    """Returns rows of 10 to 200 words, the last of which is the answer."""
    numbers = random.Random(SEED)
    made = []
    for _ in range(count):
        words = [f"{numbers.randrange(1000)}" for _ in range(numbers.randint(10, 200))]
        made.append({
            "messages": [
                {"role": "user", "content": " ".join(words)},
                {"role": "assistant", "content": " ".join(words[-8:])},
            ]
        })  # fmt: skip
    return made


def lay_out(folder: Path, base: Path, technique: Any, rate: float, gpus: int, steps: int, snapshots: float) -> Path:
    plan = Plan(
        technique=technique, n_epochs=1, batch_size=BATCH, learning_rate=rate, learning_rate_multiplier=1, seed=SEED,
        resources=Resources(gpus=gpus),  # type: ignore[arg-type]
    )  # fmt: skip
    run = Run(job="bench", base_model=base.name, plan=plan, public_checkpoints=0, snapshot_seconds=snapshots)
    (folder / "data").mkdir(parents=True)
    (folder / "base").symlink_to(base.resolve())
    (folder / "spec.json").write_text(run.model_dump_json())
    lines = (json.dumps(row) + "\n" for row in rows(steps * BATCH))
    (folder / "data" / "train.jsonl").write_text("".join(lines))
    return folder


@contextmanager
def trainer(folder: Path, gpus: str) -> Iterator[subprocess.Popen[bytes]]:
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": gpus} if _cuda() else {})
    command = [sys.executable, "-m", "worker.trainer", str(folder)]
    with (folder / "log.txt").open("ab") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=log, start_new_session=True
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def losses(folder: Path, gpus: str) -> dict[int, protocol.Step]:
    """Runs the trainer; returns its steps by number. Raises RuntimeError with the log's end if it does not finish."""
    with trainer(folder, gpus) as process:
        assert process.stdout is not None
        said = [protocol.parse(line) for line in process.stdout]
        if process.wait() != 0:
            raise RuntimeError(f"{folder}: {said[-1]}\n{(folder / 'log.txt').read_text()[-3000:]}")
    print(f"{folder.name} ended", flush=True)
    return {message.step: message for message in said if isinstance(message, protocol.Step)}


def killed(folder: Path, gpus: str) -> int:
    """Kills the run two steps after its first snapshot; returns the last step that it reported."""
    left = None
    with trainer(folder, gpus) as process:
        assert process.stdout is not None
        for message in map(protocol.parse, process.stdout):
            if isinstance(message, protocol.CheckpointSaved) and left is None:
                left = 2
            if isinstance(message, protocol.Step) and left is not None:
                left -= 1
                if left == 0:
                    os.killpg(process.pid, signal.SIGKILL)
                    return message.step
    raise RuntimeError(f"{folder} ended before it was killed\n{(folder / 'log.txt').read_text()[-3000:]}")


def compare(found: dict[int, protocol.Step], wanted: dict[int, protocol.Step]) -> float:
    """Returns the largest relative difference of a step's loss."""
    return max(abs(found[step].train_loss / wanted[step].train_loss - 1) for step in found)


def measure(name: str, base: Path, work: Path, steps: int, gpu: str) -> dict[str, Any]:
    plain, drawn, rate = TECHNIQUES[name]
    wanted = {"one": (plain, 1, gpu), "two": (plain, 2, "0,1"), "whole": (drawn, 2, "0,1")}
    if drawn == plain:
        del wanted["whole"]
    with ThreadPoolExecutor(len(wanted)) as pool:
        made = {
            kind: pool.submit(losses, lay_out(work / f"{name}-{kind}", base, technique, rate, n, steps, 3600), gpus)
            for kind, (technique, n, gpus) in wanted.items()
        }
        one, two = made["one"].result(), made["two"].result()
        whole = made["whole"].result() if "whole" in made else two
    broken = lay_out(work / f"{name}-broken", base, drawn, rate, 2, steps, 0.3)
    last = killed(broken, "0,1")
    _save_no_more(broken)
    resumed = losses(broken, "0,1")
    found = {
        "technique": name,
        "steps": len(one),
        "first_loss": [one[1].train_loss, two[1].train_loss],
        "last_loss": [one[steps].train_loss, two[steps].train_loss],
        "one_against_two": compare(two, one),
        "killed_after_step": last,
        "resumed_at_step": min(resumed),
        "resumed_against_unbroken": compare(resumed, whole),
        "losses": {"one": _losses(one), "two": _losses(two), "unbroken": _losses(whole), "resumed": _losses(resumed)},
    }
    found["equal"] = max(found["one_against_two"], found["resumed_against_unbroken"]) < NOISE
    return found


def _save_no_more(folder: Path) -> None:
    """Turns off the snapshots of a run that is resumed: those of a full fine-tune take longer than its steps."""
    spec = folder / "spec.json"
    run = Run.model_validate_json(spec.read_text())
    spec.write_text(run.model_copy(update={"snapshot_seconds": 3600.0}).model_dump_json())


def _losses(steps: dict[int, protocol.Step]) -> list[float]:
    return [round(step.train_loss, 5) for step in steps.values()]


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _devices() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["cpu"]


def table(results: list[dict[str, Any]]) -> str:
    lines = ["technique  first loss 1/2 GPUs   last loss 1/2 GPUs    1 vs 2    resumed"]
    for found in results:
        first, last = found["first_loss"], found["last_loss"]
        lines.append(
            f"{found['technique']:9}  {first[0]:.5f} {first[1]:.5f}      {last[0]:.5f} {last[1]:.5f}     "
            f"{found['one_against_two']:.1e}   {found['resumed_against_unbroken']:.1e}"
        )
    return "\n".join(lines)


def record(base: Path, results: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "what": "one run on one and on two GPUs, and killed and resumed on two; one_against_two and "
        "resumed_against_unbroken are the largest relative differences of a step's loss",
        "date": datetime.now(UTC).date().isoformat(),
        "base": base.name,
        "devices": _devices(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "noise": NOISE,
        "results": results,
    }


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--techniques", nargs="+", choices=list(TECHNIQUES), default=list(TECHNIQUES))
    a = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as home:
        base = a.base or make_model.ready(Path(home), "llama3-1b")
        print(f"base {base} after {time.monotonic() - began:.0f} s", flush=True)
        # All at once: only losses are compared, and imports, loading and writing take most of a run.
        with ThreadPoolExecutor(len(a.techniques)) as pool:
            measuring = [pool.submit(measure, name, base, Path(home), a.steps, str(i % 2))
                         for i, name in enumerate(a.techniques)]  # fmt: skip
            results: list[dict[str, Any]] = []
            for waiting in as_completed(measuring):
                try:
                    results.append(waiting.result())
                except RuntimeError as error:
                    print(error, flush=True)
                    continue
                print(f"{time.monotonic() - began:.0f} s\n{table(results)}", flush=True)
                a.out.write_text(json.dumps(record(base, results), indent=2) + "\n")
    return 0 if len(results) == len(a.techniques) and all(found["equal"] for found in results) else 1


if __name__ == "__main__":
    sys.exit(main())
