"""Full fine-tuning in bf16 with stochastic rounding beside fp32 masters, on a GPU.

`python -m bench.full_precision BASE OUT.json [options]`: BASE a converted SmolLM2-135M-Instruct. Trains with the
trainer itself, as a job does, on the examples' SNIPS and Banking rows, each seed in both precisions and several runs at
once on one card, so that their times say nothing: `bench.full_step` measures those. Prints a table of exact matches on
the held-out rows.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

from bench.train_side_by_side import hardware
from tunery.planning import advice
from tunery.spec import Evaluation, Full, Plan, Run

EXAMPLES = Path(__file__).parents[1] / "examples"
MAX_NEW_TOKENS = {"snips": 96, "banking": 32}
PRECISIONS = ("bfloat16", "float32")


def lay_out(folder: Path, base: Path, task: str, dtype: str, seed: int, epochs: int) -> None:
    (folder / "data").mkdir(parents=True)
    (folder / "base").symlink_to(base.resolve())
    for part in ("train", "valid", "test"):
        (folder / f"data/{part}.jsonl").symlink_to(EXAMPLES / f"{task}_{part}.jsonl")
    technique = Full(weights_dtype=dtype)  # type: ignore[arg-type]
    hidden = json.loads((base / "config.json").read_text())["hidden_size"]
    plan = Plan(
        technique=technique, n_epochs=epochs, batch_size=advice.BATCH_SIZE, seed=seed, learning_rate_multiplier=1,
        learning_rate=advice.default_learning_rate(hidden, technique),
        evaluation=Evaluation(test_file="test", max_new_tokens=MAX_NEW_TOKENS[task]),
    )  # fmt: skip
    run = Run(job="bench", base_model=base.name, plan=plan, public_checkpoints=0, snapshot_seconds=3600)
    (folder / "spec.json").write_text(run.model_dump_json())


def train(base: Path, task: str, dtype: str, seed: int, epochs: int) -> dict[str, Any]:
    """One run of the trainer in a process of its own, and what came of it."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / "run"
        lay_out(folder, base, task, dtype, seed, epochs)
        done = subprocess.run([sys.executable, "-m", "worker.trainer", str(folder)], capture_output=True, text=True)
        said = {message["type"]: message for message in map(json.loads, done.stdout.splitlines())}
        found: dict[str, Any] = {"task": task, "weights_dtype": dtype, "seed": seed, "epochs": epochs}
        if "finished" not in said:
            return found | {"failed": said.get("failed"), "log": done.stderr[-2000:]}
        described = json.loads((folder / "out/training_config.json").read_text())
        parity = json.loads((folder / "out/parity.json").read_text())
    return found | {
        "precision": described["precision"],
        "exact_base": said["score"]["base_exact"],
        "exact_tuned": said["score"]["tuned_exact"],
        "rows": said["score"]["rows"],
        "valid_loss": said["evaluated"]["loss"],
        "steps": said["finished"]["steps"],
        "peak_gib": round((said["finished"]["peak_memory_bytes"] or 0) / 2**30, 2),
        "parity_difference": parity["difference"],
    }


def lines(runs: list[dict[str, Any]]) -> Iterator[str]:
    """The table: a line for each task."""
    yield "| task | epochs | seeds | exact, bf16 stochastic | exact, fp32 masters | difference | valid loss, both |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for task in dict.fromkeys(run["task"] for run in runs):
        both = [[r for r in runs if (r["task"], r["weights_dtype"]) == (task, dtype)] for dtype in PRECISIONS]
        if any("failed" in run for part in both for run in part):
            yield f"| {task} | failed |"
            continue
        exact = [[100 * run["exact_tuned"] for run in part] for part in both]
        means = [statistics.mean(part) for part in exact]
        losses = ", ".join(f"{statistics.mean(run['valid_loss'] for run in part):.4f}" for part in both)
        shown = [
            f"{mean:.1f} % ({', '.join(f'{e:.1f}' for e in part)})" for mean, part in zip(means, exact, strict=True)
        ]
        yield (
            f"| {task} | {both[0][0]['epochs']} | {len(both[0])} | {shown[0]} | {shown[1]} | "
            f"{means[0] - means[1]:+.1f} | {losses} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tasks", nargs="+", default=["snips", "banking"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--at-once", type=int, default=6)
    a = parser.parse_args()
    wanted = list(product(a.tasks, PRECISIONS, range(a.seeds)))
    with ThreadPoolExecutor(a.at_once) as pool:
        runs = list(pool.map(lambda one: train(a.base, *one, a.epochs), wanted))
    a.out.write_text(json.dumps({**hardware(), "runs": runs}, indent=1) + "\n")
    for line in lines(runs):
        print(line)
    for run in runs:
        if "failed" in run:
            print(run)


if __name__ == "__main__":
    main()
